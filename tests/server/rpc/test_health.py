"""The standard health service: the server, its services, its adapters."""

import asyncio
import shutil

import grpc
from grpc_health.v1 import health_pb2 as pb
from grpc_health.v1 import health_pb2_grpc

from server.pb.loraplex.v1 import adapters_pb2
from tests.server.rpc.conftest import Running
from tests.server.rpc.test_inference import ask, failure

SERVING, NOT_SERVING = pb.HealthCheckResponse.SERVING, pb.HealthCheckResponse.NOT_SERVING


async def check(running: Running, service: str) -> int:
    stub = health_pb2_grpc.HealthStub(running.channel)
    return int((await stub.Check(pb.HealthCheckRequest(service=service))).status)


async def test_an_adapter_serves_if_requests_for_it_are_answered(running: Running) -> None:
    for service in ("", "loraplex.v1.Adapters", "adapter/plain", "adapter/plain@1"):
        assert await check(running, service) == SERVING
    for service in ("nobody", "adapter/nobody", "adapter/plain@2", "adapter/", "adapter/../plain"):
        assert (await failure(check(running, service))).code() == grpc.StatusCode.NOT_FOUND
    (running.adapters_dir / "head" / "adapter_config.json").write_text("{")
    await failure(running.inference.Generate(ask(adapter="head")))
    assert await check(running, "adapter/head") == NOT_SERVING
    await running.adapters.UnloadAdapter(adapters_pb2.UnloadAdapterRequest(name="plain"))
    assert (await failure(check(running, "adapter/plain"))).code() == grpc.StatusCode.NOT_FOUND
    await running.engine.admission.drain(0)
    assert await check(running, "adapter/attention") == NOT_SERVING


async def test_watching_an_adapter(running: Running) -> None:
    stub = health_pb2_grpc.HealthStub(running.channel)
    statuses = aiter(stub.Watch(pb.HealthCheckRequest(service="adapter/new")))

    async def told() -> int:
        async with asyncio.timeout(10):
            return int((await anext(statuses)).status)

    assert await told() == pb.HealthCheckResponse.SERVICE_UNKNOWN
    await running.adapters.LoadAdapter(adapters_pb2.LoadAdapterRequest(name="plain"))  # of no interest
    shutil.copytree(running.adapters_dir / "plain", running.adapters_dir / "new")
    await running.adapters.LoadAdapter(adapters_pb2.LoadAdapterRequest(name="new"))
    assert await told() == SERVING
    await running.adapters.UnloadAdapter(adapters_pb2.UnloadAdapterRequest(name="new"))
    assert await told() == pb.HealthCheckResponse.SERVICE_UNKNOWN
    draining = asyncio.create_task(running.server.drain(grace=5))
    assert await told() == NOT_SERVING
    await draining


async def test_watchers_without_end_are_refused(running: Running) -> None:
    stub = health_pb2_grpc.HealthStub(running.channel)
    calls = [aiter(stub.Watch(pb.HealthCheckRequest(service="adapter/plain"))) for _ in range(101)]
    results = await asyncio.gather(*[anext(call) for call in calls], return_exceptions=True)
    refused = [result for result in results if isinstance(result, grpc.aio.AioRpcError)]
    assert [error.code() for error in refused] == [grpc.StatusCode.RESOURCE_EXHAUSTED]


async def test_what_is_wrong_elsewhere_is_not_held_against_an_adapter(running: Running) -> None:
    """A folder that cannot take its place says nothing of the version that is there."""
    bad = running.adapters_dir / "bad"
    bad.mkdir()
    (bad / "adapter_config.json").write_text("{")
    await failure(
        running.adapters.LoadAdapter(adapters_pb2.LoadAdapterRequest(name="attention", source="bad", replace=True))
    )
    assert await check(running, "adapter/attention") == SERVING

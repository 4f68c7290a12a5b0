"""The grpc_server_* metrics: every type of call, every way to end."""

import asyncio
import threading
from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest
from prometheus_client import CollectorRegistry

from adapters.format import read_adapter
from server.errors import Overloaded
from server.metrics import FINISH_REASONS
from server.pb.loraplex.v1 import inference_pb2 as pb
from server.rpc.call_metrics import CallMetricsInterceptor
from tests.server.rpc.conftest import Running
from tests.server.rpc.test_inference import ask, failure


async def echo(request: bytes, context: grpc.aio.ServicerContext[Any, Any]) -> bytes:
    if request == b"abort":
        await context.abort(grpc.StatusCode.OUT_OF_RANGE)
    if request == b"raise":
        raise ValueError(request)
    if request == b"sleep":
        await asyncio.sleep(60)
    return request


async def repeat(request: bytes, context: grpc.aio.ServicerContext[Any, Any]) -> AsyncIterator[bytes]:
    for _ in range(3):
        yield request
    if request == b"sleep":
        await asyncio.sleep(60)


async def write(request: bytes, context: grpc.aio.ServicerContext[Any, Any]) -> None:
    """A stream of the other style."""
    await context.write(request)
    await context.write(request)


async def join(requests: AsyncIterator[bytes], context: grpc.aio.ServicerContext[Any, Any]) -> bytes:
    return b"".join([request async for request in requests])


async def mirror(requests: AsyncIterator[bytes], context: grpc.aio.ServicerContext[Any, Any]) -> AsyncIterator[bytes]:
    async for request in requests:
        yield request


HANDLERS = {
    "Echo": grpc.unary_unary_rpc_method_handler(echo, response_serializer=bytes.upper),
    "Repeat": grpc.unary_stream_rpc_method_handler(repeat),
    "Write": grpc.unary_stream_rpc_method_handler(write),
    "Join": grpc.stream_unary_rpc_method_handler(join, request_deserializer=bytes.upper),
    "Mirror": grpc.stream_stream_rpc_method_handler(mirror),
}


class Calls:
    """A channel to a counting server, and the counts."""

    def __init__(self, registry: CollectorRegistry, channel: grpc.aio.Channel) -> None:
        self.registry = registry
        self.channel: Any = channel

    def count(self, metric: str, kind: str, method: str, **labels: str) -> float | None:
        labels |= {"grpc_type": kind, "grpc_service": "test.Service", "grpc_method": method}
        return self.registry.get_sample_value(f"grpc_server_{metric}", labels)

    async def handled(self, kind: str, method: str, code: str) -> float:
        """Waits for the server's side of a call to end."""
        async with asyncio.timeout(10):
            while (value := self.count("handled_total", kind, method, grpc_code=code)) is None:
                await asyncio.sleep(0.01)
        return value


@pytest.fixture
async def calls() -> AsyncIterator[Calls]:
    registry = CollectorRegistry()
    server = grpc.aio.server(interceptors=[CallMetricsInterceptor(registry)])
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("test.Service", HANDLERS),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        yield Calls(registry, channel)
    await server.stop(0)


async def three() -> AsyncIterator[bytes]:
    for _ in range(3):
        yield b"x"


async def test_every_type_of_call(calls: Calls) -> None:
    channel = calls.channel
    assert await channel.unary_unary("/test.Service/Echo")(b"x") == b"X"
    assert [message async for message in channel.unary_stream("/test.Service/Repeat")(b"x")] == [b"x"] * 3
    assert [message async for message in channel.unary_stream("/test.Service/Write")(b"x")] == [b"x"] * 2
    assert await channel.stream_unary("/test.Service/Join")(three()) == b"XXX"
    assert [message async for message in channel.stream_stream("/test.Service/Mirror")(three())] == [b"x"] * 3
    for kind, method, received, sent in (
        ("unary", "Echo", 1, 1),
        ("server_stream", "Repeat", 1, 3),
        ("server_stream", "Write", 1, 2),
        ("client_stream", "Join", 3, 1),
        ("bidi_stream", "Mirror", 3, 3),
    ):
        assert await calls.handled(kind, method, "OK") == 1
        assert calls.count("started_total", kind, method) == 1
        assert calls.count("msg_received_total", kind, method) == received
        assert calls.count("msg_sent_total", kind, method) == sent
        assert calls.count("handling_seconds_count", kind, method) == 1


@pytest.mark.parametrize(
    ("request_", "code"), [(b"abort", "OUT_OF_RANGE"), (b"raise", "UNKNOWN"), (b"sleep", "DEADLINE_EXCEEDED")]
)
async def test_codes(calls: Calls, request_: bytes, code: str) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await calls.channel.unary_unary("/test.Service/Echo")(request_, timeout=0.5)
    assert caught.value.code().name == code
    assert await calls.handled("unary", "Echo", code) == 1


async def test_a_client_that_goes_away(calls: Calls) -> None:
    call = calls.channel.unary_stream("/test.Service/Repeat")(b"sleep")
    await call.read()
    call.cancel()
    assert await calls.handled("server_stream", "Repeat", "CANCELLED") == 1


async def test_unknown_methods_share_one_series(calls: Calls) -> None:
    for method in ("/test.Service/Invented", "/test.Service/Another", "/invented.Service/Echo"):
        with pytest.raises(grpc.aio.AioRpcError):
            await calls.channel.unary_unary(method)(b"")
    counted = {
        (sample.name, *sorted(sample.labels.items())): sample.value
        for family in calls.registry.collect()
        for sample in family.samples
        if sample.name.endswith("_total")
    }
    labels = [("grpc_method", "unknown"), ("grpc_service", "unknown"), ("grpc_type", "unary")]
    assert counted == {
        ("grpc_server_started_total", *labels): 3,
        ("grpc_server_handled_total", ("grpc_code", "UNIMPLEMENTED"), *labels): 3,
    }


async def test_messages_that_cannot_be_read_carry_their_code(running: Running) -> None:
    channel: Any = running.channel
    with pytest.raises(grpc.aio.AioRpcError):
        await channel.unary_unary("/loraplex.v1.Inference/Generate")(b"\xff")
    labels = {"grpc_type": "unary", "grpc_service": "loraplex.v1.Inference", "grpc_method": "Generate"}
    code = {**labels, "grpc_code": "INVALID_ARGUMENT"}
    assert running.metrics.registry.get_sample_value("grpc_server_handled_total", code) == 1
    assert running.metrics.registry.get_sample_value("grpc_server_msg_received_total", labels) == 1


async def test_requests_count_by_how_they_end(running: Running) -> None:
    """The engine's view of the same calls."""

    def count(metric: str, **labels: str) -> float:
        return running.metrics.registry.get_sample_value(f"loraplex_{metric}", labels) or 0

    async def until(metric: str, value: float, **labels: str) -> None:
        async with asyncio.timeout(10):
            while count(metric, **labels) != value:
                await asyncio.sleep(0.01)

    sampling = pb.SamplingParams(max_tokens=5, ignore_eos=True)
    answer = await running.inference.Generate(pb.GenerateRequest(prompt="x", sampling=sampling))
    stopped = pb.SamplingParams(max_tokens=5, stop_token_ids=answer.token_ids[:1])
    await running.inference.Generate(pb.GenerateRequest(prompt="x", sampling=stopped))
    long = pb.SamplingParams(max_tokens=200, ignore_eos=True)
    call = running.inference.GenerateStream(pb.GenerateRequest(prompt="x", adapter="plain", sampling=long))
    await call.read()
    assert count("num_requests_running") + count("num_requests_waiting") == 1
    assert count("kv_cache_usage_ratio") > 0
    call.cancel()
    for reason, value in zip(FINISH_REASONS, (1, 1, 1, 0, 0), strict=True):
        await until("requests_total", value, finish_reason=reason)
    await until("num_requests_running", 0)
    assert count("time_to_first_token_seconds_count") == 3
    parts = sum(count(f"request_{part}_time_seconds_sum") for part in ("queue", "prefill", "decode"))
    assert parts == pytest.approx(count("e2e_request_latency_seconds_sum"))
    early = count("request_queue_time_seconds_sum") + count("request_prefill_time_seconds_sum")
    assert early == pytest.approx(count("time_to_first_token_seconds_sum"))


async def test_requests_that_do_not_reach_the_engine_count_too(
    running: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Refused for want of room or of an adapter, or cancelled while the adapter loads: each ends in exactly one way."""

    def counts() -> dict[str, float]:
        values = {
            reason: running.metrics.registry.get_sample_value("loraplex_requests_total", {"finish_reason": reason})
            for reason in FINISH_REASONS
        }
        return {reason: value for reason, value in values.items() if value}

    generate = running.inference.Generate
    await failure(generate(ask(adapter="nobody")))
    assert counts() == {"refused": 1}
    with monkeypatch.context() as patch:
        patch.setattr(running.engine.admission, "_max_requests", 0)
        await failure(generate(ask()))
    assert counts() == {"refused": 2}

    reading, go_on = asyncio.Event(), threading.Event()
    loop = asyncio.get_running_loop()

    def slowly(*arguments: Any, **settings: Any) -> Any:
        loop.call_soon_threadsafe(reading.set)
        go_on.wait(10)
        return read_adapter(*arguments, **settings)

    monkeypatch.setattr("server.lora.loader.read_adapter", slowly)
    call = generate(ask(adapter="plain"))
    async with asyncio.timeout(10):
        await reading.wait()
        call.cancel()
        while "abort" not in counts():
            await asyncio.sleep(0.01)
    go_on.set()
    assert counts() == {"refused": 2, "abort": 1}

    monkeypatch.setattr(running.parts.runner, "forward", lambda batch: 1 / 0)
    await failure(generate(ask(adapter="plain")))
    assert counts() == {"refused": 2, "abort": 1, "error": 1}


async def test_refusals_carry_their_code(running: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(running.engine.admission, "_max_requests", 0)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await running.inference.Generate(pb.GenerateRequest(prompt="x"))
    assert caught.value.code() == Overloaded.code
    labels = {"grpc_type": "unary", "grpc_service": "loraplex.v1.Inference", "grpc_method": "Generate"}
    value = running.metrics.registry.get_sample_value(
        "grpc_server_handled_total", {**labels, "grpc_code": "RESOURCE_EXHAUSTED"}
    )
    assert value == 1

"""--admin-listen: what changes adapters is served at an address of its own."""

import socket
from pathlib import Path

import grpc
import pytest
from click.testing import CliRunner
from grpc_health.v1 import health_pb2, health_pb2_grpc

from server.cli import main
from server.pb.inference import grpc_service_pb2 as open_pb
from server.pb.inference.grpc_service_pb2_grpc import GRPCInferenceServiceStub
from server.pb.loraplex.v1 import adapters_pb2 as pb
from server.pb.loraplex.v1.adapters_pb2_grpc import AdaptersStub
from server.pb.loraplex.v1.inference_pb2_grpc import InferenceStub
from tests.server.rpc.conftest import Serve
from tests.server.rpc.test_inference import ask, failure


async def test_the_first_address_has_no_adapters_service(serve: Serve) -> None:
    async with (
        serve(admin_listen="127.0.0.1:0") as server,
        grpc.aio.insecure_channel(f"127.0.0.1:{server.server.ports[1]}") as admin,
    ):
        loaded = await AdaptersStub(admin).LoadAdapter(pb.LoadAdapterRequest(name="plain"))
        assert (await server.inference.Generate(ask(adapter="plain"))).adapter.generation == loaded.generation
        assert (await InferenceStub(admin).Generate(ask(adapter="plain"))).adapter.generation == loaded.generation
        listing = server.adapters.ListAdapters(pb.ListAdaptersRequest())
        assert (await failure(listing)).code() == grpc.StatusCode.UNIMPLEMENTED
        health = [health_pb2_grpc.HealthStub(channel) for channel in (server.channel, admin)]
        request = health_pb2.HealthCheckRequest(service="loraplex.v1.Adapters")
        assert (await failure(health[0].Check(request))).code() == grpc.StatusCode.NOT_FOUND
        assert (await health[1].Check(request)).status == health_pb2.HealthCheckResponse.SERVING


async def test_the_other_protocol_changes_nothing_there(serve: Serve) -> None:
    async with serve(admin_listen="127.0.0.1:0") as server:
        for call in (
            server.open_inference.RepositoryModelLoad(open_pb.RepositoryModelLoadRequest(model_name="plain")),
            server.open_inference.RepositoryModelUnload(open_pb.RepositoryModelUnloadRequest(model_name="plain")),
        ):
            error = await failure(call)
            assert error.code() == grpc.StatusCode.PERMISSION_DENIED
            assert "--admin-listen" in str(error.details())
        index = await server.open_inference.RepositoryIndex(open_pb.RepositoryIndexRequest(ready=True))
        assert "plain" in {model.name for model in index.models}
        async with grpc.aio.insecure_channel(f"127.0.0.1:{server.server.ports[1]}") as admin:
            request = open_pb.RepositoryModelUnloadRequest(model_name="plain")
            await GRPCInferenceServiceStub(admin).RepositoryModelUnload(request)
        index = await server.open_inference.RepositoryIndex(open_pb.RepositoryIndexRequest(ready=True))
        assert "plain" not in {model.name for model in index.models}


@pytest.mark.parametrize("flag", ["--listen", "--admin-listen"])
def test_an_address_in_use_is_named_with_its_flag(model_dir: Path, flag: str) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        arguments = ["--model", str(model_dir), "--device", "cpu", "--metrics-listen", "", "--listen", "127.0.0.1:0"]
        done = CliRunner().invoke(main, ["serve", *arguments, flag, f"127.0.0.1:{taken.getsockname()[1]}"])
    assert done.exit_code == 2
    assert f"{flag} 127.0.0.1:" in done.output.splitlines()[-1]

"""What the server tells of itself before a run: its model and its adapters."""

from dataclasses import dataclass

import grpc

from loadtest.channel import list_adapters
from server.pb.inference.grpc_service_pb2 import RepositoryIndexRequest
from server.pb.inference.grpc_service_pb2_grpc import GRPCInferenceServiceStub
from server.pb.loraplex.v1.adapters_pb2 import FAILED
from server.pb.loraplex.v1.adapters_pb2_grpc import AdaptersStub
from server.pb.loraplex.v1.inference_pb2 import GetModelInfoRequest, ModelInfo
from server.pb.loraplex.v1.inference_pb2_grpc import InferenceStub

_TIMEOUT = 10.0  # seconds, of a question to the server


class ServerUnreachable(Exception):
    """The server, or its metrics endpoint, does not answer; the message says which and why."""


@dataclass(frozen=True, slots=True)
class ServerFacts:
    """Taken once, before the run: asking during it would be load of its own."""

    model: ModelInfo
    versions: dict[str, str]  # what every NAME that can be served means
    ranks: dict[str, int]  # of every NAME; 0: it was not loaded yet
    changes_adapters: bool = True  # whether the Adapters service is at this address


async def ask_server(channel: grpc.aio.Channel, address: str) -> ServerFacts:
    """
    Raises:
        ServerUnreachable
    """
    try:
        model = await InferenceStub(channel).GetModelInfo(GetModelInfoRequest(), timeout=_TIMEOUT)
        try:
            listed = await list_adapters(AdaptersStub(channel), _TIMEOUT)
        except grpc.aio.AioRpcError as error:
            if error.code() != grpc.StatusCode.UNIMPLEMENTED:
                raise
            return ServerFacts(model, await _indexed(channel, model.name), {}, changes_adapters=False)
    except grpc.aio.AioRpcError as error:
        raise ServerUnreachable(f"no server at {address}: {error.code().name}: {error.details()}") from error
    current = [adapter for adapter in listed if adapter.current and adapter.state != FAILED]
    versions = {adapter.name: adapter.version for adapter in current}
    return ServerFacts(model, versions, {adapter.name: adapter.rank for adapter in current})


async def _indexed(channel: grpc.aio.Channel, base: str) -> dict[str, str]:
    """Adapters as the Open Inference Protocol lists them, each with the last of its versions.

    It is at the address of clients too, where a server with an address for administration has no Adapters service.
    """
    try:
        request = RepositoryIndexRequest(ready=True)
        index = await GRPCInferenceServiceStub(channel).RepositoryIndex(request, timeout=_TIMEOUT)
    except grpc.aio.AioRpcError as error:
        if error.code() != grpc.StatusCode.UNIMPLEMENTED:
            raise
        return {}
    return {model.name: model.version for model in index.models if model.name != base}

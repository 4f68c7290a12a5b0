"""What the server tells of itself before a run: its model and its adapters."""

from dataclasses import dataclass

import grpc

from loadtest.channel import list_adapters
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


async def ask_server(channel: grpc.aio.Channel, address: str) -> ServerFacts:
    """
    Raises:
        ServerUnreachable
    """
    try:
        model = await InferenceStub(channel).GetModelInfo(GetModelInfoRequest(), timeout=_TIMEOUT)
        listed = await list_adapters(AdaptersStub(channel), _TIMEOUT)
    except grpc.aio.AioRpcError as error:
        raise ServerUnreachable(f"no server at {address}: {error.code().name}: {error.details()}") from error
    versions = {adapter.name: adapter.version for adapter in listed if adapter.current and adapter.state != FAILED}
    return ServerFacts(model, versions)

"""What the server tells of itself before a run: its model and its adapters."""

from dataclasses import dataclass

import grpc

from loadtest.channel import list_adapters
from server.pb.loraplex.v1.adapters_pb2 import FAILED, AdapterTier
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
    tiers: dict[str, str]  # of every NAME and NAME@VERSION that can be served: disk, host or device
    versions: dict[str, str]  # what every NAME means


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
    tiers, versions = dict[str, str](), dict[str, str]()
    for adapter in listed:
        if adapter.state == FAILED:
            continue
        tier = AdapterTier.Name(adapter.tier).lower()
        tiers[f"{adapter.name}@{adapter.version}"] = tier
        if adapter.current:
            tiers[adapter.name], versions[adapter.name] = tier, adapter.version
    return ServerFacts(model, tiers, versions)

"""What the server tells of itself: its model and adapters before a run, its memory and queue during one."""

import asyncio
import time
import urllib.request
from dataclasses import dataclass, field

import grpc
from prometheus_client.parser import text_string_to_metric_families

from loadtest.channel import list_adapters
from server.pb.loraplex.v1.adapters_pb2 import FAILED, AdapterTier
from server.pb.loraplex.v1.adapters_pb2_grpc import AdaptersStub
from server.pb.loraplex.v1.inference_pb2 import GetModelInfoRequest, ModelInfo
from server.pb.loraplex.v1.inference_pb2_grpc import InferenceStub

_TIMEOUT = 10.0  # seconds, of a question to the server
_MEMORY = "process_resident_memory_bytes"
_QUEUE = "queue_time_seconds"  # the end of the histogram's name, whatever its prefix


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


@dataclass(slots=True)
class MetricsWatch:
    """Owns the samples of a Prometheus endpoint, one a second."""

    url: str
    memory: list[tuple[float, float]] = field(default_factory=list)  # time.monotonic(), bytes
    _queue: list[tuple[float, float]] = field(default_factory=list)  # sum of seconds, number of requests

    async def sample(self) -> None:
        """
        Raises:
            ServerUnreachable
        """
        try:
            text = await asyncio.to_thread(self._fetch)
            families = list(text_string_to_metric_families(text))
        except (OSError, ValueError) as error:
            raise ServerUnreachable(f"--metrics-url {self.url}: {error}") from error
        values: dict[str, float] = {}  # summed over labels
        for family in families:
            for sample in family.samples:
                values[sample.name] = values.get(sample.name, 0.0) + sample.value
        if _MEMORY in values:
            self.memory.append((time.monotonic(), values[_MEMORY]))
        for name in values:
            if name.endswith(f"{_QUEUE}_sum"):
                self._queue.append((values[name], values[name.removesuffix("_sum") + "_count"]))

    async def run(self) -> None:
        """Samples until cancelled or until the endpoint is gone."""
        try:
            while True:
                await self.sample()
                await asyncio.sleep(1)
        except ServerUnreachable:
            return

    @property
    def mean_queue_seconds(self) -> float | None:
        """Mean time in the server's queue between the first and the last sample; None if the server does not tell."""
        if not self._queue:
            return None
        (first_sum, first_count), (last_sum, last_count) = self._queue[0], self._queue[-1]
        return (last_sum - first_sum) / (last_count - first_count) if last_count > first_count else None

    def _fetch(self) -> str:
        with urllib.request.urlopen(self.url, timeout=_TIMEOUT) as response:
            text: str = response.read().decode()
            return text

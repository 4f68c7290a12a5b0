"""Adapters that are loaded, replaced and unloaded under load, and every operation with its times."""

import asyncio
import contextlib
import itertools
import time
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import grpc

from loadtest.churn_review import ChurnReview, Operation, References, review
from loadtest.client import CallResult, call
from loadtest.generator import Share
from loadtest.schedule import Arrival
from server.pb.loraplex.v1.adapters_pb2 import Adapter, LoadAdapterRequest, UnloadAdapterRequest
from server.pb.loraplex.v1.adapters_pb2_grpc import AdaptersStub
from server.pb.loraplex.v1.inference_pb2_grpc import InferenceStub

_NUM_PROMPTS = 4  # different requests: each needs a reference for each adapter
_MAX_SOURCES = 4
_PREFIX = "loadtest-churn-"


class ChurnError(Exception):
    """Answers cannot be checked; the message says why."""


@dataclass(slots=True)
class Churn:
    """Owns the names that come and go on a server, and what happened to them."""

    names: tuple[str, ...]
    sources: tuple[tuple[str, str], ...]  # name and version of the stored adapters that they are loaded from in turn
    timeout: float  # seconds, of every call
    operations: list[Operation] = field(default_factory=list)
    _folders: dict[str, str] = field(default_factory=dict)  # of the sources, with their digests
    _references: References = field(default_factory=dict)

    @classmethod
    def of(cls, count: int, versions: Mapping[str, str], timeout: float) -> "Churn":
        """Names for `count` adapters on a server that has others, given with their versions."""
        names = tuple(f"{_PREFIX}{index}" for index in range(count))
        sources = [item for item in versions.items() if not item[0].startswith(_PREFIX)]
        return cls(names, tuple(sources[:_MAX_SOURCES]), timeout)

    def shape(self, arrivals: Iterable[Arrival]) -> tuple[Arrival, ...]:
        """The same arrivals with few different requests, so that each has a reference."""
        patterns: dict[int, Arrival] = {}
        shaped = []
        for arrival in arrivals:
            prompt = arrival.prompt % _NUM_PROMPTS
            pattern = patterns.setdefault(prompt, arrival)
            shaped.append(replace(pattern, due=arrival.due, adapter=arrival.adapter, prompt=prompt))
        return tuple(shaped)

    @contextlib.asynccontextmanager
    async def going_on(self, channel: grpc.aio.Channel, share: Share, period: float) -> AsyncIterator[None]:
        """Takes a reference of every request, alone; then, while the block runs, does an operation every `period` s.

        In the end, whatever it is, the names are off the server.

        Raises:
            grpc.aio.AioRpcError: the server refuses to load.
            ChurnError: a request failed though nothing else ran.
        """
        adapters, over = AdaptersStub(channel), asyncio.Event()
        try:
            await self._prepare(adapters, InferenceStub(channel), share)
            operating = asyncio.create_task(self._operate(adapters, period, over))
            try:
                yield
            finally:
                over.set()
                await operating
        finally:
            for name in self.names:
                await self._do(adapters, "unload", name, "")

    async def _prepare(self, adapters: AdaptersStub, inference: InferenceStub, share: Share) -> None:
        """Takes the references, and loads every name."""
        different = {(arrival.adapter, arrival.prompt): arrival for arrival in share.arrivals}.values()
        come_and_go = {arrival.prompt: arrival for arrival in different if arrival.adapter in self.names}.values()
        for source in self.sources:
            await self._load_source(adapters, *source)
            for arrival in come_and_go:
                await self._refer(inference, share, replace(arrival, adapter=self.names[0]), source[0])
        for name in self.names:
            await self._do(adapters, "replace", name, next(iter(self._folders)))
        for arrival in different:
            if arrival.adapter not in self.names:
                await self._refer(inference, share, arrival, arrival.adapter)

    async def _refer(self, inference: InferenceStub, share: Share, arrival: Arrival, adapter: str) -> None:
        result = await call(inference, share.request(arrival), time.monotonic(), self.timeout)
        if not result.ok:
            raise ChurnError(
                f"request {arrival.prompt} to adapter {adapter!r} failed before the churn began, so nothing can be "
                f"checked against it: {result.code}: {result.details}"
            )
        self._references[result.digest, arrival.prompt] = result.token_ids

    async def _operate(self, adapters: AdaptersStub, period: float, over: asyncio.Event) -> None:
        """Name after name is replaced twice, unloaded, loaded; every time from another source than before."""
        folders = list(self._folders)
        sources = {name: itertools.cycle(folders[1:] + folders[:1]) for name in self.names}
        kinds = itertools.cycle(("replace", "replace", "unload", "load"))
        wanted = time.monotonic()
        for kind, name in ((kind, name) for kind in kinds for name in self.names):
            wanted += period
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(over.wait(), max(0.0, wanted - time.monotonic()))
            if over.is_set():
                return
            await self._do(adapters, kind, name, "" if kind == "unload" else next(sources[name]))

    async def _load_source(self, stub: AdaptersStub, adapter: str, version: str) -> None:
        """Loads the first name from another adapter's folder, which is flat or holds versions."""
        request = LoadAdapterRequest(name=self.names[0], source=f"{adapter}/{version}", replace=True)
        try:
            loaded: Adapter = await stub.LoadAdapter(request, timeout=self.timeout)
        except grpc.aio.AioRpcError:
            request.source = adapter
            loaded = await stub.LoadAdapter(request, timeout=self.timeout)
        self._folders[request.source] = loaded.digest

    async def _do(self, stub: AdaptersStub, kind: str, name: str, source: str) -> None:
        asked = time.monotonic()
        try:
            if kind == "unload":
                await stub.UnloadAdapter(UnloadAdapterRequest(name=name), timeout=self.timeout)
                done = Operation(kind, name, asked, time.monotonic())
            else:
                request = LoadAdapterRequest(name=name, source=source, replace=kind == "replace")
                loaded = await stub.LoadAdapter(request, timeout=self.timeout)
                done = Operation(kind, name, asked, time.monotonic(), loaded.generation, loaded.digest)
        except grpc.aio.AioRpcError as error:
            gone = kind == "unload" and error.code() == grpc.StatusCode.NOT_FOUND
            text = "" if gone else f"{kind} {name}: {error.code().name}: {error.details()}"
            done = Operation(kind, name, asked, time.monotonic(), error=text)
        self.operations.append(done)

    def review(self, results: Sequence[CallResult]) -> ChurnReview:
        """Holds every answer against what happened."""
        return review(results, self.names, self.operations, self._references, set(self._folders.values()))

"""Adapters that are loaded, replaced and unloaded under load, and the check that no request noticed.

Every operation is written down with the time it was asked for and the time it was answered. Afterwards each answer must
name weights that held the name at some moment between its sending and its first token, name the same weights in every
message, and hold exactly the tokens that these weights gave when nothing else ran.
"""

import asyncio
import contextlib
import itertools
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import grpc

from loadtest.client import CallResult, call
from loadtest.generator import make_request
from loadtest.histogram import percentile
from loadtest.schedule import Arrival
from server.pb.loraplex.v1.adapters_pb2 import Adapter, LoadAdapterRequest, UnloadAdapterRequest
from server.pb.loraplex.v1.adapters_pb2_grpc import AdaptersStub
from server.pb.loraplex.v1.inference_pb2_grpc import InferenceStub

_NUM_PROMPTS = 4  # different requests to adapters that come and go: each needs a reference for each source
_MAX_SOURCES = 4
_PREFIX = "loadtest-churn-"


class ChurnError(Exception):
    """Answers cannot be checked; the message says why."""


@dataclass(frozen=True, slots=True)
class Operation:
    """One call to the Adapters service; times by time.monotonic()."""

    kind: str  # load, replace or unload
    name: str
    asked: float
    answered: float
    generation: int = 0  # now under the name; 0 after an unload
    digest: str = ""
    error: str = ""


@dataclass(slots=True)
class Churn:
    """Owns the names that come and go on a server, and what happened to them."""

    names: tuple[str, ...]
    sources: tuple[tuple[str, str], ...]  # name and version of the stored adapters that they are loaded from in turn
    seed: int
    operations: list[Operation] = field(default_factory=list)
    _folders: list[str] = field(default_factory=list)  # of the sources
    _references: dict[tuple[str, int], tuple[int, ...]] = field(default_factory=dict)  # (digest, prompt) -> tokens

    @classmethod
    def of(cls, count: int, versions: Mapping[str, str], seed: int) -> "Churn":
        """Names for `count` adapters on a server that has others, given with their versions."""
        names = tuple(f"{_PREFIX}{index}" for index in range(count))
        sources = [item for item in versions.items() if not item[0].startswith(_PREFIX)]
        return cls(names, tuple(sources[:_MAX_SOURCES]), seed)

    def shape(self, arrivals: Iterable[Arrival]) -> tuple[Arrival, ...]:
        """The same arrivals, with few different requests to names that come and go, so that each has a reference."""
        shaped, patterns = [], dict[int, Arrival]()
        for arrival in arrivals:
            if arrival.adapter in self.names:
                pattern = patterns.setdefault(arrival.prompt % _NUM_PROMPTS, arrival)
                arrival = replace(
                    pattern, due=arrival.due, adapter=arrival.adapter, prompt=arrival.prompt % _NUM_PROMPTS
                )
            shaped.append(arrival)
        return tuple(shaped)

    async def prepare(self, channel: grpc.aio.Channel, arrivals: Iterable[Arrival], vocab_size: int) -> None:
        """Takes the reference of every request on every source, alone, and loads every name.

        Raises:
            grpc.aio.AioRpcError: the server refuses to load.
            ChurnError: a request failed though nothing else ran.
        """
        adapters, inference = AdaptersStub(channel), InferenceStub(channel)
        different = {arrival.prompt: arrival for arrival in arrivals if arrival.adapter in self.names}
        for source in self.sources:
            loaded = await self._load_source(adapters, *source)
            for prompt, arrival in different.items():
                request = make_request(replace(arrival, adapter=self.names[0]), self.seed, vocab_size)
                result = await call(inference, request, time.monotonic())
                if not result.ok:
                    raise ChurnError(
                        f"request {prompt} to adapter {source[0]!r} failed before the churn began, so nothing can be "
                        f"checked against it: {result.code}: {result.details}"
                    )
                self._references[loaded.digest, prompt] = result.token_ids
        for name in self.names:
            await self._do(adapters, "replace", name, self._folders[0])

    async def run(self, channel: grpc.aio.Channel, period: float, over: asyncio.Event) -> None:
        """One operation every `period` seconds until `over`: name after name is replaced twice, unloaded, loaded."""
        adapters = AdaptersStub(channel)
        sources = itertools.cycle(self._folders[1:] + self._folders[:1])
        kinds = itertools.cycle(("replace", "replace", "unload", "load"))
        wanted = time.monotonic()
        for kind, name in ((kind, name) for kind in kinds for name in self.names):
            wanted += period
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(over.wait(), max(0.0, wanted - time.monotonic()))
            if over.is_set():
                return
            await self._do(adapters, kind, name, next(sources))

    async def clear(self, channel: grpc.aio.Channel) -> None:
        """Takes the names off the server again."""
        adapters = AdaptersStub(channel)
        for name in self.names:
            await self._do(adapters, "unload", name, "")

    async def _load_source(self, stub: AdaptersStub, adapter: str, version: str) -> Adapter:
        """Loads the first name from another adapter's folder, which is flat or holds versions."""
        request = LoadAdapterRequest(name=self.names[0], source=f"{adapter}/{version}", replace=True)
        try:
            loaded: Adapter = await stub.LoadAdapter(request)
        except grpc.aio.AioRpcError:
            request.source = adapter
            loaded = await stub.LoadAdapter(request)
        self._folders.append(request.source)
        return loaded

    async def _do(self, stub: AdaptersStub, kind: str, name: str, source: str) -> None:
        asked = time.monotonic()
        try:
            if kind == "unload":
                await stub.UnloadAdapter(UnloadAdapterRequest(name=name))
                done = Operation(kind, name, asked, time.monotonic())
            else:
                request = LoadAdapterRequest(name=name, source=source, replace=kind == "replace")
                loaded = await stub.LoadAdapter(request)
                done = Operation(kind, name, asked, time.monotonic(), loaded.generation, loaded.digest)
        except grpc.aio.AioRpcError as error:
            gone = kind == "unload" and error.code() == grpc.StatusCode.NOT_FOUND
            text = "" if gone else f"{kind} {name}: {error.code().name}: {error.details()}"
            done = Operation(kind, name, asked, time.monotonic(), error=text)
        self.operations.append(done)

    def review(self, results: Sequence[CallResult]) -> "ChurnReview":
        """Holds every answer of the names that come and go against the operations."""
        faults = [operation.error for operation in self.operations if operation.error]
        checked, refused = 0, set()
        for index, result in enumerate(results):
            if result.adapter not in self.names:
                continue
            checked += 1
            history = [operation for operation in self.operations if operation.name == result.adapter]
            if result.code == "NOT_FOUND" and _was_absent(history, result):
                refused.add(index)
            elif fault := self._fault(history, result):
                faults.append(f"{result.adapter}, request {result.request_id}: {fault}")
        return ChurnReview(checked, frozenset(refused), tuple(faults), tuple(self.operations))

    def _fault(self, history: list[Operation], result: CallResult) -> str:
        if not result.ok:
            return f"failed with {result.code}: {result.details}"
        if not result.same_weights:
            return "its messages name different generations"
        written = [index for index, operation in enumerate(history) if operation.generation == result.generation]
        if not written:
            return f"generation {result.generation} never had the name"
        first_token = result.due + (result.first_token or result.total)
        asked, until = history[written[0]].asked, _answered(history, written[0] + 1)
        if not (asked <= first_token and until >= result.due + result.lateness):
            return f"generation {result.generation} did not have the name between the request and its first token"
        if result.digest != history[written[0]].digest:
            return f"generation {result.generation} answered with digest {result.digest[:12]}"
        if result.token_ids != self._references[result.digest, int(result.request_id)]:
            return f"tokens are not those of generation {result.generation} alone"
        return ""


@dataclass(frozen=True, slots=True)
class ChurnReview:
    """What the check found."""

    checked: int
    refused: frozenset[int]  # indices of results that rightly were NOT_FOUND: the name was away
    faults: tuple[str, ...]
    operations: tuple[Operation, ...]

    def summary(self) -> dict[str, Any]:
        """For the report."""
        kinds: dict[str, list[float]] = {}
        for operation in self.operations:
            kinds.setdefault(operation.kind, []).append(operation.answered - operation.asked)
        return {
            "checked": self.checked,
            "refused_while_unloaded": len(self.refused),
            "faults": list(self.faults),
            "operations": {
                kind: {"count": len(seconds), "p50": percentile(seconds, 50), "max": max(seconds)}
                for kind, seconds in sorted(kinds.items())
            },
        }


def _answered(history: list[Operation], index: int) -> float:
    return history[index].answered if index < len(history) else float("inf")


def _was_absent(history: list[Operation], result: CallResult) -> bool:
    """Whether the name was away at some moment of a request's life."""
    return any(
        operation.kind == "unload"
        and operation.asked <= result.ended
        and _answered(history, index + 1) >= result.due + result.lateness
        for index, operation in enumerate(history)
    )

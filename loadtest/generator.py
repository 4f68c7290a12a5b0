"""Sends a schedule from one process, open or closed loop, and watches its own punctuality."""

import asyncio
import contextlib
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from loadtest.channel import connect
from loadtest.client import CallResult, call
from loadtest.schedule import Arrival
from server.pb.loraplex.v1.inference_pb2 import GenerateRequest, SamplingParams, TokenIds
from server.pb.loraplex.v1.inference_pb2_grpc import InferenceStub

GIVE_UP_AFTER = 10  # answers UNAVAILABLE in a row: the server is gone
_LAG_PERIOD = 0.02  # seconds between two looks at the event loop


@dataclass(frozen=True, slots=True)
class Share:
    """What one process sends. Picklable."""

    address: str
    arrivals: tuple[Arrival, ...]
    concurrency: int  # requests at a time; 0: open loop
    seed: int
    vocab_size: int
    timeout: float  # seconds, of every call
    ca: str = ""  # see `connect`
    cache_salt: str = ""  # of the run: its prompts are not in the server's prefix cache yet, whatever ran before

    def request(self, arrival: Arrival) -> GenerateRequest:
        """A greedy request of exactly the arrival's lengths; the tokens of its prompt are random, always the same."""
        random = np.random.default_rng((self.seed, arrival.prompt))
        ids = random.integers(0, self.vocab_size, arrival.prompt_tokens)
        return GenerateRequest(
            adapter=arrival.adapter,
            prompt_token_ids=TokenIds(ids=ids.tolist()),
            sampling=SamplingParams(max_tokens=arrival.output_tokens, ignore_eos=True),
            request_id=str(arrival.prompt),
            cache_salt=self.cache_salt,
        )


@dataclass(slots=True)
class Progress:
    """Counts so far, for the live line."""

    sent: int = 0
    done: int = 0
    failed: int = 0
    tokens: int = 0

    def __add__(self, other: "Progress") -> "Progress":
        return Progress(
            self.sent + other.sent, self.done + other.done, self.failed + other.failed, self.tokens + other.tokens
        )


@dataclass(frozen=True, slots=True)
class Outcome:
    """What one process measured."""

    results: tuple[CallResult, ...]
    lags: tuple[float, ...]  # seconds by which the event loop woke up late
    cpu_share: float  # of one core
    unsent: int  # arrivals that were never sent, because the run ended before
    cut: int  # requests that ran when the run ended before
    ended: float  # time.monotonic() when nothing ran any more
    server_lost: str = ""  # what the server's end looked like from here; empty: it was there all the time
    process_lost: bool = False  # it ended early; what it measured is among `cut`


class LoadGenerator:
    """Owns the calls of one share. Requests are made ahead; while the clock runs there is only sending and stamping."""

    def __init__(self, share: Share, progress: Progress, stop: asyncio.Event) -> None:
        self._share = share
        self._requests = [share.request(arrival) for arrival in share.arrivals]
        self._start = 0.0
        self._progress = progress
        self._stop = stop
        self._results: list[CallResult] = []
        self._calls: set[asyncio.Task[None]] = set()
        self._lags: list[float] = []
        self._unavailable_in_a_row = 0
        self._server_lost = ""

    async def run(self, start: float) -> Outcome:
        """Sends everything and waits for the answers, or until `stop` is set or the server is lost.

        Args:
            start: second 0 of the schedule, by time.monotonic().
        """
        self._start = start
        async with connect(self._share.address, Path(self._share.ca) if self._share.ca else None) as channel:
            stub = InferenceStub(channel)
            await asyncio.sleep(start - time.monotonic())
            started, cpu = time.monotonic(), time.process_time()
            watch = asyncio.create_task(self._watch_event_loop())
            load = asyncio.create_task(self._closed(stub) if self._share.concurrency else self._open(stub))
            stopped = asyncio.create_task(self._stop.wait())
            await asyncio.wait({load, stopped}, return_when=asyncio.FIRST_COMPLETED)
            ended = time.monotonic()
            cpu_share = (time.process_time() - cpu) / (ended - started)
            cut = self._progress.sent - self._progress.done
            for task in (watch, load, stopped, *self._calls):
                task.cancel()
            endings = await asyncio.gather(watch, load, stopped, *self._calls, return_exceptions=True)
        for ending in endings:
            if isinstance(ending, Exception):
                raise ending
        return Outcome(
            results=tuple(self._results),
            lags=tuple(self._lags),
            cpu_share=cpu_share,
            unsent=len(self._requests) - self._progress.sent,
            cut=cut,
            ended=ended,
            server_lost=self._server_lost,
        )

    async def _open(self, stub: InferenceStub) -> None:
        for arrival, request in zip(self._share.arrivals, self._requests, strict=True):
            due = self._start + arrival.due
            if (delay := due - time.monotonic()) > 0:
                await asyncio.sleep(delay)
            task = asyncio.create_task(self._call(stub, request, due))
            self._calls.add(task)
            task.add_done_callback(self._calls.discard)
        await asyncio.gather(*self._calls)

    async def _closed(self, stub: InferenceStub) -> None:
        waiting = iter(self._requests)

        async def work() -> None:
            for request in waiting:
                await self._call(stub, request, time.monotonic())

        await asyncio.gather(*[work() for _ in range(self._share.concurrency)])

    async def _call(self, stub: InferenceStub, request: GenerateRequest, due: float) -> None:
        self._progress.sent += 1
        result = await call(stub, request, due, self._share.timeout)
        self._results.append(result)
        self._progress.done += 1
        self._progress.failed += not result.ok
        self._progress.tokens += result.num_tokens
        if result.code != "UNAVAILABLE":
            self._unavailable_in_a_row = 0
            return
        self._unavailable_in_a_row += 1
        if self._unavailable_in_a_row >= GIVE_UP_AFTER and not self._server_lost:
            self._server_lost = f"the server was lost {result.ended - self._start:.1f} s into the run: {result.details}"
            self._stop.set()

    async def _watch_event_loop(self) -> None:
        with contextlib.suppress(asyncio.CancelledError):
            while True:
                wanted = time.monotonic() + _LAG_PERIOD
                await asyncio.sleep(_LAG_PERIOD)
                self._lags.append(time.monotonic() - wanted)

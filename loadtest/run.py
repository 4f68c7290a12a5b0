"""One run from end to end: ask the server, draw the schedule, send it, watch, and hand back what was measured."""

import asyncio
import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.live import Live
from rich.text import Text

from loadtest.channel import connect
from loadtest.churn import Churn
from loadtest.environment import server_environment
from loadtest.generator import Progress, Share
from loadtest.measurement import Measurement, Slo
from loadtest.observer import MetricsWatch, ServerFacts, ServerUnreachable, ask_server
from loadtest.processes import Load
from loadtest.schedule import make_schedule
from loadtest.workload import Workload, WorkloadError

_LIVE_PERIOD = 0.25  # seconds between two live lines


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """The server under test, and how to reach it."""

    address: str
    ca: str = ""  # see `connect`
    adapters: tuple[str, ...] = ()  # names of adapters 0, 1, …; empty: as many as needed of those the server lists
    metrics_url: str = ""
    processes: int = 1
    timeout: float = 300.0  # seconds, of every request


async def measure(
    target: Target, label: str, workload: Workload, slo: Slo, stop: asyncio.Event, console: Console
) -> Measurement:
    """Runs a workload until its end, until `stop`, or until the server is lost.

    Raises:
        ServerUnreachable, WorkloadError, LoadProcessError, ChurnError.
        grpc.aio.AioRpcError: the server refuses the adapters of a churn.
    """
    async with connect(target.address, Path(target.ca) if target.ca else None) as channel:
        facts = await ask_server(channel, target.address)
        churn = Churn.of(workload.churn_adapters, facts.versions, workload.seed) if workload.churn_seconds else None
        schedule = make_schedule(workload, _adapter_names(workload, target, facts, churn), facts.model.max_model_len)
        arrivals = schedule.arrivals
        if churn:
            arrivals = churn.shape(arrivals)
            await churn.prepare(channel, arrivals, facts.model.vocab_size)
        share = Share(
            target.address,
            arrivals,
            workload.concurrency,
            workload.seed,
            facts.model.vocab_size,
            target.timeout,
            target.ca,
        )
        load = Load(share, target.processes, stop)
        watch = MetricsWatch(target.metrics_url)
        if target.metrics_url:
            await watch.sample()
        over = asyncio.Event()
        churning = asyncio.create_task(churn.run(channel, workload.churn_seconds, over)) if churn else None
        watching = asyncio.create_task(watch.run()) if target.metrics_url else None
        with _live(console, load, len(arrivals)):
            outcomes = await load.run()
        wall = time.monotonic() - load.start
        over.set()
        if churn and churning:
            await churning
            await churn.clear(channel)
        if watching:
            watching.cancel()
            with contextlib.suppress(ServerUnreachable):
                await watch.sample()
    results = sorted((result for outcome in outcomes for result in outcome.results), key=lambda result: result.due)
    return Measurement(
        label=label,
        workload=workload,
        slo=slo,
        outcomes=outcomes,
        results=results,
        start=load.start,
        wall=wall,
        unplayed=schedule.unplayed,
        dropped=schedule.dropped,
        server=server_environment(facts.model),
        tiers=facts.tiers,
        memory=watch.memory,
        mean_queue_seconds=watch.mean_queue_seconds,
        churn=churn.review(results) if churn else None,
        interrupted=stop.is_set() and not any(outcome.server_lost for outcome in outcomes),
    )


def _adapter_names(workload: Workload, target: Target, facts: ServerFacts, churn: Churn | None) -> list[str]:
    if target.adapters:
        return list(target.adapters)
    come_and_go = list(churn.names) if churn else []
    if churn and not churn.sources:
        raise WorkloadError("churn needs an adapter on the server to load from")
    names = come_and_go + [name for name in facts.versions if name not in come_and_go]
    wanted = workload.num_adapters if workload.num_adapters >= 0 else max(1, len(names))
    if len(names) < wanted:
        raise WorkloadError(
            f"num_adapters is {workload.num_adapters}, and the server has {len(names)}: "
            "lower --num-adapters (0: the base model), or name them with --adapters"
        )
    return names[:wanted]


def live_line(elapsed: float | None, count: Progress, total: int, tokens_per_second: float) -> str:
    """How it goes, `elapsed` seconds from second 0; None: the load processes are not ready."""
    if elapsed is None:
        return "starting"
    return (
        f"{max(0.0, elapsed):6.1f} s   sent {count.sent:,} of {total:,}   running {count.sent - count.done:,}   "
        f"done {count.done:,}   failed {count.failed:,}   {tokens_per_second:,.0f} tokens/s"
    )


@contextlib.contextmanager
def _live(console: Console, load: Load, total: int) -> Iterator[None]:
    """A line that says how it goes, on a terminal, while the block runs."""
    if not console.is_terminal:
        yield
        return
    with Live(console=console, transient=True, auto_refresh=False) as live:

        async def show() -> None:
            before, tokens = time.monotonic(), 0
            while True:
                await asyncio.sleep(_LIVE_PERIOD)
                now, count = time.monotonic(), load.progress
                elapsed = now - load.start if load.start else None
                live.update(
                    Text(live_line(elapsed, count, total, (count.tokens - tokens) / (now - before))), refresh=True
                )
                before, tokens = now, count.tokens

        task = asyncio.get_running_loop().create_task(show())
        try:
            yield
        finally:
            task.cancel()

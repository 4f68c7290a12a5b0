"""One run from end to end: ask the server, draw the schedule, send it, watch, and hand back what was measured."""

import asyncio
import contextlib
import uuid
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from loadtest.channel import connect
from loadtest.churn import Churn
from loadtest.environment import server_environment
from loadtest.generator import Share
from loadtest.live import live
from loadtest.measurement import Measurement, Slo
from loadtest.metrics_watch import MetricsWatch
from loadtest.observer import ServerFacts, ask_server
from loadtest.processes import Load
from loadtest.schedule import make_schedule
from loadtest.workload import Workload, WorkloadError


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
        churn = Churn.of(workload.churn_adapters, facts.versions, target.timeout) if workload.churn_seconds else None
        schedule = make_schedule(workload, _adapter_names(workload, target, facts, churn), facts.model.max_model_len)
        share = Share(
            target.address,
            churn.shape(schedule.arrivals) if churn else schedule.arrivals,
            workload.concurrency,
            workload.seed,
            facts.model.vocab_size,
            target.timeout,
            target.ca,
            cache_salt=uuid.uuid4().hex,
        )
        load = Load(share, target.processes, stop)
        watch = MetricsWatch(target.metrics_url)
        async with (
            churn.going_on(channel, share, workload.churn_seconds) if churn else contextlib.nullcontext(),
            watch.going_on(),
        ):
            with live(console, load, len(share.arrivals)):
                outcomes = await load.run()
    if watch.missed:
        console.print(f"warning: {watch.missed}", style="yellow")
    results = sorted((result for outcome in outcomes for result in outcome.results), key=lambda result: result.due)
    return Measurement(
        label=label,
        workload=workload,
        slo=slo,
        outcomes=outcomes,
        results=results,
        start=load.start,
        wall=max(outcome.ended for outcome in outcomes) - load.start,
        unplayed=schedule.unplayed,
        dropped=schedule.dropped,
        server=server_environment(facts.model),
        settings=dict(sorted(facts.model.settings.items())),
        memory=watch.memory,
        metrics_missed=watch.missed,
        mean_queue_seconds=watch.mean_queue_seconds,
        churn=churn.review(results) if churn else None,
        interrupted=stop.is_set() and not any(outcome.server_lost for outcome in outcomes),
    )


def _adapter_names(workload: Workload, target: Target, facts: ServerFacts, churn: Churn | None) -> list[str]:
    names = list(target.adapters or facts.versions)
    if churn:
        if not churn.sources:
            raise WorkloadError("churn needs an adapter on the server to load from")
        if not workload.num_adapters and not target.adapters:
            raise WorkloadError("num_adapters is 0: a churn needs requests to the adapters that come and go")
        names = [*churn.names, *(name for name in names if name not in churn.names)]
    if target.adapters:
        return names
    wanted = workload.num_adapters if workload.num_adapters >= 0 else max(1, len(names))
    if len(names) < wanted:
        raise WorkloadError(
            f"num_adapters is {workload.num_adapters}, and the server has {len(names)}: "
            "lower --num-adapters (0: the base model), or name them with --adapters"
        )
    return names[:wanted]

"""One run from end to end: ask the server, draw the schedule, send it, watch, and hand back what was measured."""

import asyncio
import contextlib
import itertools
import uuid
from dataclasses import dataclass
from pathlib import Path

import grpc
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
from loadtest.ranks import choose_by_rank, describe
from loadtest.schedule import make_schedule
from loadtest.workload import Workload, WorkloadError
from server.pb.loraplex.v1.adapters_pb2_grpc import AdaptersStub


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
        adapters = await _adapters(channel, workload, target, facts, churn)
        schedule = make_schedule(workload, list(adapters), facts.model.max_model_len)
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
        prompt_tokens={str(arrival.prompt): arrival.prompt_tokens for arrival in share.arrivals},
        start=load.start,
        wall=max(outcome.ended for outcome in outcomes) - load.start,
        unplayed=schedule.unplayed,
        dropped=schedule.dropped,
        server={**server_environment(facts.model), "adapters_in_use": describe(adapters.values())},
        settings=dict(sorted(facts.model.settings.items())),
        memory=watch.memory,
        metrics_missed=watch.missed,
        mean_queue_seconds=watch.mean_queue_seconds,
        churn=churn.review(results) if churn else None,
        interrupted=stop.is_set() and not any(outcome.server_lost for outcome in outcomes),
    )


async def _adapters(
    channel: grpc.aio.Channel, workload: Workload, target: Target, facts: ServerFacts, churn: Churn | None
) -> dict[str, int]:
    """The adapters that requests may name, the most popular first, with their ranks; 0: unknown."""
    admin = f"--admin-listen as --address: there is no Adapters service at {target.address}"
    if workload.ranks and target.adapters:
        raise WorkloadError("ranks choose among the server's adapters, and --adapters names them: leave one out")
    if workload.ranks and not facts.changes_adapters:
        raise WorkloadError(f"ranks are told by the Adapters service: give the server's {admin}")
    if churn and not facts.changes_adapters:
        raise WorkloadError(f"churn needs the Adapters service: give the server's {admin}")
    if churn and not churn.sources:
        raise WorkloadError("churn needs an adapter on the server to load from")
    if churn and not workload.num_adapters and not target.adapters:
        raise WorkloadError("num_adapters is 0: a churn needs requests to the adapters that come and go")
    come_and_go = dict.fromkeys(churn.names, 0) if churn else {}
    if target.adapters:
        return come_and_go | {name: facts.ranks.get(name, 0) for name in target.adapters}
    if workload.ranks:
        chosen = await choose_by_rank(AdaptersStub(channel), facts.ranks, workload.ranks, workload.num_adapters)
        return come_and_go | chosen
    listed = come_and_go | {name: facts.ranks.get(name, 0) for name in facts.versions}
    wanted = workload.num_adapters if workload.num_adapters >= 0 else max(1, len(listed))
    if len(listed) < wanted:
        raise WorkloadError(
            f"num_adapters is {workload.num_adapters}, and the server has {len(listed)}: "
            "lower --num-adapters (0: the base model), or name them with --adapters"
        )
    return dict(itertools.islice(listed.items(), wanted))

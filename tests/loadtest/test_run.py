"""Short runs against the real server with the tiny model."""

import asyncio
from dataclasses import replace
from io import StringIO
from typing import Any

import pytest
from rich.console import Console

from loadtest.generator import Outcome
from loadtest.measurement import Measurement, Slo
from loadtest.named import WORKLOADS
from loadtest.processes import Load
from loadtest.report import summarize
from loadtest.run import Target, measure
from loadtest.workload import Workload, WorkloadError
from tests.conftest import ADAPTERS
from tests.server.rpc.conftest import Running, Serve

SHORT = replace(WORKLOADS["slora-short"][1], num_adapters=8, prompt_tokens=(2, 8), output_tokens=(2, 8))


async def load(server: Running, workload: Workload, **target: Any) -> Measurement:
    to = Target(**{"address": server.address, **target})
    return await measure(to, "run", workload, Slo(), asyncio.Event(), Console(file=StringIO()))


async def test_an_open_loop(running: Running) -> None:
    measured = await load(running, replace(SHORT, rate=20, duration=1.5))
    summary = summarize(measured)
    assert summary["codes"] == {"OK": 30}
    wanted = {result.request_id: result.num_tokens for result in measured.results}
    assert len(wanted) == 30
    assert all(2 <= count < 8 for count in wanted.values())
    assert all(result.generation and result.digest for result in measured.results)
    tiers = summary["tiers"]
    assert tiers["cold"]["count"] >= len({result.adapter for result in measured.results}), "none was in memory before"
    assert sum(spread["count"] for spread in tiers.values()) == 30
    assert tiers["hot"]["count"]
    assert "LlamaForCausalLM" in measured.server["model"]
    assert measured.settings["max-num-seqs"] == "16"


async def test_adapters_come_and_go_and_no_request_notices(running: Running) -> None:
    workload = replace(SHORT, num_requests=80, concurrency=6, num_adapters=4, churn_seconds=0.02, churn_adapters=2)
    measured = await load(running, workload)
    assert measured.churn is not None
    assert measured.churn.faults == ()
    assert measured.churn.warning == ""
    assert measured.churn.checked >= 20
    assert measured.churn.bystanders >= 20
    assert len(measured.churn.operations) >= 6
    assert len({result.digest for result in measured.results if result.adapter.startswith("loadtest-churn")}) > 2


async def test_named_adapters_are_the_bystanders_of_a_churn(running: Running) -> None:
    workload = replace(SHORT, num_requests=40, concurrency=4, num_adapters=0, churn_seconds=0.02)
    measured = await load(running, workload, adapters=("plain", "dora"))
    assert measured.churn is not None
    assert measured.churn.faults == ()
    assert {result.adapter for result in measured.results} == {"loadtest-churn-0", "loadtest-churn-1", "plain", "dora"}


async def test_a_churn_that_nobody_asks_is_refused(running: Running) -> None:
    with pytest.raises(WorkloadError, match="num_adapters is 0: a churn needs requests to the adapters that come"):
        await load(running, replace(SHORT, num_adapters=0, churn_seconds=0.02))


async def test_a_run_finds_nothing_of_an_earlier_one_in_the_prefix_cache(running: Running) -> None:
    workload = replace(SHORT, num_requests=8, concurrency=2, num_adapters=1, prompt_tokens=(40, 41))
    first, second = [await load(running, workload) for _ in range(2)]
    assert {r.request_id: r.token_ids for r in first.results} == {r.request_id: r.token_ids for r in second.results}
    assert not running.metrics.hit_tokens._value.get()


async def test_the_time_of_a_run_is_that_of_its_load(running: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Load.run

    async def end_slowly(load: Load) -> list[Outcome]:
        outcomes = await run(load)
        await asyncio.sleep(0.5)  # processes are joined, results unpickled
        return outcomes

    monkeypatch.setattr(Load, "run", end_slowly)
    measured = await load(running, replace(SHORT, num_requests=4, rate=100))
    ended = max(result.ended for result in measured.results) - measured.start
    assert ended <= measured.wall < ended + 0.4


async def test_the_address_of_clients_alone(serve: Serve) -> None:
    """Where the server has another for administration, adapters are listed by the Open Inference Protocol."""
    workload = replace(SHORT, num_requests=24, concurrency=4, num_adapters=len(ADAPTERS), popularity="distinct")
    async with serve(admin_listen="127.0.0.1:0") as server:
        measured = await load(server, workload)
        with pytest.raises(WorkloadError, match="churn needs the Adapters service: give the server's --admin-listen"):
            await load(server, replace(SHORT, churn_seconds=0.02))
        with pytest.raises(WorkloadError, match="ranks are told by the Adapters service"):
            await load(server, replace(SHORT, ranks=(8,)))
    assert {result.adapter for result in measured.results if result.ok} == {*ADAPTERS}

"""Short runs against the real server with the tiny model."""

import asyncio
from dataclasses import replace
from io import StringIO

from rich.console import Console

from loadtest.generator import Progress
from loadtest.measurement import Measurement, Slo
from loadtest.named import WORKLOADS
from loadtest.report import summarize
from loadtest.run import Target, live_line, measure
from loadtest.workload import Workload
from tests.server.rpc.conftest import Running

SHORT = replace(WORKLOADS["slora-short"][1], num_adapters=8, prompt_tokens=(2, 8), output_tokens=(2, 8))


async def load(server: Running, workload: Workload) -> Measurement:
    target = Target(address=server.address)
    return await measure(target, "run", workload, Slo(), asyncio.Event(), Console(file=StringIO()))


async def test_an_open_loop(running: Running) -> None:
    measured = await load(running, replace(SHORT, rate=20, duration=1.5))
    summary = summarize(measured)
    assert summary["codes"] == {"OK": 30}
    wanted = {result.request_id: result.num_tokens for result in measured.results}
    assert len(wanted) == 30
    assert all(2 <= count < 8 for count in wanted.values())
    assert all(result.generation and result.digest for result in measured.results)
    assert set(measured.tiers.values()) <= {"disk", "host", "device"}
    assert "LlamaForCausalLM" in measured.server["model"]


async def test_adapters_come_and_go_and_no_request_notices(running: Running) -> None:
    workload = replace(SHORT, num_requests=80, concurrency=6, num_adapters=4, churn_seconds=0.02, churn_adapters=2)
    measured = await load(running, workload)
    assert measured.churn is not None
    assert measured.churn.faults == ()
    assert measured.churn.checked >= 20
    assert len(measured.churn.operations) >= 6
    assert len({result.digest for result in measured.results if result.adapter.startswith("loadtest-churn")}) > 2


def test_the_live_line_has_no_time_before_second_0() -> None:
    assert live_line(None, Progress(), 40, 0.0) == "starting"
    assert live_line(-0.1, Progress(), 40, 0.0).startswith("   0.0 s   sent 0 of 40 ")
    assert "running 1   done 2   failed 1   8 tokens/s" in live_line(3.0, Progress(3, 2, 1, 9), 40, 8.0)

"""Adapters by their ranks, on a server that has loaded none."""

import asyncio
from dataclasses import replace
from io import StringIO

import pytest
from rich.console import Console

from loadtest.measurement import Measurement, Slo
from loadtest.named import WORKLOADS
from loadtest.ranks import choose_by_rank, describe
from loadtest.run import Target, measure
from loadtest.workload import WorkloadError
from tests.conftest import ADAPTERS
from tests.server.rpc.conftest import Running, listed

RANKS = dict.fromkeys(sorted(ADAPTERS), 0)  # as the server lists them: rank 5 twice, rank 6 once, rank 4 three times


async def test_ranks_come_in_turn(running: Running) -> None:
    chosen = await choose_by_rank(running.adapters, RANKS, (5, 6), 3)
    assert chosen == {"alpha-pattern": 5, "head": 6, "dora": 5}
    assert list(chosen) == ["alpha-pattern", "head", "dora"]
    loaded = {name: adapter for name, adapter in (await listed(running)).items() if adapter.generation}
    assert "rslora" not in loaded  # there were enough before it
    assert not any(adapter.pinned for adapter in loaded.values())


async def test_all_full_turns(running: Running) -> None:
    assert list((await choose_by_rank(running.adapters, RANKS, (5, 6), -1)).values()) == [5, 6]
    assert set((await choose_by_rank(running.adapters, RANKS, (4,), -1)).values()) == {4}


async def test_an_adapter_that_cannot_be_loaded_is_left_out(running: Running) -> None:
    (running.adapters_dir / "dora" / "adapter_model.safetensors").write_bytes(b"torn")
    assert list(await choose_by_rank(running.adapters, RANKS, (5,), -1)) == ["alpha-pattern"]


@pytest.mark.parametrize(("count", "ranks"), [(4, (5, 6)), (-1, (5, 9))])
async def test_too_few_are_refused(running: Running, count: int, ranks: tuple[int, ...]) -> None:
    with pytest.raises(WorkloadError, match=f"^num_adapters is {count} with ranks .* the server has 2 of rank 5"):
        await choose_by_rank(running.adapters, RANKS | {"alpha-pattern": 5, "dora": 5}, ranks, count)


async def test_a_run_by_rank_says_so(running: Running) -> None:
    short = WORKLOADS["ranks-8-short"][1]
    workload = replace(short, ranks=(5, 6), num_adapters=2, num_requests=8, concurrency=2, output_tokens=(2, 4))

    async def load(target: Target) -> Measurement:
        return await measure(target, "run", workload, Slo(), asyncio.Event(), Console(file=StringIO()))

    measured = await load(Target(address=running.address))
    assert {result.adapter for result in measured.results if result.ok} == {"alpha-pattern", "head"}
    assert measured.server["adapters_in_use"] == "1 of rank 5, 1 of rank 6"
    with pytest.raises(WorkloadError, match="ranks choose among the server's adapters, and --adapters names them"):
        await load(Target(address=running.address, adapters=("dora",)))


def test_ranks_in_words() -> None:
    assert describe([16, 8, 0, 8]) == "1 of unknown rank, 2 of rank 8, 1 of rank 16"
    assert describe([]) == "none"

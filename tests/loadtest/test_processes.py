"""A load split over processes."""

import asyncio
import multiprocessing
from collections.abc import Callable

import pytest

from loadtest.generator import Share
from loadtest.processes import Load, LoadProcessError, split
from loadtest.schedule import Arrival
from tests.loadtest.conftest import ScriptedServer

ARRIVALS = tuple(Arrival(index * 0.005, f"a{index}", index, 4, 1) for index in range(40))


def make_share(address: str = "", concurrency: int = 0) -> Share:
    return Share(address, ARRIVALS, concurrency, seed=1, vocab_size=100, timeout=30.0)


def test_every_arrival_goes_to_one_process_and_every_process_sees_the_whole_time() -> None:
    shares = split(make_share(), 3)
    assert sorted((a for share in shares for a in share.arrivals), key=lambda a: a.due) == list(ARRIVALS)
    assert all(share.arrivals[0].due < 0.02 and share.arrivals[-1].due > 0.18 for share in shares)


def test_places_of_a_closed_loop_are_shared_out() -> None:
    assert [share.concurrency for share in split(make_share(concurrency=8), 3)] == [3, 3, 2]
    assert len(split(make_share(concurrency=2), 5)) == 2  # a process without a place would send nothing
    assert len(split(make_share(), 100)) == len(ARRIVALS)


async def test_results_of_two_processes_are_one_load(scripted: Callable[..., ScriptedServer]) -> None:
    server = scripted()
    load = Load(make_share(server.address), 2, asyncio.Event())
    outcomes = await load.run()
    assert [len(outcome.results) for outcome in outcomes] == [20, 20]
    results = [result for outcome in outcomes for result in outcome.results]
    assert {result.adapter for result in results if result.ok} == {arrival.adapter for arrival in ARRIVALS}
    assert {request.adapter for request in server.requests} == {arrival.adapter for arrival in ARRIVALS}
    assert all(0 <= result.due - load.start <= 0.2 for result in results)  # one clock


async def test_a_process_that_dies_leaves_the_results_of_the_others(scripted: Callable[..., ScriptedServer]) -> None:
    def kill_one(server: ScriptedServer, requests: int) -> None:
        if requests == 10:
            multiprocessing.active_children()[0].kill()

    outcomes = await Load(make_share(scripted(kill_one).address), 2, asyncio.Event()).run()
    (lost,), (kept,) = ([outcome for outcome in outcomes if outcome.process_lost is gone] for gone in (True, False))
    assert len(kept.results) == 20
    assert lost.cut + lost.unsent == 20


async def test_no_process_is_left(scripted: Callable[..., ScriptedServer]) -> None:
    def kill_all(server: ScriptedServer, requests: int) -> None:
        if requests == 10:
            for child in multiprocessing.active_children():
                child.kill()

    with pytest.raises(LoadProcessError, match="all load processes ended"):
        await Load(make_share(scripted(kill_all).address), 2, asyncio.Event()).run()


async def test_a_stop_reaches_every_process(scripted: Callable[..., ScriptedServer]) -> None:
    loop, stop = asyncio.get_running_loop(), asyncio.Event()

    def stop_soon(server: ScriptedServer, requests: int) -> None:
        if requests == 10:
            loop.call_soon_threadsafe(stop.set)

    address = scripted(stop_soon).address
    arrivals = tuple(Arrival(index * 0.01, "a", index, 4, 1) for index in range(10_000))
    outcomes = await Load(Share(address, arrivals, 0, 1, 100, 30.0), 2, stop).run()
    assert all(outcome.unsent > 4_000 for outcome in outcomes)

"""The generator against servers that stall, vanish or are cut short."""

import asyncio
import threading
import time
from collections.abc import Callable
from dataclasses import replace

import pytest

from loadtest.client import CallResult
from loadtest.generator import GIVE_UP_AFTER, LoadGenerator, Outcome, Progress, Share
from loadtest.report import summarize
from loadtest.schedule import Arrival
from tests.loadtest.conftest import ScriptedServer, make_measurement

Start = Callable[..., ScriptedServer]


def make_share(address: str, count: int, gap: float, concurrency: int = 0) -> Share:
    arrivals = tuple(Arrival(index * gap, f"a{index}", index, 4, 1) for index in range(count))
    return Share(address, arrivals, concurrency, seed=1, vocab_size=100, timeout=30.0)


async def send(share: Share, stop: asyncio.Event | None = None) -> Outcome:
    return await LoadGenerator(share, Progress(), stop or asyncio.Event()).run(time.monotonic() + 0.1)


def by_due(outcome: Outcome) -> list[CallResult]:
    return sorted(outcome.results, key=lambda result: result.due)


def test_a_request_has_the_lengths_asked_for_and_always_the_same_tokens() -> None:
    arrival, share = Arrival(0.0, "a", 3, prompt_tokens=12, output_tokens=5), make_share("", 1, 0.0)
    request = share.request(arrival)
    assert (request.adapter, request.sampling.max_tokens, request.sampling.ignore_eos) == ("a", 5, True)
    assert len(request.prompt_token_ids.ids) == 12
    assert max(request.prompt_token_ids.ids) < share.vocab_size
    assert request == share.request(arrival)
    assert request != replace(share, seed=2).request(arrival)


async def test_an_open_loop_goes_on_while_the_server_stalls(scripted: Start) -> None:
    count, gap, everyone_came = 10, 0.03, threading.Event()

    def stall(server: ScriptedServer, requests: int) -> None:
        if requests == count:
            everyone_came.set()
        assert everyone_came.wait(20)

    outcome = await send(make_share(scripted(stall).address, count, gap))
    for index, result in enumerate(by_due(outcome)):
        assert result.ok
        assert result.first_token is not None
        assert result.first_token >= (count - 1 - index) * gap  # it waited for the last one to be sent


async def test_latency_counts_from_the_time_a_request_was_due(scripted: Start) -> None:
    async def freeze() -> None:
        await asyncio.sleep(0.15)
        time.sleep(0.4)  # nothing can be sent, though the server is free

    frozen = asyncio.create_task(freeze())
    outcome = await send(make_share(scripted().address, 20, 0.02))
    await frozen
    worst = max(outcome.results, key=lambda result: result.lateness)
    assert worst.lateness > 0.25
    assert worst.first_token is not None
    assert worst.first_token > worst.lateness
    warning = summarize(make_measurement(by_due(outcome), outcomes=[outcome]))["client"]["bottleneck"]
    assert "the load test itself is a bottleneck: 1 % of requests were sent more than" in warning


async def test_a_closed_loop_keeps_its_places_filled(scripted: Start) -> None:
    lock, now, most = threading.Lock(), 0, 0

    def count(server: ScriptedServer, requests: int) -> None:
        nonlocal now, most
        with lock:
            now += 1
            most = max(most, now)
        time.sleep(0.02)
        with lock:
            now -= 1

    outcome = await send(make_share(scripted(count).address, 12, 0.0, concurrency=3))
    assert len(outcome.results) == 12
    assert most == 3


@pytest.mark.parametrize("concurrency", [0, 4])
async def test_a_server_that_dies_leaves_what_was_measured(scripted: Start, concurrency: int) -> None:
    def die(server: ScriptedServer, requests: int) -> None:
        if requests == 30:
            server.die()

    outcome = await send(make_share(scripted(die).address, 5_000, 0.002, concurrency))
    codes = [result.code for result in outcome.results]
    assert codes.count("OK") >= 20
    assert codes.count("UNAVAILABLE") >= GIVE_UP_AFTER
    assert outcome.server_lost.startswith("the server was lost ")
    assert outcome.unsent > 1_000
    assert len(codes) + outcome.unsent + outcome.cut == 5_000


async def test_a_stop_cuts_what_runs_and_counts_it(scripted: Start) -> None:
    answered, forever = 5, threading.Event()
    loop, stop = asyncio.get_running_loop(), asyncio.Event()

    def answer_some(server: ScriptedServer, requests: int) -> None:
        if requests > answered:
            if requests == answered + 3:
                loop.call_soon_threadsafe(stop.set)
            forever.wait(20)

    outcome = await send(make_share(scripted(answer_some).address, 1_000, 0.02), stop)
    forever.set()
    assert len(outcome.results) == answered
    assert outcome.cut >= 3
    assert outcome.cut + outcome.unsent == 1_000 - answered
    assert outcome.server_lost == ""

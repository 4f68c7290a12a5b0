"""Adapters that come and go, and the check: what it lets through, and every fault that it must find."""

import asyncio
import threading
from dataclasses import replace
from itertools import pairwise

import grpc
import pytest

from loadtest.churn import Churn, ChurnError
from loadtest.churn_review import Operation
from loadtest.client import CallResult
from loadtest.generator import Share
from loadtest.schedule import Arrival
from server.pb.loraplex.v1.adapters_pb2 import (
    Adapter,
    LoadAdapterRequest,
    UnloadAdapterRequest,
    UnloadAdapterResponse,
)
from tests.loadtest.conftest import BAD, GOOD, ScriptedServer
from tests.server.rpc.conftest import Running, listed

NAME = "loadtest-churn-0"
TOKENS = {"one": (1, 1), "two": (2, 2), "three": (3, 3)}
ANSWER = replace(
    GOOD, adapter=NAME, due=11.0, first_token=0.1, total=0.5, token_ids=TOKENS["one"], generation=1, digest="one"
)
REFUSED = replace(BAD, adapter=NAME, due=32.0, total=0.1)
BYSTANDER = replace(ANSWER, adapter="stored", token_ids=(3, 3), generation=9, digest="three")


@pytest.fixture
def churn() -> Churn:
    """One name: weights "one" from 10 s, "two" from 20 s, none from 30 s."""
    made = Churn.of(1, {"stored": "1", NAME: "1"}, timeout=30.0)
    made._references.update({(digest, 0): tokens for digest, tokens in TOKENS.items()})
    made.operations += [
        Operation("replace", NAME, 9.9, 10.0, generation=1, digest="one"),
        Operation("replace", NAME, 19.9, 20.0, generation=2, digest="two"),
        Operation("unload", NAME, 29.9, 30.0),
    ]
    return made


@pytest.mark.parametrize(
    "answer",
    [
        ANSWER,
        replace(ANSWER, due=19.95),  # sent while the replacement ran: either may answer
        replace(ANSWER, due=19.95, token_ids=TOKENS["two"], generation=2, digest="two"),
        replace(ANSWER, due=19.0, total=30.0),  # finished long after, on the weights that it began with
        BYSTANDER,
        replace(BYSTANDER, due=5.0, generation=10),
    ],
)
def test_right_answers_pass(churn: Churn, answer: CallResult) -> None:
    assert churn.review([ANSWER, answer]).faults == ()


@pytest.mark.parametrize(
    ("answer", "fault"),
    [
        (replace(ANSWER, code="INTERNAL", details="oops"), "failed with INTERNAL: oops"),
        (replace(ANSWER, same_weights=False), "name different generations"),
        (replace(ANSWER, generation=7), "generation 7 never had the name"),
        (replace(ANSWER, due=25.0), "generation 1 did not have the name between"),
        (replace(ANSWER, due=5.0), "generation 1 did not have the name between"),
        (replace(ANSWER, digest="two"), "generation 1 answered with digest two"),
        (replace(ANSWER, token_ids=TOKENS["two"]), "tokens are not those of generation 1 alone"),
        (replace(REFUSED, due=15.0), "failed with NOT_FOUND"),
        (replace(ANSWER, generation=0, digest=""), "the base model answered"),
        (replace(ANSWER, due=35.0, generation=0, digest=""), "the base model answered"),  # while the name was away
    ],
)
def test_wrong_answers_are_found(churn: Churn, answer: CallResult, fault: str) -> None:
    review = churn.review([ANSWER, answer])
    assert len(review.faults) == 1
    assert fault in review.faults[0]
    assert (review.checked, review.refused) == (2, frozenset())


@pytest.mark.parametrize(
    ("answer", "fault"),
    [
        (replace(BYSTANDER, token_ids=TOKENS["one"]), "tokens are not those of generation 9 alone"),
        (replace(BYSTANDER, digest="four"), "digest four has no reference: its files changed after"),
        (replace(BYSTANDER, code="NOT_FOUND", details="gone"), "failed with NOT_FOUND: gone"),
        (replace(BYSTANDER, generation=0, digest=""), "the base model answered"),
    ],
)
def test_bystanders_are_checked_too(churn: Churn, answer: CallResult, fault: str) -> None:
    review = churn.review([ANSWER, answer])
    assert len(review.faults) == 1
    assert fault in review.faults[0]
    assert (review.checked, review.bystanders) == (1, 1)


def test_a_source_whose_files_changed_in_the_run_is_a_fault(churn: Churn) -> None:
    churn.operations.append(Operation("load", NAME, 39.9, 40.0, generation=3, digest="new"))
    review = churn.review([replace(ANSWER, due=41.0, generation=3, digest="new")])
    assert len(review.faults) == 1
    assert "digest new has no reference" in review.faults[0]


def test_a_check_of_nothing_is_a_fault(churn: Churn) -> None:
    assert churn.review([BYSTANDER]).faults == (
        "no request went to an adapter that came and went, so nothing was checked",
    )


def test_weights_that_cannot_be_told_apart_are_warned_of(churn: Churn) -> None:
    churn._folders.update({"a/1": "one", "b/1": "one"})
    assert "every adapter that the names were loaded from has the same weights" in churn.review([ANSWER]).warning
    churn._folders["c/1"] = "two"
    assert churn.review([ANSWER]).warning == ""


def test_a_refusal_while_the_name_was_away_is_right(churn: Churn) -> None:
    assert churn.review([ANSWER, REFUSED]).refused == {1}


def test_an_operation_that_failed_is_a_fault(churn: Churn) -> None:
    churn.operations.append(Operation("load", NAME, 40.0, 41.0, error="load: INTERNAL: no"))
    assert churn.review([ANSWER]).faults == ("load: INTERNAL: no",)


def test_names_of_its_own_are_no_sources(churn: Churn) -> None:
    assert churn.sources == (("stored", "1"),)


def test_requests_repeat_so_that_each_has_a_reference(churn: Churn) -> None:
    arrivals = [Arrival(float(index), NAME if index % 2 else "stored", index, 8 + index, 5) for index in range(40)]
    shaped = churn.shape(arrivals)
    assert [(arrival.due, arrival.adapter) for arrival in shaped] == [(a.due, a.adapter) for a in arrivals]
    assert len({(arrival.prompt, arrival.prompt_tokens) for arrival in shaped}) == 4


def make_share(*arrivals: Arrival) -> Share:
    return Share("", arrivals, 0, seed=1, vocab_size=50, timeout=30.0)


async def test_a_reference_that_failed_is_none(running: Running) -> None:
    too_long = Arrival(0.0, NAME, 0, prompt_tokens=100_000, output_tokens=1)
    churn = Churn.of(1, {"plain": "1"}, timeout=30.0)
    with pytest.raises(ChurnError, match=r"request 0 to adapter 'plain' failed .*: INVALID_ARGUMENT: "):
        async with churn.going_on(running.channel, make_share(too_long), 1.0):
            pytest.fail("the load began")
    assert NAME not in await listed(running)


async def test_every_load_brings_other_weights(running: Running) -> None:
    sources = dict.fromkeys(["plain", "rslora"], "1")
    churn = Churn.of(2, sources, timeout=30.0)
    async with churn.going_on(running.channel, make_share(Arrival(0.0, NAME, 0, 4, 2)), 0.001):
        while len(churn.operations) < 20:
            await asyncio.sleep(0.01)
    for name in churn.names:
        loads = [operation.digest for operation in churn.operations if operation.name == name and operation.digest]
        assert len(loads) >= 6
        assert all(before != after for before, after in pairwise(loads))
    assert not {*churn.names} & {*await listed(running)}


class _StopsLoading(ScriptedServer):
    """Loads a source and a name; every later load waits until the end."""

    def __init__(self) -> None:
        super().__init__(lambda server, requests: None)
        self.loads, self.end = 0, threading.Event()

    def LoadAdapter(self, request: LoadAdapterRequest, context: object) -> Adapter:
        self.loads += 1
        if self.loads > 2:
            self.end.wait(20)
        return Adapter(name=request.name, generation=self.loads, digest="one")

    def UnloadAdapter(self, request: UnloadAdapterRequest, context: object) -> UnloadAdapterResponse:
        return UnloadAdapterResponse()


async def test_an_operation_that_is_never_answered_ends_by_its_deadline() -> None:
    server, churn = _StopsLoading(), Churn.of(1, {"stored": "1"}, timeout=0.5)
    async with grpc.aio.insecure_channel(server.address) as channel, churn.going_on(channel, make_share(), 0.01):
        while server.loads < 3:
            await asyncio.sleep(0.005)
    server.end.set()
    server.die()
    assert [operation.kind for operation in churn.operations] == ["replace", "replace", "unload"]
    assert churn.operations[1].error == f"replace {NAME}: DEADLINE_EXCEEDED: Deadline Exceeded"

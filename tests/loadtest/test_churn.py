"""The check of a churn: what it lets through, and every fault that it must find."""

from dataclasses import replace

import pytest

from loadtest.churn import Churn, ChurnError, Operation
from loadtest.client import CallResult
from loadtest.schedule import Arrival
from tests.loadtest.conftest import BAD, GOOD
from tests.server.rpc.conftest import Running

NAME = "loadtest-churn-0"
TOKENS = {"one": (1, 1), "two": (2, 2)}
ANSWER = replace(
    GOOD, adapter=NAME, due=11.0, first_token=0.1, total=0.5, token_ids=TOKENS["one"], generation=1, digest="one"
)
REFUSED = replace(BAD, adapter=NAME, due=32.0, total=0.1)


@pytest.fixture
def churn() -> Churn:
    """One name: weights "one" from 10 s, "two" from 20 s, none from 30 s."""
    made = Churn.of(1, {"stored": "1", NAME: "1"}, seed=0)
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
        replace(BAD, adapter="another"),  # not one of the names
    ],
)
def test_right_answers_pass(churn: Churn, answer: CallResult) -> None:
    assert churn.review([answer]).faults == ()


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
    ],
)
def test_wrong_answers_are_found(churn: Churn, answer: CallResult, fault: str) -> None:
    review = churn.review([ANSWER, answer])
    assert len(review.faults) == 1
    assert fault in review.faults[0]
    assert (review.checked, review.refused) == (2, frozenset())


def test_a_refusal_while_the_name_was_away_is_right(churn: Churn) -> None:
    assert churn.review([ANSWER, REFUSED]).refused == {1}


def test_an_operation_that_failed_is_a_fault(churn: Churn) -> None:
    churn.operations.append(Operation("load", NAME, 40.0, 41.0, error="load: INTERNAL: no"))
    assert churn.review([]).faults == ("load: INTERNAL: no",)


def test_names_of_its_own_are_no_sources(churn: Churn) -> None:
    assert churn.sources == (("stored", "1"),)


def test_requests_to_names_that_come_and_go_repeat(churn: Churn) -> None:
    arrivals = [Arrival(float(index), NAME if index % 2 else "stored", index, 8 + index, 5) for index in range(40)]
    shaped = churn.shape(arrivals)
    assert [(arrival.due, arrival.adapter) for arrival in shaped] == [(a.due, a.adapter) for a in arrivals]
    assert shaped[::2] == tuple(arrivals[::2])
    assert len({(arrival.prompt, arrival.prompt_tokens) for arrival in shaped[1::2]}) == 2


async def test_a_reference_that_failed_is_none(running: Running) -> None:
    too_long = Arrival(0.0, NAME, 0, prompt_tokens=100_000, output_tokens=1)
    with pytest.raises(ChurnError, match=r"request 0 to adapter 'plain' failed .*: INVALID_ARGUMENT: "):
        await Churn.of(1, {"plain": "1"}, seed=0).prepare(running.channel, [too_long], vocab_size=50)

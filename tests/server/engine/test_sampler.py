"""Each sampling parameter does what its name says, per row."""

import math
import random
from collections import Counter
from typing import Any

import pytest
import torch

from server.engine.request import Request, SamplingParams
from server.engine.sampler import sample

LOGITS = torch.tensor([0.0, 3.0, 1.0, 2.0, -1.0])  # the order of likelihood is 1, 3, 2, 0, 4


def request(output: tuple[int, ...] = (), stop: frozenset[int] = frozenset(), **params: Any) -> Request:
    made = Request(0, [0], SamplingParams(**params), (), stop)
    made.token_ids += output
    return made


def token(made: Request) -> int | None:
    return sample(LOGITS[None], [made])[0].token_id


def drawn(**params: Any) -> Counter[int | None]:
    made = request(temperature=1.0, seed=0, **params)
    return Counter(token(made) for _ in range(2000))


def test_greedy_is_the_default() -> None:
    assert token(request()) == 1
    assert token(request(temperature=1e-6)) == 1


def test_draws_follow_the_distribution() -> None:
    counts = drawn()
    for token_id, probability in enumerate(torch.softmax(LOGITS, 0).tolist()):
        assert counts[token_id] / 2000 == pytest.approx(probability, abs=0.03)


def test_one_number_is_drawn_by_inverse_transform() -> None:
    """In the order of token ids; in that of likelihood where something is cut off."""
    sums = torch.softmax(LOGITS.double(), 0).cumsum(0)
    for seed in range(20):
        number = random.Random(seed).random()
        assert token(request(temperature=1.0, seed=seed)) == int((sums > number).nonzero()[0])
        assert token(request(temperature=1.0, seed=seed, top_k=1)) == 1


def test_what_cannot_be_is_never_drawn() -> None:
    """Not even by the largest number that a request may draw."""
    made = request(temperature=1.0)
    made.random.random = lambda: 1 - 2**-53  # type: ignore[method-assign]
    logits = torch.tensor([[0.0, 1.0, -math.inf]])
    assert sample(logits, [made])[0].token_id == 1


def test_low_temperature_sharpens() -> None:
    made = request(temperature=0.05, seed=0)
    assert {token(made) for _ in range(200)} == {1}


@pytest.mark.parametrize(
    ("params", "allowed"),
    [
        ({"top_k": 2}, {1, 3}),
        ({"top_k": 1}, {1}),
        ({"top_p": 0.5}, {1}),
        ({"top_p": 0.8}, {1, 3}),
        ({"min_p": 0.3}, {1, 3}),
        ({"top_k": 3, "top_p": 0.9}, {1, 3}),
        ({"top_k": 1, "top_p": 1.4e-45}, {1}),
    ],
)
def test_what_is_cut_off_is_never_drawn(params: dict[str, Any], allowed: set[int]) -> None:
    assert set(drawn(**params)) == allowed


def test_penalties_and_bias() -> None:
    assert token(request(output=(1,), repetition_penalty=10.0)) == 3
    assert token(request(output=(1,), presence_penalty=1.5)) == 3
    assert token(request(output=(1,), frequency_penalty=0.6)) == 1
    assert token(request(output=(1, 1), frequency_penalty=0.6)) == 3
    assert token(request(logit_bias={4: 100.0})) == 4
    assert token(request(presence_penalty=2.0)) == 1  # the prompt does not count


def test_repetition_penalty_covers_the_prompt() -> None:
    logits = torch.tensor([[5.0, 4.9, 0.0]])
    assert sample(logits, [request(repetition_penalty=1.5)])[0].token_id == 1  # the prompt is token 0


def test_min_tokens_holds_stop_tokens_back() -> None:
    assert token(request(stop=frozenset({1}), min_tokens=2)) == 3
    assert token(request(output=(2, 2), stop=frozenset({1}), min_tokens=2)) == 1


def test_rows_do_not_touch_each_other() -> None:
    requests = [request(), request(logit_bias={0: 100.0}), request(output=(1,), repetition_penalty=10.0), request()]
    logits = LOGITS.repeat(4, 1)
    assert [result.token_id for result in sample(logits, requests)] == [1, 0, 3, 1]
    assert torch.equal(logits, LOGITS.repeat(4, 1))


def test_logprobs_are_of_the_models_own_distribution() -> None:
    result = sample(LOGITS[None], [request(logprobs=2, logit_bias={4: 100.0}, temperature=0.5, seed=0)])[0]
    expected = torch.log_softmax(LOGITS, 0)
    assert result.token_id == 4
    assert result.logprob is not None
    assert result.logprob.logprob == pytest.approx(float(expected[4]))
    assert [token_id for token_id, _ in result.logprob.top] == [1, 3]
    assert result.logprob.top[0][1] == pytest.approx(float(expected[1]))


@pytest.mark.parametrize("params", [{}, {"temperature": 0.7, "seed": 1}, {"min_tokens": 1}], ids=str)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("place", range(len(LOGITS)))
def test_a_row_that_is_not_finite_fails_alone(place: int, bad: float, params: dict[str, Any]) -> None:
    """Wherever the value stands, and even where it could not be chosen."""
    logits = LOGITS.repeat(3, 1)
    logits[1, place] = bad
    results = sample(logits, [request(stop=frozenset({place}), **params) for _ in logits])
    assert results[1].token_id is None
    assert results[0].token_id == results[2].token_id == token(request(stop=frozenset({place}), **params))


def test_a_row_without_any_logit_fails() -> None:
    logits = torch.stack([LOGITS, torch.full_like(LOGITS, -math.inf)])
    assert [result.token_id for result in sample(logits, [request(), request()])] == [1, None]
    logits[1, 2] = -1e30  # one is enough
    assert [result.token_id for result in sample(logits, [request(), request()])] == [1, 2]

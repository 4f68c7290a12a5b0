"""How evenly adapters were served."""

from dataclasses import replace

import pytest

from loadtest.fairness import fairness, jain, per_adapter
from tests.loadtest.conftest import BAD, GOOD


def test_jains_index() -> None:
    assert jain([3.0, 3.0, 3.0]) == pytest.approx(1.0)
    assert jain([1.0, 0.0, 0.0, 0.0]) == pytest.approx(1 / 4)
    assert jain([1.0, 2.0]) == pytest.approx(0.9)
    assert jain([]) is None


def test_fairness_is_over_adapters_and_not_over_requests() -> None:
    results = [*[replace(GOOD, first_token=0.1)] * 9, replace(GOOD, adapter="b", first_token=0.2)]
    assert fairness(results)["first_token"] == pytest.approx(jain([0.1, 0.2]))
    assert [(row["name"], row["requests"]) for row in per_adapter(results)] == [("a", 9), ("b", 1)]


def test_an_adapter_that_starves_makes_the_index_fall() -> None:
    found = fairness([GOOD, replace(GOOD, adapter="c"), BAD])
    assert [found[name] for name in ("first_token", "per_output_token")] == pytest.approx([2 / 3, 2 / 3])
    assert found["starved"] == 1


def test_the_worst_adapter_is_named_with_its_99th_percentile() -> None:
    """One slow request among two hundred is beyond it."""
    results = [*[GOOD] * 200, replace(GOOD, first_token=9.0), replace(GOOD, adapter="slow", first_token=0.7), BAD]
    assert fairness(results)["worst"] == {"name": "slow", "first_token_p99": 0.7}
    assert fairness([BAD])["worst"] is None

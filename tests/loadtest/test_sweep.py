"""The search for a rate, and what the rates say."""

from typing import Any

import pytest

from loadtest.sweep import RateSearch, passes, verdict
from loadtest.workload import Workload


def summary(all_kept: float, kept_up: bool) -> dict[str, Any]:
    return {"attainment": {"all": all_kept}, "balance": {"kept_up": kept_up}}


def search(limit: float, first: float, bisections: int, *bounds: float) -> list[float]:
    """Rates that are tried on a server that is good up to a limit."""
    tried, rates = [], RateSearch(first, bisections, *bounds)
    for rate in iter(rates.next, None):
        tried.append(rate)
        rates.book(rate <= limit)
    return tried


def test_the_rate_doubles_until_it_fails_then_closes_in() -> None:
    assert search(limit=5, first=1, bisections=0) == [1, 2, 4, 8]
    tried = search(limit=5, first=1, bisections=4)
    assert tried[:5] == [1, 2, 4, 8, 5.66]
    assert max(rate for rate in tried if rate <= 5) == pytest.approx(5, rel=0.05)


def test_a_first_rate_that_fails_is_halved() -> None:
    assert search(limit=1.5, first=8, bisections=0) == [8, 4, 2, 1]


def test_a_server_without_limit_ends_the_search() -> None:
    assert len(search(limit=1e9, first=1, bisections=3)) == 13


def test_the_search_stays_where_a_workload_can_be_sent() -> None:
    bounds = Workload(rate=4, duration=2).rate_limits
    assert bounds == (0.5, 1_000_000)
    assert search(0.1, 4, 3, *bounds) == [4, 2, 1]
    assert search(1e9, 400_000, 3, *bounds) == [400_000, 800_000]
    assert Workload(duration=100_000).rate_limits[1] == 100
    assert Workload(num_requests=5, duration=100_000).rate_limits == (0, 1_000_000)


def test_a_run_passes_if_it_keeps_up_within_the_limits() -> None:
    assert passes(summary(0.95, True), attainment=0.9)
    assert not passes(summary(0.85, True), attainment=0.9)
    assert not passes(summary(0.95, False), attainment=0.9)


def test_knee_and_goodput() -> None:
    runs = [(4.0, summary(0.5, True)), (1.0, summary(1, True)), (2.0, summary(0.92, True)), (8.0, summary(0.1, False))]
    found = verdict(runs, attainment=0.9)
    assert (found["goodput"], found["knee"], found["highest_rate"]) == (2.0, 4.0, 8.0)


def test_a_lucky_rate_above_a_failure_is_not_the_goodput() -> None:
    runs = [(1.0, summary(1, True)), (2.0, summary(0.5, True)), (4.0, summary(0.95, True))]
    assert verdict(runs, attainment=0.9)["goodput"] == 1.0
    assert verdict([(1.0, summary(0.1, False))], attainment=0.9)["knee"] is None

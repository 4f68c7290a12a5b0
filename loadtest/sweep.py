"""Which rates to try, and what they say: the knee and the goodput. Pure."""

import math
from collections.abc import Sequence
from typing import Any

_MOST_DOUBLINGS = 12


class RateSearch:
    """Doubles the rate while the server passes (halves it while it does not), then bisects. Geometric means."""

    def __init__(self, first: float, bisections: int, floor: float = 0.0, ceiling: float = math.inf) -> None:
        """Rates are tried above `floor` and up to `ceiling`; the search does not go on beyond them."""
        self._rate = first
        self._bisections = bisections
        self._floor = floor
        self._ceiling = ceiling
        self._doublings = _MOST_DOUBLINGS
        self._passed: float | None = None  # the highest
        self._failed: float | None = None  # the lowest

    def next(self) -> float | None:
        """The rate to try; None when the search is over."""
        if self._passed is None and self._failed is None:
            return self._rate
        if self._passed is None or self._failed is None:
            rate = self._rate * (2 if self._failed is None else 0.5)
            if not self._doublings or not self._floor < rate <= self._ceiling:
                return None
            self._doublings -= 1
            self._rate = rate
            return rate
        if not self._bisections:
            return None
        self._bisections -= 1
        self._rate = float(f"{math.sqrt(self._passed * self._failed):.3g}")
        return self._rate

    def book(self, passed: bool) -> None:
        """What the rate that `next` gave has shown."""
        if passed:
            self._passed = max(self._rate, self._passed or 0.0)
        else:
            self._failed = min(self._rate, self._failed or math.inf)


def passes(summary: dict[str, Any], attainment: float) -> bool:
    """Whether a run kept up with its arrivals and enough of its requests kept every limit."""
    return (summary["attainment"]["all"] or 0.0) >= attainment and bool(summary["balance"]["kept_up"])


def verdict(runs: Sequence[tuple[float, dict[str, Any]]], attainment: float) -> dict[str, Any]:
    """Over runs with their rates.

    Returns:
        `knee`: the highest rate below the lowest at which the server fell behind; `goodput`: the highest rate below the
        lowest at which the runs did not pass. None: not even the lowest rate; the highest rate: not reached.
    """
    return {
        "attainment": attainment,
        "knee": _highest_below_failure([(rate, run["balance"]["kept_up"]) for rate, run in runs]),
        "goodput": _highest_below_failure([(rate, passes(run, attainment)) for rate, run in runs]),
        "highest_rate": max((rate for rate, _ in runs), default=None),
    }


def _highest_below_failure(tried: Sequence[tuple[float, bool]]) -> float | None:
    failure = min((rate for rate, good in tried if not good), default=math.inf)
    return max((rate for rate, good in tried if good and rate < failure), default=None)

"""Latency distributions: exact percentiles for the report, HDR histograms to be kept and merged."""

import math
from collections.abc import Iterable, Sequence
from io import BytesIO

from hdrh.histogram import HdrHistogram

PERCENTILES = (50, 90, 99, 99.9)
_MICROSECOND, _HOUR, _DIGITS = 1, 3_600_000_000, 3


def percentile(values: Iterable[float], percent: float) -> float:
    """Nearest-rank percentile; NaN of nothing."""
    return _of_sorted(sorted(values), percent)


def spread(values: Iterable[float]) -> dict[str, float | int | None]:
    """Count, mean, percentiles and maximum; None where there is no value."""
    ordered = sorted(values)
    if not ordered:
        return {"count": 0, "mean": None, **{f"p{percent}": None for percent in PERCENTILES}, "max": None}
    return {
        "count": len(ordered),
        "mean": math.fsum(ordered) / len(ordered),
        **{f"p{percent}": _of_sorted(ordered, percent) for percent in PERCENTILES},
        "max": ordered[-1],
    }


def cumulative(values: Iterable[float], points: int = 200) -> list[tuple[float, float]]:
    """The empirical distribution as (value, share of values up to it), at most `points` of them."""
    ordered = sorted(values)
    count = len(ordered)
    ranks = sorted({math.ceil(count * step / points) for step in range(1, points + 1)})
    return [(ordered[rank - 1], rank / count) for rank in ranks] if ordered else []


def hdr_histogram(seconds: Iterable[float]) -> HdrHistogram:
    """Microseconds, three significant digits, up to an hour."""
    histogram = HdrHistogram(_MICROSECOND, _HOUR, _DIGITS)
    for value in seconds:
        histogram.record_value(min(max(int(value * 1e6), _MICROSECOND), _HOUR))
    return histogram


def percentile_distribution(histogram: HdrHistogram) -> bytes:
    """The text of a .hgrm file, values in milliseconds."""
    buffer = BytesIO()
    histogram.output_percentile_distribution(buffer, 1000.0)
    return buffer.getvalue()


def _of_sorted(ordered: Sequence[float], percent: float) -> float:
    if not ordered:
        return float("nan")
    return ordered[max(0, math.ceil(len(ordered) * percent / 100) - 1)]

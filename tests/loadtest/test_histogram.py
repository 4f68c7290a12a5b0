"""Percentiles, distributions, and the histograms that are kept."""

import math

import pytest
from hdrh.histogram import HdrHistogram

from loadtest.histogram import cumulative, hdr_histogram, percentile, percentile_distribution, spread

HUNDRED = [float(value) for value in range(100, 0, -1)]


def test_percentiles_are_values_that_occurred() -> None:
    assert [percentile(HUNDRED, percent) for percent in (50, 90, 99, 100)] == [50, 90, 99, 100]
    assert percentile([3.0], 50) == 3.0
    assert math.isnan(percentile([], 50))


def test_spread() -> None:
    assert spread(HUNDRED) == {"count": 100, "mean": 50.5, "p50": 50, "p90": 90, "p99": 99, "p99.9": 100, "max": 100}
    assert spread([])["count"] == 0
    assert spread([])["p99"] is None


def test_a_cumulative_distribution_ends_at_the_maximum_with_everything() -> None:
    points = cumulative(HUNDRED, points=10)
    assert points == [(10.0 * step, step / 10) for step in range(1, 11)]
    assert cumulative([5.0, 1.0]) == [(1.0, 0.5), (5.0, 1.0)]
    assert cumulative([]) == []


def test_kept_histograms_can_be_read_and_merged() -> None:
    low, high = hdr_histogram([0.001] * 90), hdr_histogram([1.0] * 10)
    merged = HdrHistogram.decode(low.encode())
    merged.add(HdrHistogram.decode(high.encode()))
    assert merged.get_total_count() == 100
    assert merged.get_value_at_percentile(90) == pytest.approx(1_000, rel=1e-3)  # microseconds
    assert merged.get_value_at_percentile(91) == pytest.approx(1_000_000, rel=1e-3)
    assert b"Value" in percentile_distribution(merged)
    assert hdr_histogram([0.0, 1e9]).get_total_count() == 2  # what is out of range is not lost

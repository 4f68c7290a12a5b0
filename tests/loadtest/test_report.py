"""Numbers of a load test."""

import math
from dataclasses import replace

from rich.console import Console

from loadtest.client import CallResult
from loadtest.report import percentile, summarize, table

GOOD = CallResult("a", "text", 10, first_token=0.1, token_gaps=(0.01, 0.03), total=0.5, code="OK", details="")
BAD = replace(GOOD, num_tokens=0, first_token=None, token_gaps=(), total=9.0, code="NOT_FOUND", details="gone")


def test_percentiles_are_values_that_occurred() -> None:
    values = [float(value) for value in range(1, 101)]
    assert [percentile(values, percent) for percent in (50, 90, 99, 100)] == [50, 90, 99, 100]
    assert percentile([3.0], 50) == 3.0
    assert math.isnan(percentile([], 50))


def test_failures_count_but_do_not_flatter_the_latencies() -> None:
    summary = summarize([GOOD, GOOD, BAD], wall=2.0)
    assert summary["codes"] == {"OK": 2, "NOT_FOUND": 1}
    assert summary["out_tok_s"] == 10.0
    assert summary["seconds"]["end_to_end"]["p99"] == 0.5
    assert summary["seconds"]["inter_token_latency"]["p90"] == 0.03


def test_the_table_shows_them() -> None:
    console = Console(width=100, record=True)
    console.print(table(summarize([GOOD, BAD], wall=1.0)))
    text = console.export_text()
    assert "NOT_FOUND 1" in text
    assert "time to first token" in text

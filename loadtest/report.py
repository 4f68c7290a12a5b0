"""What a load test says: one table for people, one dictionary for machines."""

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

from rich.table import Table

from loadtest.client import CallResult

PERCENTILES = (50, 90, 99)


def percentile(values: Iterable[float], percent: float) -> float:
    """Nearest-rank percentile; NaN of nothing."""
    ordered = sorted(values)
    if not ordered:
        return float("nan")
    return ordered[max(0, math.ceil(len(ordered) * percent / 100) - 1)]


def summarize(results: Sequence[CallResult], wall: float) -> dict[str, Any]:
    """Counts, tokens per second and latency percentiles in seconds."""
    good = [result for result in results if result.ok]
    times = {
        "time_to_first_token": [result.first_token for result in good if result.first_token is not None],
        "inter_token_latency": [gap for result in good for gap in result.token_gaps],
        "end_to_end": [result.total for result in good],
    }
    return {
        "requests": len(results),
        "codes": dict(Counter(result.code for result in results)),
        "wall_s": round(wall, 3),
        "out_tok_s": round(sum(result.num_tokens for result in good) / wall, 2),
        "seconds": {
            name: {f"p{percent}": round(percentile(values, percent), 4) for percent in PERCENTILES}
            for name, values in times.items()
        },
    }


def table(summary: dict[str, Any]) -> Table:
    """The summary for a terminal."""
    made = Table(title=f"{summary['requests']} requests in {summary['wall_s']} s, {summary['out_tok_s']} tokens/s")
    made.add_column("seconds")
    for percent in PERCENTILES:
        made.add_column(f"p{percent}", justify="right")
    for name, values in summary["seconds"].items():
        made.add_row(name.replace("_", " "), *[f"{value:.3f}" for value in values.values()])
    made.add_row("status codes", ", ".join(f"{code} {count}" for code, count in summary["codes"].items()))
    return made

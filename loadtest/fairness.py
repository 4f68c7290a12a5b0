"""What each adapter got, and how evenly."""

import math
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from loadtest.client import CallResult
from loadtest.histogram import spread


def jain(values: Sequence[float]) -> float | None:
    """Jain's index (Σx)² / (n Σx²): 1 when all are equal, 1/n when one has everything; None of nothing."""
    squares = math.fsum(value * value for value in values)
    return math.fsum(values) ** 2 / (len(values) * squares) if squares else None


def per_adapter(results: Sequence[CallResult]) -> list[dict[str, Any]]:
    """One row for each, the most requested first."""
    grouped: dict[str, list[CallResult]] = defaultdict(list)
    for result in results:
        grouped[result.adapter].append(result)
    rows = []
    for name, of_adapter in sorted(grouped.items(), key=lambda item: (-len(item[1]), item[0])):
        first_tokens = spread(
            result.first_token for result in of_adapter if result.ok and result.first_token is not None
        )
        rows.append(
            {
                "name": name or "(base)",
                "requests": len(of_adapter),
                "failed": sum(not result.ok for result in of_adapter),
                "tokens": sum(result.num_tokens for result in of_adapter),
                "first_token": {key: first_tokens[key] for key in ("mean", "p50", "p99")},
            }
        )
    return rows


def fairness(results: Sequence[CallResult]) -> dict[str, Any]:
    """Of the adapters' mean first-token times, and of their mean times per output token.

    An adapter without a success counts as 0, so that starving it makes the index fall.

    Returns:
        `first_token` and `per_output_token`: Jain's indices; `worst`: the adapter with the highest 99th percentile of
        first-token times, and that; `starved`: how many had no success.
    """
    first: dict[str, list[float]] = {result.adapter: [] for result in results}
    per_token: dict[str, list[float]] = {result.adapter: [] for result in results}
    for result in results:
        if result.ok and result.first_token is not None:
            first[result.adapter].append(result.first_token)
            per_token[result.adapter].append(result.total / max(1, result.num_tokens))
    served = [row for row in per_adapter(results) if row["first_token"]["p99"] is not None]
    worst = max(served, key=lambda row: row["first_token"]["p99"], default=None)
    return {
        "first_token": jain([math.fsum(values) / max(1, len(values)) for values in first.values()]),
        "per_output_token": jain([math.fsum(values) / max(1, len(values)) for values in per_token.values()]),
        "worst": worst and {"name": worst["name"], "first_token_p99": worst["first_token"]["p99"]},
        "starved": len(first) - len(served),
    }

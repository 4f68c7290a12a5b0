"""A run as it was measured, and the limits that its requests are held against."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from loadtest.churn_review import ChurnReview
from loadtest.client import CallResult
from loadtest.generator import Outcome
from loadtest.workload import Workload


@dataclass(frozen=True, slots=True)
class Slo:
    """Limits in seconds that one request must keep to be good."""

    first_token: float = 6.0  # S-LoRA's
    inter_token: float = 1.0  # the request's mean gap between tokens
    end_to_end: float = 60.0

    def kept(self, result: CallResult) -> dict[str, bool]:
        """Which limits a request kept; one that failed kept none."""
        gaps = result.token_gaps
        return {
            "first_token": result.ok and result.first_token is not None and result.first_token < self.first_token,
            "inter_token": result.ok and (not gaps or math.fsum(gaps) / len(gaps) < self.inter_token),
            "end_to_end": result.ok and result.total < self.end_to_end,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Measurement:
    """One finished, interrupted or broken-off run, as it was measured."""

    label: str
    workload: Workload
    slo: Slo
    outcomes: Sequence[Outcome]
    results: Sequence[CallResult]  # of all processes, in the order they were due
    prompt_tokens: Mapping[str, int]  # of every request, by its id
    start: float  # time.monotonic() of second 0
    wall: float  # seconds from there to the end
    unplayed: int = 0  # items of a trace after `num_requests` or `duration`
    dropped: int = 0  # items of a trace too long for the server
    server: dict[str, str] = field(default_factory=dict)  # what it says of itself
    settings: dict[str, str] = field(default_factory=dict)  # of the server, that shape its speed
    memory: Sequence[tuple[float, float]] = ()  # time.monotonic(), bytes
    metrics_missed: str = ""  # which samples of the server's metrics there are not, in one line; empty: none missed
    mean_queue_seconds: float | None = None
    churn: ChurnReview | None = None
    interrupted: bool = False

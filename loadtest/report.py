"""From what was measured to the numbers of a report: one dictionary, which the table, the JSON and the page show."""

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from hdrh.histogram import HdrHistogram

from loadtest.client import CallResult
from loadtest.fairness import fairness, per_adapter
from loadtest.generator import Outcome
from loadtest.histogram import cumulative, hdr_histogram, percentile, spread
from loadtest.measurement import Measurement

LATE = 0.010  # seconds: beyond this at the 99th percentile the client, not the server, makes the latencies
BUSY = 0.9  # of one core
METRICS = ("first_token", "inter_token", "end_to_end")  # that have limits
NORMALIZED = ("per_output_token", "per_token")  # end to end
LATENCIES = (*METRICS, *NORMALIZED)
TIERS = {"cold": "disk", "host": "host", "hot": "device"}  # series of first-token times, by where the adapter was
_STRIP_SECONDS = 10.0  # S-LoRA's
_BEHIND = 0.1  # of the arrivals, not completed in time: a server that falls behind
_LEAD_IN = 0.25  # of the arrivals, not counted when completions are held against arrivals


def summarize(run: Measurement) -> dict[str, Any]:
    """All numbers of a run, durations in seconds; everything in it goes into JSON."""
    results = run.results
    excused = run.churn.refused if run.churn else frozenset()
    counted = [result for index, result in enumerate(results) if index not in excused]
    good = [result for result in counted if result.ok]
    values = latencies(good, run.prompt_tokens)
    offered = None if run.workload.concurrency else _offered(results, run.start)
    kept = [run.slo.kept(result) for result in counted]
    all_kept = sum(all(limits.values()) for limits in kept)
    return {
        "label": run.label,
        "offered_requests_s": offered,
        "requests": len(counted),
        "completed": len(good),
        "failed": len(counted) - len(good),
        "unsent": sum(outcome.unsent for outcome in run.outcomes),
        "cut": sum(outcome.cut for outcome in run.outcomes),
        "unplayed": run.unplayed,
        "dropped": run.dropped,
        "left_out": _left_out(run),
        "interrupted": run.interrupted,
        "server_lost": next((outcome.server_lost for outcome in run.outcomes if outcome.server_lost), ""),
        "processes_lost": _processes_lost(run.outcomes),
        "codes": dict(Counter(result.code for result in counted)),
        "failures": _failures(counted, run.start),
        "first_error": next((f"{result.code}: {result.details}" for result in counted if not result.ok), ""),
        "wall_s": run.wall,
        "requests_s": len(good) / run.wall,
        "strip_requests_s": strip_throughput(len(good), offered, run.wall),
        "output_tokens_s": sum(result.num_tokens for result in good) / run.wall,
        "balance": None if run.workload.concurrency else balance(counted, run.start),
        "seconds": {name: spread(values[name]) for name in LATENCIES},
        "mean_queue_s": run.mean_queue_seconds,
        "cumulative": {name: cumulative(values[name]) for name in LATENCIES},
        "slo": {name: getattr(run.slo, name) for name in METRICS},
        "attainment": {
            **{name: _share(sum(limits[name] for limits in kept), len(kept)) for name in METRICS},
            "all": _share(all_kept, len(kept)),
        },
        "satisfaction": satisfaction(counted, run.slo.first_token),
        "goodput_requests_s": all_kept / run.wall,
        "adapters": per_adapter(counted),
        "fairness": fairness(counted),
        "tiers": _by_tier(counted),
        "memory": [(at - run.start, size) for at, size in run.memory],
        "metrics_missed": run.metrics_missed,
        "churn": run.churn.summary() if run.churn else None,
        "client": _client(results, run.outcomes),
    }


def latencies(results: Iterable[CallResult], prompt_tokens: Mapping[str, int]) -> dict[str, list[float]]:
    """Seconds of each kind, of requests that ended well; S-LoRA's latencies per token are the last two.

    Args:
        prompt_tokens: of each request, by its id.
    """
    good = [result for result in results if result.ok]
    return {
        "first_token": [result.first_token for result in good if result.first_token is not None],
        "inter_token": [gap for result in good for gap in result.token_gaps],
        "end_to_end": [result.total for result in good],
        "per_output_token": [result.total / result.num_tokens for result in good if result.num_tokens],
        "per_token": [
            result.total / (prompt_tokens[result.request_id] + result.num_tokens)
            for result in good
            if result.num_tokens
        ],
    }


def histograms(run: Measurement) -> dict[str, HdrHistogram]:
    found = latencies(run.results, run.prompt_tokens)
    return {name: hdr_histogram(seconds) for name, seconds in found.items()}


def strip_throughput(completed: int, offered: float | None, wall: float) -> float | None:
    """S-LoRA's: requests/s without ten seconds at both ends and as many requests as are offered in them.

    None where there is nothing left: of a closed loop, of a run of less than twenty seconds, or of fewer requests.
    """
    seconds = wall - 2 * _STRIP_SECONDS
    if offered is None or seconds <= 0 or completed <= 2 * _STRIP_SECONDS * offered:
        return None
    return (completed - 2 * _STRIP_SECONDS * offered) / seconds


def satisfaction(results: Sequence[CallResult], limit: float) -> float | None:
    """S-LoRA's: the mean of 1 − (t / limit)² over first-token times, 0 beyond the limit and for failed requests."""
    scores = [
        max(0.0, 1 - (result.first_token / limit) ** 2) if result.ok and result.first_token is not None else 0.0
        for result in results
    ]
    return math.fsum(scores) / len(scores) if scores else None


def balance(results: Sequence[CallResult], start: float) -> dict[str, Any]:
    """Arrivals and completions between a lead-in and the last arrival, and whether the server kept up with them.

    While a server keeps up, the number of requests inside it has a mean m and a variance of about m, so completions
    differ from arrivals by chance with a deviation of √(2m). It fell behind where they differ by more than a tenth and
    two deviations.
    """
    until = max((result.due for result in results), default=start)
    since = start + _LEAD_IN * (until - start)
    inside = sum(result.due <= since < result.ended for result in results)
    arrived = sum(since < result.due <= until for result in results)
    completed = sum(since < result.ended <= until for result in results if result.ok)
    missing = arrived - completed
    return {
        "arrived": arrived,
        "completed": completed,
        "kept_up": arrived > 0 and missing <= _BEHIND * arrived + 2 * math.sqrt(2 * inside),
    }


def _left_out(run: Measurement) -> str:
    """Which items of a trace were not sent, in one line; empty: none."""
    reasons = []
    if run.unplayed:
        limits = {"num_requests": run.workload.num_requests, "duration": run.workload.duration}
        cut = " and ".join(f"{name} {limit:,}" for name, limit in limits.items() if limit)
        reasons.append(f"{run.unplayed:,} after its cut ({cut})")
    if run.dropped:
        reasons.append(f"{run.dropped:,} too long for the server")
    return "items of the trace were left out: " + ", ".join(reasons) if reasons else ""


def _processes_lost(outcomes: Sequence[Outcome]) -> str:
    """How many processes' results are missing, in one line; empty: none."""
    lost = sum(outcome.process_lost for outcome in outcomes)
    return f"{lost} of {len(outcomes)} load processes ended early, and their results are lost" if lost else ""


def _share(part: float, whole: float) -> float | None:
    return part / whole if whole else None


def _offered(results: Sequence[CallResult], start: float) -> float | None:
    span = max((result.due - start for result in results), default=0.0)
    return _share(len(results), span)


def _by_tier(results: Sequence[CallResult]) -> dict[str, dict[str, Any]]:
    """First-token times by where the server found each request's adapter, of all requests that had one."""
    made = {}
    for name, tier in TIERS.items():
        seconds = [
            result.first_token
            for result in results
            if result.ok and result.tier == tier and result.first_token is not None
        ]
        made[name] = {**spread(seconds), "cumulative": cumulative(seconds)}
    return made


def _failures(results: Sequence[CallResult], start: float) -> dict[str, list[tuple[float, int]]]:
    """Of every status code but OK, how many requests had ended with it by which second of the run."""
    ends: dict[str, list[float]] = defaultdict(list)
    for result in results:
        if not result.ok:
            ends[result.code].append(result.ended - start)
    return {
        code: [(second, round(share * len(seconds))) for second, share in cumulative(seconds)]
        for code, seconds in sorted(ends.items())
    }


def _client(results: Sequence[CallResult], outcomes: Sequence[Outcome]) -> dict[str, Any]:
    lateness = [result.lateness for result in results]
    lags = [lag for outcome in outcomes for lag in outcome.lags]
    late, lag = percentile(lateness, 99), percentile(lags, 99)
    cpu = max((outcome.cpu_share for outcome in outcomes), default=0.0)
    reasons = []
    if late > LATE:
        reasons.append(f"1 % of requests were sent more than {late * 1000:.0f} ms late")
    if lag > LATE:
        reasons.append(f"1 % of the time its event loop woke up more than {lag * 1000:.0f} ms late")
    if cpu > BUSY:
        reasons.append(f"it used {cpu:.0%} of a core")
    return {
        "processes": len(outcomes),
        "lateness_s": spread(lateness),
        "event_loop_lag_s": spread(lags),
        "cpu_share": cpu,
        "bottleneck": "the load test itself is a bottleneck: " + ", ".join(reasons) if reasons else "",
    }

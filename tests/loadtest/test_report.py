"""Numbers of a load test."""

import json
from dataclasses import replace
from typing import Any

import pytest

from loadtest.churn_review import ChurnReview
from loadtest.client import CallResult
from loadtest.measurement import Slo
from loadtest.report import balance, satisfaction, strip_throughput, summarize
from loadtest.workload import Workload
from tests.loadtest.conftest import BAD, GOOD, make_measurement


def test_failures_count_but_do_not_flatter_the_latencies() -> None:
    summary = summarize(make_measurement([GOOD, GOOD, BAD]))
    assert summary["codes"] == {"OK": 2, "NOT_FOUND": 1}
    assert (summary["requests"], summary["completed"], summary["failed"]) == (3, 2, 1)
    assert summary["first_error"] == "NOT_FOUND: gone"
    assert summary["output_tokens_s"] == 3.0
    assert summary["seconds"]["end_to_end"]["count"] == 2
    assert summary["seconds"]["inter_token"]["p90"] == 0.03
    assert summary["attainment"]["all"] == pytest.approx(2 / 3)
    json.dumps(summary, allow_nan=False)


def test_goodput_counts_requests_that_kept_every_limit() -> None:
    slo = Slo(first_token=0.2, inter_token=0.05, end_to_end=1.0)
    slow_start, stutter, long = replace(GOOD, first_token=0.3), replace(GOOD, token_gaps=(0.1,)), replace(GOOD, total=2)
    summary = summarize(make_measurement([GOOD, slow_start, stutter, long], slo=slo))
    assert summary["attainment"] == {"first_token": 0.75, "inter_token": 0.75, "end_to_end": 0.75, "all": 0.25}
    assert summary["goodput_requests_s"] == 0.5
    assert not any(slo.kept(BAD).values())


def test_satisfaction_falls_with_the_square_of_the_first_token() -> None:
    half, beyond = replace(GOOD, first_token=3.0), replace(GOOD, first_token=7.0)
    assert satisfaction([half], 6.0) == 0.75
    assert satisfaction([half, beyond, BAD], 6.0) == 0.25
    assert satisfaction([], 6.0) is None


def test_latencies_per_token_are_end_to_end_over_tokens() -> None:
    """Of 3 tokens after a prompt of 7, or 2."""
    results = [GOOD, replace(GOOD, request_id="1", total=1.0), BAD]
    spreads = summarize(make_measurement(results, prompt_tokens={"0": 7, "1": 2}))["seconds"]
    assert (spreads["per_output_token"]["p50"], spreads["per_output_token"]["max"]) == (0.5 / 3, 1.0 / 3)
    assert (spreads["per_token"]["p50"], spreads["per_token"]["max"]) == (0.05, 0.2)


def test_strip_throughput_leaves_out_both_ends() -> None:
    """At 4 requests a second for 50 s, then 10 s until the last are done: 120 in the 40 s between."""
    arrivals = [replace(GOOD, due=100.0 + index / 4, total=10.0) for index in range(1, 201)]
    assert summarize(make_measurement(arrivals, wall=60.0))["strip_requests_s"] == pytest.approx(120 / 40)
    assert strip_throughput(200, offered=4.0, wall=50.0) == 4.0, "a server that keeps up"
    assert strip_throughput(80, offered=4.0, wall=60.0) is None
    assert strip_throughput(80, offered=4.0, wall=20.0) is None
    assert strip_throughput(80, offered=None, wall=60.0) is None


def test_a_server_that_keeps_up_completes_what_arrives() -> None:
    arrivals = [replace(GOOD, due=100.0 + index, total=0.5) for index in range(101)]
    assert balance(arrivals, 100.0) == {"arrived": 75, "completed": 75, "kept_up": True}
    behind = [replace(result, total=result.due - 100.0) for result in arrivals]  # served at half the rate
    assert balance(behind, 100.0) == {"arrived": 75, "completed": 38, "kept_up": False}
    assert not balance([], 100.0)["kept_up"]


def test_chance_in_a_short_run_is_not_a_server_that_falls_behind() -> None:
    """Steady at 4 requests of 1.5 s inside, and the last four come at once."""
    steady = [replace(GOOD, due=100 + index * 0.375, total=1.5) for index in range(20)]
    bunch = [replace(GOOD, due=107.2, total=1.5) for _ in range(4)]
    counts = balance([*steady, *bunch], 100.0)
    assert counts["completed"] < 0.85 * counts["arrived"]
    assert counts["kept_up"]


def test_results_of_lost_processes_are_missed() -> None:
    run = make_measurement([GOOD])
    lost = replace(run.outcomes[0], results=(), process_lost=True)
    summary = summarize(replace(run, outcomes=[run.outcomes[0], lost]))
    assert summary["processes_lost"] == "1 of 2 load processes ended early, and their results are lost"
    assert summarize(run)["processes_lost"] == ""


def test_first_tokens_are_classed_by_where_the_server_found_the_adapter() -> None:
    """Every request of its own: an adapter may be read again after it had to go."""
    times = {"disk": (0.9, 0.8), "host": (0.4,), "device": (0.1, 0.2, 0.3), "": (5.0,)}  # the last on the base model
    results = [replace(GOOD, tier=tier, first_token=time) for tier, found in times.items() for time in found]
    tiers = summarize(make_measurement([*results, replace(BAD, tier="disk")]))["tiers"]
    assert {tier: (spread["count"], spread["max"]) for tier, spread in tiers.items()} == {
        "cold": (2, 0.9),
        "host": (1, 0.4),
        "hot": (3, 0.3),
    }


def test_failures_are_counted_over_time_by_code() -> None:
    failures = [replace(BAD, due=100.0 + index, total=0.5) for index in range(3)]
    late = replace(BAD, due=101.0, total=4.0, code="DEADLINE_EXCEEDED")
    summary = summarize(make_measurement([GOOD, *failures, late]))
    assert summary["failures"] == {"DEADLINE_EXCEEDED": [(5.0, 1)], "NOT_FOUND": [(0.5, 1), (1.5, 2), (2.5, 3)]}


@pytest.mark.parametrize(
    ("result", "values", "reason"),
    [
        (replace(GOOD, lateness=0.05), {}, "sent more than 50 ms late"),
        (GOOD, {"lag": 0.03}, "woke up more than 30 ms late"),
        (GOOD, {"cpu_share": 0.97}, "used 97% of a core"),
    ],
)
def test_a_client_that_is_the_bottleneck_is_named(result: CallResult, values: dict[str, Any], reason: str) -> None:
    assert reason in summarize(make_measurement([result], **values))["client"]["bottleneck"]


def test_a_punctual_client_is_no_bottleneck() -> None:
    assert summarize(make_measurement([GOOD], lag=0.001, cpu_share=0.5))["client"]["bottleneck"] == ""


def test_refusals_while_an_adapter_was_away_are_no_failures() -> None:
    review = ChurnReview(checked=2, refused=frozenset({1}), faults=(), operations=())
    summary = summarize(make_measurement([GOOD, BAD], churn=review))
    assert (summary["requests"], summary["failed"]) == (1, 0)
    assert summary["churn"]["refused_while_unloaded"] == 1


def test_refusals_while_an_adapter_was_away_do_not_make_the_server_fall_behind() -> None:
    results = [replace(GOOD if index % 2 else BAD, due=100.0 + index, total=0.5) for index in range(100)]
    away = ChurnReview(checked=50, refused=frozenset(range(0, 100, 2)), faults=(), operations=())
    assert summarize(make_measurement(results, churn=away))["balance"]["kept_up"]
    assert not summarize(make_measurement(results))["balance"]["kept_up"]


def test_a_closed_loop_offers_no_rate() -> None:
    summary = summarize(make_measurement([GOOD], workload=Workload(concurrency=4)))
    assert summary["offered_requests_s"] is None
    assert summary["strip_requests_s"] is None
    assert summary["balance"] is None

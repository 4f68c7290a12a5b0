"""Schedules against the formulas of the papers and scripts that they come from."""

from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from loadtest.named import WORKLOADS
from loadtest.schedule import Arrival, group_sizes, make_schedule
from loadtest.workload import Workload, WorkloadError

SLORA = Workload(rate=10, duration=300)
NAMES = [f"a{index}" for index in range(200)]
HEADER = "TIMESTAMP,ContextTokens,GeneratedTokens\n"


def arrivals(workload: Workload, names: list[str] = NAMES, max_model_len: int = 4096) -> tuple[Arrival, ...]:
    return make_schedule(workload, names, max_model_len).arrivals


def test_the_same_seed_is_the_same_schedule() -> None:
    assert arrivals(SLORA) == arrivals(SLORA)
    assert arrivals(SLORA) != arrivals(replace(SLORA, seed=43))


def test_slora_draws_in_the_order_of_its_script() -> None:
    np.random.seed(42)
    total = 3000
    ids = (np.random.power(1.0, total) * 200).astype(int)
    prompts, outputs = np.random.randint(8, 512, total), np.random.randint(8, 512, total)
    gaps = np.random.gamma(1.0, 1 / 10, total)
    drawn = arrivals(SLORA)
    assert [arrival.adapter for arrival in drawn] == [f"a{index}" for index in ids]
    assert [arrival.prompt_tokens for arrival in drawn] == prompts.tolist()
    assert [arrival.output_tokens for arrival in drawn] == outputs.tolist()
    assert [arrival.due for arrival in drawn] == pytest.approx(np.cumsum(gaps).tolist())


def test_the_power_law_gives_adapters_below_k_their_share() -> None:
    drawn = arrivals(replace(SLORA, alpha=0.1, duration=1000))
    share = sum(arrival.adapter == "a0" for arrival in drawn) / len(drawn)
    assert share == pytest.approx((1 / 200) ** 0.1, abs=0.02)  # 59 %


@pytest.mark.parametrize("cv", [1.0, 4.0])
def test_gaps_have_their_mean_and_variation(cv: float) -> None:
    gaps = np.diff([arrival.due for arrival in arrivals(replace(SLORA, cv=cv, duration=5000))])
    assert gaps.mean() == pytest.approx(1 / 10, rel=0.1)
    assert gaps.std() / gaps.mean() == pytest.approx(cv, rel=0.1)


def test_popularity_classes_of_punica() -> None:
    assert group_sizes("identical", 7, 200) == [7]
    assert group_sizes("uniform", 10, 200) == [3, 3, 2, 2]
    assert group_sizes("uniform", 10, 3) == [4, 3, 3]
    assert group_sizes("skewed", 32, 200) == [11, 7, 5, 3, 2, 2, 1, 1]  # floor(1.5^k), and the rest
    for popularity in ("identical", "uniform", "skewed"):
        assert sum(group_sizes(popularity, 1024, 200)) == 1024
    drawn = arrivals(replace(WORKLOADS["punica-uniform"][1]))
    assert set(Counter(arrival.adapter for arrival in drawn).values()) == {1024 // 32}


def test_a_distinct_adapter_comes_again_only_when_all_have_come() -> None:
    drawn = [arrival.adapter for arrival in arrivals(WORKLOADS["punica-distinct"][1])]
    assert all(len(set(drawn[start : start + 200])) == len(drawn[start : start + 200]) for start in range(825))
    assert set(Counter(drawn).values()) == {1024 // 200, 1024 // 200 + 1}


def test_lengths_of_punica() -> None:
    drawn = arrivals(replace(WORKLOADS["punica-identical"][1], num_requests=20_000))
    prompts = np.array([arrival.prompt_tokens for arrival in drawn])
    ends = prompts + [arrival.output_tokens for arrival in drawn]
    assert np.median(prompts) == pytest.approx(17, abs=1)  # -1 + 18
    assert np.log(prompts[prompts > 1] + 1).std() == pytest.approx(0.8, rel=0.1)
    assert ends.max() == 2047
    assert np.median(ends) == pytest.approx(1024, rel=0.05)  # uniform over the context
    assert (ends - prompts).min() == 2


def test_popularity_drifts() -> None:
    workload = Workload(rate=100, duration=20, alpha=0.05, drift_seconds=5)
    drawn = arrivals(workload, ["a", "b", "c", "d"])
    most = [
        Counter(arrival.adapter for arrival in drawn if start <= arrival.due < start + 5).most_common(1)[0][0]
        for start in (0, 5, 10)
    ]
    assert most == ["a", "b", "c"]


def test_without_adapters_the_base_model_is_asked() -> None:
    assert {arrival.adapter for arrival in arrivals(replace(SLORA, num_requests=5), [])} == {""}


def test_requests_that_are_too_long_are_refused_before_the_run() -> None:
    with pytest.raises(WorkloadError, match="the server takes 512: lower prompt_tokens and output_tokens"):
        arrivals(SLORA, max_model_len=512)


def trace(folder: Path, text: str) -> Workload:
    path = folder / "trace.csv"
    path.write_text(text)
    return replace(WORKLOADS["replay"][1], trace=str(path))


def test_a_trace_in_the_azure_format(tmp_path: Path) -> None:
    rows = (
        "2023-11-16 18:17:05.0799600,396,109\n"
        "2023-11-16 18:17:03.9799600,4808,10\n"  # not in order, and too long for the server
        "2023-11-16 18:17:04.0799600,110,27\n"
    )
    schedule = make_schedule(trace(tmp_path, HEADER + rows), ["a"], 4096)
    assert [(a.prompt_tokens, a.output_tokens) for a in schedule.arrivals] == [(110, 27), (396, 109)]
    assert [arrival.due for arrival in schedule.arrivals] == pytest.approx([0.1, 1.1], abs=1e-4)
    assert schedule.span == pytest.approx(1.1, abs=1e-4)
    assert schedule.dropped == 1


def test_a_trace_is_stretched_to_a_rate_and_cut(tmp_path: Path) -> None:
    rows = "".join(f"2024-05-10 00:00:{second:02}+00:00,8,8\n" for second in range(60))
    workload = trace(tmp_path, HEADER + rows)
    assert len(arrivals(replace(workload, duration=10.0))) == 11
    assert make_schedule(replace(workload, duration=10.0), ["a"], 4096).unplayed == 49
    assert len(arrivals(replace(workload, num_requests=7))) == 7
    assert arrivals(replace(workload, rate=10.0))[-1].due == pytest.approx(5.9)


def test_a_replay_plays_the_whole_trace(tmp_path: Path) -> None:
    rows = "".join(f"2024-05-10 {hour:02}:00:00,8,8\n" for hour in range(24))
    schedule = make_schedule(trace(tmp_path, HEADER + rows), ["a"], 4096)
    assert (len(schedule.arrivals), schedule.span, schedule.unplayed) == (24, 23 * 3600, 0)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("TIMESTAMP,ContextTokens\n", "no column GeneratedTokens"),
        (HEADER + "2023-11-16 18:17:03,1,1\nsoon,1,1\n", "line 3: Invalid isoformat"),
        (HEADER + "2023-11-16 18:17:03,many,1\n", "line 2: invalid literal"),
        (HEADER + "2023-11-16 18:17:03\n", "line 2: "),
        (HEADER + "2023-11-16 18:17:03,1,1\n", "at least two items"),
        (HEADER + "2023-11-16 18:17:03,9000,1\n2023-11-16 18:17:04,9000,1\n", "no item fits into 4,096 tokens"),
    ],
)
def test_a_bad_trace_is_refused_with_its_line(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(WorkloadError, match=message):
        arrivals(trace(tmp_path, text))


def test_a_trace_that_is_not_there() -> None:
    with pytest.raises(WorkloadError, match=r"cannot read trace trace\.csv"):
        arrivals(WORKLOADS["replay"][1])


def test_a_closed_loop_has_no_times() -> None:
    drawn = arrivals(WORKLOADS["punica-distinct"][1])
    assert {arrival.due for arrival in drawn} == {0.0}

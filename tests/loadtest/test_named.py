"""Named workloads, workload files, and flags over both."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from loadtest.named import WORKLOADS, load_workload
from loadtest.workload import Workload, WorkloadError


@pytest.fixture
def write(tmp_path: Path) -> Any:
    def write(text: str) -> str:
        path = tmp_path / "mine.yaml"
        path.write_text(text)
        return str(path)

    return write


def test_flags_go_over_a_named_workload() -> None:
    name, workload = load_workload("slora-short", {"rate": 5.0, "prompt_tokens": "4:9"})
    assert (name, workload.rate, workload.prompt_tokens, workload.output_tokens) == (
        "slora-short",
        5.0,
        (4, 9),
        (8, 64),
    )


def test_a_file_starts_from_another_and_flags_go_over_it(write: Any) -> None:
    path = write('like: burst-4-short\nrate: 3\nprompt_tokens: [4, 16]\noutput_tokens: "2:5"\n')
    name, workload = load_workload(path, {"seed": 7})
    assert (name, workload.cv, workload.rate, workload.seed) == ("mine", 4, 3.0, 7)
    assert (workload.prompt_tokens, workload.output_tokens) == ((4, 16), (2, 5))
    assert load_workload(write("rate: 3\n"), {})[1] == Workload(rate=3.0)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("rate: [", "is not YAML"),
        ("- rate", "a mapping of keys to values"),
        ("", "a mapping of keys to values"),
        ("like: nothing", "like is 'nothing', which is no named workload; `loraplex loadtest workloads` lists them"),
        ("ratte: 3", "unknown key 'ratte'; keys: like, rate"),
        ("rate: fast", "rate is 'fast': it takes a number"),
        ("rate: true", "rate is True: it takes a number"),
        ("rate: -1", "rate is -1.0: it takes 0 to 1,000,000"),
        ("rate: .nan", "rate is nan: it takes 0 to 1,000,000"),
        ("rate: 1.0e+200\nduration: 1.0e+200", r"rate is 1e\+200: it takes 0 to 1,000,000"),
        (f"rate: {10**400}", "rate is 10{400}: it takes 0 to 1,000,000"),
        ("rate: 2024-99-99", "is not YAML: month must be in"),
        (f"rate: {'[' * 1000}{']' * 1000}", "is not YAML: maximum recursion depth exceeded"),
        ("duration: .inf", "duration is inf: it takes 0 to 10,000,000"),
        ("cv: 1.0e-200", "cv is 1e-200: it takes 0.001 to 100"),
        ("alpha: 1.0e+300", r"alpha is 1e\+300: it takes 0.001 to 100"),
        ("prompt_tokens: [8, 99999999999999999999]", "prompt_tokens is 8:9{20}: .*, HIGH at most 10,000,000"),
        ("rate: 0", "an open loop without a trace needs a rate"),
        ("cv: 0", "cv is 0"),
        ("alpha: 0", "alpha is 0"),
        ("popularity: loud", "popularity is 'loud': it takes one of power, distinct"),
        ("prompt_tokens: [9, 4]", "LOW must be at least 1 and less than HIGH"),
        ("prompt_tokens: 8:30", "it takes two whole numbers"),
        ("prompt_tokens: a:b", "prompt_tokens: invalid literal"),
        ("drift_seconds: 9\nconcurrency: 4", "drift_seconds is 9 and concurrency 4: a closed loop has no times"),
        ("ranks: 8", r"ranks is 8: it takes whole numbers from 1 to 10,000, \[8, 16\] in a file and 8,16 as a flag"),
        ("ranks: [8, 0]", r"ranks is \(8, 0\): it takes whole numbers from 1"),
        ("ranks: 8,x", "ranks: invalid literal"),
        ("rate: 1000000\nduration: 1000000", "1 to 10,000,000 can be sent"),
    ],
)
def test_a_bad_file_is_refused_by_key(write: Any, text: str, message: str) -> None:
    path = write(text)
    with pytest.raises(WorkloadError, match=message) as refused:
        load_workload(path, {})
    assert str(refused.value).startswith(path)
    assert "\n" not in str(refused.value)


def test_a_name_that_is_none() -> None:
    with pytest.raises(WorkloadError, match=r"no workload 'slow': give a \.yaml file or a named workload; `lora"):
        load_workload("slow", {})
    with pytest.raises(WorkloadError, match="cannot read workload"):
        load_workload("nowhere.yaml", {})


SYNTHETIC: dict[str, dict[str, Any]] = {
    "slora": {},
    "uniform-1": {"num_adapters": 1},
    "uniform-5": {"num_adapters": 5},
    "uniform-20": {"num_adapters": 20},
    "uniform-100": {"num_adapters": 100},
    "uniform-200": {},
    "uniform-1000": {"num_adapters": 1000},
    "uniform-2000": {"num_adapters": 2000},
    "skew-0.1": {"alpha": 0.1},
    "skew-0.3": {"alpha": 0.3},
    "skew-0.6": {"alpha": 0.6},
    "skew-1": {},
    "burst-1": {},
    "burst-2": {"cv": 2},
    "burst-4": {"cv": 4},
    "burst-6": {"cv": 6},
    "burst-8": {"cv": 8},
    "ranks-8": {"ranks": (8,)},
    "ranks-16": {"ranks": (16,)},
    "ranks-8-16-32-64": {"ranks": (8, 16, 32, 64)},
    "switch": {"num_adapters": 8, "rate": 4, "num_requests": 400, "alpha": 0.3, "drift_seconds": 12.5},
}
SHORT = {"prompt_tokens": (8, 64), "output_tokens": (8, 64)}
PUNICA = {"num_requests": 1024, "concurrency": 32, "num_adapters": -1, "lengths": "punica", "seed": 0xABCDABCD987}
OTHERS: dict[str, dict[str, Any]] = {
    **{f"punica-{kind}": PUNICA | {"popularity": kind} for kind in ("distinct", "identical", "uniform", "skewed")},
    "churn": SHORT | {"num_adapters": 8, "alpha": 0.3, "duration": 60, "churn_seconds": 0.5},
    "replay": {"rate": 0, "duration": 0, "trace": "trace.csv"},
}


def test_the_settings_of_the_literature() -> None:
    default = asdict(Workload())
    slora = {"rate": 2, "duration": 300, "alpha": 1, "cv": 1, "num_adapters": 200, "seed": 42, "popularity": "power"}
    assert default.items() >= (slora | {"prompt_tokens": (8, 512), "output_tokens": (8, 512)}).items()
    differences = {
        name: {key: value for key, value in asdict(workload).items() if value != default[key]}
        for name, (_, workload) in WORKLOADS.items()
    }
    assert differences == SYNTHETIC | {f"{name}-short": values | SHORT for name, values in SYNTHETIC.items()} | OTHERS
    assert default["max_tokens"] == 2048  # Punica's

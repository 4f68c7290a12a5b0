"""Named workloads, workload files, and flags over both."""

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
    path = write('like: burst\nrate: 3\nprompt_tokens: [4, 16]\noutput_tokens: "2:5"\n')
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
        ("like: nothing", "like is 'nothing'; named workloads: slora"),
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
    with pytest.raises(WorkloadError, match=r"no workload 'slow': give a \.yaml file or one of slora"):
        load_workload("slow", {})
    with pytest.raises(WorkloadError, match="cannot read workload"):
        load_workload("nowhere.yaml", {})


def test_the_literatures_settings() -> None:
    slora, punica = WORKLOADS["slora"][1], WORKLOADS["punica-skewed"][1]
    assert (slora.rate, slora.duration, slora.alpha, slora.cv, slora.num_adapters) == (2, 300, 1, 1, 200)
    assert (slora.prompt_tokens, slora.output_tokens) == ((8, 512), (8, 512))
    assert (punica.num_requests, punica.concurrency, punica.seed, punica.max_tokens) == (1024, 32, 0xABCDABCD987, 2048)
    assert {workload.num_adapters for name, (_, workload) in WORKLOADS.items() if name.startswith("punica")} == {-1}

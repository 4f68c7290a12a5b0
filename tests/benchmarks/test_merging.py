"""Merging unasked against never: which adapters the loads are on, the arithmetic, and a run on the tiny model."""

import json
from collections import Counter
from pathlib import Path

import pytest
from click.testing import CliRunner

from benchmarks.merging import Run, loads, summary
from server.cli import main
from tests.conftest import ADAPTERS


def test_who_is_asked_for() -> None:
    chosen = loads(3)
    assert chosen["alone"] == [0]
    assert chosen["mixed"] == [0, 1, 2]
    assert Counter(chosen["skewed"]) == {0: 18, 1: 1, 2: 1}


def test_ratios_are_of_pairs() -> None:
    found = summary([(Run(100, 0), Run(90, 1)), (Run(50, 0), Run(50, 0)), (Run(10, 0), Run(12, 2))])
    assert found["ratio"] == 1.0
    assert found["ratios"] == pytest.approx([0.9, 1.2])
    assert found["merges"] == [1, 0, 2]
    assert (found["off_tok_s"], found["auto_tok_s"]) == (50, 50)


def test_a_run(model_dir: Path, adapters_dir: Path) -> None:
    command = ["bench", "merge", "--model", str(model_dir), "--device", "cpu", "--adapters-dir", str(adapters_dir)]
    shape = [
        "--num-adapters",
        "2",
        "--num-prompts",
        "4",
        "--prompt-tokens",
        "5",
        "--output-tokens",
        "6",
        "--rounds",
        "2",
    ]
    done = CliRunner().invoke(main, [*command, *shape])
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert found["merge_ms"] > 0
    for load in ("alone", "skewed", "mixed"):
        assert len(found[load]["merges"]) == 2
        assert found[load]["ratios"][0] <= found[load]["ratio"] <= found[load]["ratios"][1]


def test_what_cannot_be_measured_is_said(model_dir: Path, adapters_dir: Path) -> None:
    command = ["bench", "merge", "--model", str(model_dir), "--device", "cpu", "--adapters-dir", str(adapters_dir)]
    for arguments, reason in (
        (["--num-adapters", str(len(ADAPTERS) + 1)], f"holds {len(ADAPTERS)}"),
        (["--num-adapters", "2", "--output-tokens", "999"], "--max-model-len"),
    ):
        done = CliRunner().invoke(main, [*command, *arguments])
        assert done.exit_code == 2
        assert reason in done.output

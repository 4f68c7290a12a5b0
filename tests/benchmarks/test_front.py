"""The front against the engine alone: the arithmetic, and a run on the tiny model with a real client."""

import json
import os
from pathlib import Path

import pytest
from click.testing import CliRunner

from benchmarks.front import summary
from server.cli import main


def test_ratios_are_of_pairs() -> None:
    found = summary([(100, 90), (50, 50), (10, 8)])
    assert found == {"alone_tok_s": 50, "front_tok_s": 50, "ratio": 0.9, "ratios": [0.9, 1.0, 0.8]}


def test_a_run(model_dir: Path, adapters_dir: Path) -> None:
    command = ["bench", "front", "--model", str(model_dir), "--device", "cpu", "--adapters-dir", str(adapters_dir)]
    command += ["--num-adapters", "2", "--streams", "3", "--prompt-tokens", "5", "--output-tokens", "12"]
    command += ["--client-processor", str(max(os.sched_getaffinity(0)))]
    done = CliRunner().invoke(main, [*command, "--rounds", "2"])
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert len(found["ratios"]) == 2
    assert min(found["ratios"]) <= found["ratio"] <= max(found["ratios"])
    assert found["alone_tok_s"] > 0


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--num-adapters", "99"], "holds"),
        (["--output-tokens", "999"], "--max-model-len"),
        (["--client-processor", "9999"], "nothing can run there"),
    ],
)
def test_what_cannot_be_measured_is_said(
    model_dir: Path, adapters_dir: Path, arguments: list[str], reason: str
) -> None:
    command = ["bench", "front", "--model", str(model_dir), "--device", "cpu", "--adapters-dir", str(adapters_dir)]
    done = CliRunner().invoke(main, [*command, *arguments])
    assert done.exit_code == 2
    assert reason in done.output

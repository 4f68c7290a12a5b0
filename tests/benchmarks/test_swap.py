"""Loads beside streams: the arithmetic of the report, and a run in earnest on the tiny model."""

import json
import shutil
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from benchmarks.swap import Observed, report
from server.cli import main
from tests.conftest import ADAPTERS


def test_report() -> None:
    quiet = Observed(gaps=[0.1, 0.1, 0.2])
    swapped = Observed(gaps=[0.1, 0.3], loads=[0.05, 0.07], warm=[0.25, 0.35], hot=[0.15, 0.15])
    found = report(quiet, swapped)
    assert found["step_ms"] == pytest.approx(100)
    assert found["gap_steps"]["quiet"]["max"] == pytest.approx(2)
    assert found["gap_steps"]["swapping"] == pytest.approx({"p50": 1, "p99": 1, "max": 3, "count": 2})
    assert found["first_token_steps"]["warm_over_hot"] == pytest.approx(1.0)
    assert found["load_ms"] == pytest.approx({"p50": 50, "p99": 50, "max": 70, "count": 2})


def run(model_dir: Path, adapters_dir: Path, *arguments: str) -> Result:
    fixed = ["--model", str(model_dir), "--device", "cpu", "--adapters-dir", str(adapters_dir), "--adapter-slots", "6"]
    return CliRunner().invoke(main, ["bench", "swap", *fixed, *arguments])


def test_a_run(model_dir: Path, adapters_dir: Path) -> None:
    """A stream has at most one gap for each token but the first; fewer where it got several tokens at once."""
    shape = ["--streams", "4", "--num-adapters", "2", "--prompt-tokens", "5", "--output-tokens", "240"]
    done = run(model_dir, adapters_dir, *shape, "--every-ms", "5", "--rounds", "2")
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    for gaps in found["gap_steps"].values():
        assert 2 * 4 < gaps["count"] <= 2 * 4 * 239
        assert 0 < gaps["p50"] <= gaps["p99"] <= gaps["max"]
    assert found["gap_steps"]["quiet"]["p50"] == pytest.approx(1)
    loads = found["load_ms"]["count"]
    assert loads >= 2
    assert found["first_token_steps"]["hot"]["count"] == found["first_token_steps"]["warm"]["count"] == loads
    assert found["step_ms"] > 0


def test_what_cannot_be_measured_is_said(model_dir: Path, adapters_dir: Path, tmp_path: Path) -> None:
    for arguments, reason in (
        (["--num-adapters", str(len(ADAPTERS))], f"holds {len(ADAPTERS)}; one more"),
        (["--num-adapters", "2", "--output-tokens", "999"], "--max-model-len"),
    ):
        done = run(model_dir, adapters_dir, *arguments)
        assert done.exit_code == 2
        assert reason in done.output
    shutil.copytree(adapters_dir / "plain", tmp_path / "good")
    shutil.copytree(adapters_dir / "plain", tmp_path / "sick")
    (tmp_path / "sick" / "adapter_model.safetensors").write_bytes(b"no weights")
    done = run(model_dir, tmp_path, "--num-adapters", "1")
    assert done.exit_code == 2
    assert "adapter 'sick'" in done.output

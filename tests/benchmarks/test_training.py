"""Training beside PEFT's: the arithmetic of the summary, and a run in earnest on the tiny model."""

import json
import sys
from importlib.metadata import version
from pathlib import Path

from click.testing import CliRunner

from benchmarks.training import summary
from server.cli import main


def run(tokens: int, seconds: float, *losses: list[float]) -> dict[str, object]:
    return {"version": "1", "tokens": tokens, "seconds": seconds, "losses": list(losses)}


def test_summary() -> None:
    own = [run(100, 1, [3.0, 2.0, 1.0], [4.0, 3.0, 2.0]), run(100, 2, [], []), run(100, 4, [], [])]
    theirs = [run(100, 2, [3.0, 2.0, 1.25], [4.0, 3.5, 2.0]), run(100, 2, [], []), run(100, 1, [], [])]
    found = summary({"loraplex": own, "peft": theirs})
    assert found["tok_s"] == {"loraplex": 50, "peft": 50}
    assert (found["ratio"], found["ratios"]) == (1.0, [0.25, 2.0])
    assert found["losses"] == {"loraplex": [[3.0, 1.0], [4.0, 2.0]], "peft": [[3.0, 1.25], [4.0, 2.0]]}
    assert found["largest_difference_of_losses"] == 0.5
    assert "ratio" not in summary({"loraplex": own[:1]})


def test_loraplex_and_peft_learn_the_same(model_dir: Path) -> None:
    """Three processes: two adapters at once here, one after the other there, every loss the same."""
    arguments = ["bench", "train", "--model", str(model_dir), "--jobs", "2", "--tasks", "dates,contacts", "--rank", "4"]
    arguments += ["--batch-tokens", "200", "--steps", "3", "--rounds", "1", "--threads", "1", "--peft", sys.executable]
    done = CliRunner().invoke(main, arguments)
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert found["largest_difference_of_losses"] < 1e-3
    assert found["ratio"] == found["tok_s"]["loraplex"] / found["tok_s"]["peft"]
    assert all(last < first for jobs in found["losses"].values() for first, last in jobs)
    assert found["versions"]["peft"].startswith(f"peft {version('peft')}, transformers {version('transformers')}")


def test_what_cannot_be_measured_is_said(model_dir: Path, tmp_path: Path) -> None:
    broken = tmp_path / "python"
    broken.write_text("#!/bin/sh\necho 'ImportError: no peer' >&2\nexit 1\n")
    broken.chmod(0o755)
    for arguments, reason in (
        (["--tasks", "dates,poems"], "'poems' is not one of dates, contacts, tickets"),
        (["--model", str(tmp_path / "absent")], "no such folder"),
        (["--peft", str(broken), "--steps", "2", "--rounds", "1", "--threads", "1"], "ImportError: no peer"),
    ):
        done = CliRunner().invoke(main, ["bench", "train", "--model", str(model_dir), *arguments])
        assert done.exit_code in (1, 2)
        assert reason in done.output

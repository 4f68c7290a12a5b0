"""Many adapters against few, in earnest on the tiny model."""

import json
from pathlib import Path

import numpy as np
from click.testing import CliRunner

from benchmarks.many_adapters import Load, spread
from server.cli import main


def test_popularity_follows_the_power_law() -> None:
    load = Load(
        num_adapters=100, alpha=0.3, num_requests=20000, concurrency=1, prompt_tokens=1, output_tokens=1, seed=1
    )
    choices = np.array(load.choices())
    assert load.choices() == choices.tolist(), "the same seed, the same requests"
    for below in (1, 10, 50):
        assert abs((choices < below).mean() - (below / 100) ** 0.3) < 0.02


def test_spread() -> None:
    found = spread([3.0, 1.0, 2.0])
    assert (found.p50, found.max, found.count) == (2.0, 3.0, 3)


def test_a_run(model_dir: Path, tmp_path: Path) -> None:
    arguments = ["bench", "adapters", "--model", str(model_dir), "--work-dir", str(tmp_path), "--device", "cpu"]
    arguments += [
        "--registered",
        "12",
        "--alpha",
        "1",
        "--few",
        "2",
        "--requests",
        "20",
        "--concurrency",
        "4",
        "--rounds",
        "1",
    ]
    arguments += ["--prompt-tokens", "5", "--output-tokens", "4", "--adapter-slots", "3", "--max-num-seqs", "4"]
    done = CliRunner().invoke(main, [*arguments, "--adapter-host-bytes", "400000"])
    assert done.exit_code == 0, done.output
    report = json.loads(done.stdout)
    many = report["many"]
    assert report["ratio"] == report["many_tok_s"] / report["few_tok_s"]
    assert sum(tier["count"] for tier in many["first_token"].values()) == 20
    assert many["host_loads"] > 0
    assert many["adapter_wait"]["disk"]["count"] > 0  # two requests may wait for one load
    assert many["host_evictions"] > 0
    assert many["device_loads"] > 3

"""The native kernels against torch's: that both do the same work, and a run on the tiny model's sizes."""

import json
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from benchmarks.kernels import Shape, attention_calls
from server.cli import main
from server.kernels import native

pytestmark = pytest.mark.skipif(not native.available(), reason="the native kernels are not built")

SHAPE = Shape(layers=1, hidden=32, intermediate=48, heads=6, kv_heads=2, head_dim=16)


@pytest.mark.parametrize("queries", [1, 50])
def test_both_attend_to_the_same(queries: int) -> None:
    calls = attention_calls(SHAPE, queries, 50)
    out = calls["native"]()
    assert out.shape == (queries, SHAPE.heads, SHAPE.head_dim)
    torch.testing.assert_close(out, calls["torch"](), rtol=1e-5, atol=1e-5)


def test_a_run(model_dir: Path) -> None:
    sizes = ["--rows", "1", "--rows", "20", "--prompts", "40", "--contexts", "17", "--rounds", "2"]
    done = CliRunner().invoke(main, ["bench", "kernels", "--model", str(model_dir), *sizes])
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert found["linear_ms"].keys() == {"1", "20"}
    assert found["prompt_attention_ms"].keys() == {"40"}
    assert found["decode_attention_ms"].keys() == {"17"}
    measured = [*found["linear_ms"].values(), found["prompt_attention_ms"]["40"], found["decode_attention_ms"]["17"]]
    assert all(value > 0 for medians in measured for value in medians.values())
    assert all({"native", "torch"} <= medians.keys() for medians in measured)

"""Adapters that are not merged, because others beside them could not be served: asked or unasked, with traffic."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors.torch

from adapters.config import WEIGHTS_FILE
from server.errors import MergeRefused
from server.kernels import native
from server.lora.adapter import Adapter, WeightedAdapter
from tests.server.engine.conftest import Engine, eager_policy

MODULE = "model.layers.0.mlp.up_proj"


@pytest.fixture(params=["float32", "bfloat16", "torch"])
def engine(model_dir: Path, request: pytest.FixtureRequest) -> Engine:
    if request.param == "torch":
        return Engine(model_dir, kernels="torch")
    if not native.available():
        pytest.skip("the native kernels are not built")
    return Engine(model_dir, dtype=request.param)


def fill(adapter: Adapter, lora_a: float, lora_b: float) -> None:
    adapter.weights[MODULE].lora_a.fill_(lora_a)
    adapter.weights[MODULE].lora_b.fill_(lora_b)


def grow(adapter: Adapter, factor: float) -> None:
    for layer in adapter.weights.values():
        layer.lora_b.mul_(factor)


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda adapter: fill(adapter, 3e38, 3e38), "it could overflow"),  # W + s · B A is infinite
        (lambda adapter: fill(adapter, 3e38, 1e-38), "it could overflow"),  # the sum is finite, A x is not
        (lambda adapter: fill(adapter, 1e10, 1e20), r"it changes .*up_proj by up to 1\.28e\+32 where"),
        (lambda adapter: grow(adapter, 1e5), "rounding would show in other requests' answers"),
    ],
    ids=["overflow", "overflow on the way", "huge", "large everywhere"],
)
def test_good_traffic_goes_on_beside_it(
    engine: Engine,
    adapters_dir: Path,
    prompts: list[list[int]],
    spoil: Callable[[Adapter], None],
    reason: str,
) -> None:
    good, bad = engine.load(adapters_dir / "attention"), engine.load(adapters_dir / "plain")
    spoil(bad)
    mixture = [WeightedAdapter(good, 0.5)]
    work = [(prompts[0], None), (prompts[1], good), (prompts[2], mixture)]
    expected = engine.generate(work)

    with pytest.raises(MergeRefused, match=f"'plain' cannot be merged: .*{reason}"):
        engine.merge(bad)
    assert engine.core.merged is None
    assert engine.generate(work) == expected

    policy = engine.core._merge_policy = eager_policy()
    engine.generate([(prompts[3], bad)] * 3)
    assert engine.core.merged is None
    assert engine.core._merge_policy is policy
    engine.submit(prompts[3], bad)
    assert engine.generate(work) == expected
    engine.generate([(prompts[1], good)])
    assert engine.core.merged is good


@pytest.mark.skipif(not native.available(), reason="the native kernels are not built")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_largest_that_is_merged_leaves_others_their_answers(
    model_dir: Path, adapters_dir: Path, prompts: list[list[int]], dtype: str
) -> None:
    """The limit is where rounding begins to show: under it no answer in float32 changes, and hardly one in bfloat16."""
    engine = Engine(model_dir, dtype=dtype)
    large = engine.load(adapters_dir / "plain")
    base = [(prompt, None) for prompt in prompts]
    expected = engine.generate(base, max_tokens=1)
    while not engine.parts.runner.lora.why_no_merge(large):
        grow(large, 1.5)
    grow(large, 1 / 1.5)
    engine.merge(large)
    same = sum(a == b for a, b in zip(engine.generate(base, max_tokens=1), expected, strict=True))
    assert same == len(prompts) if dtype == "float32" else same >= len(prompts) - 1


def test_what_was_merged_stays_when_another_is_refused(
    engine: Engine, adapters_dir: Path, prompts: list[list[int]]
) -> None:
    good, bad = engine.load(adapters_dir / "attention"), engine.load(adapters_dir / "plain")
    grow(bad, 1e5)
    engine.merge(good)
    expected = engine.generate([(prompts[1], good)])
    with pytest.raises(MergeRefused):
        engine.merge(bad)
    assert engine.core.merged is good
    assert engine.generate([(prompts[1], good)]) == expected


def test_what_all_but_erases_an_output(
    engine: Engine, adapters_dir: Path, tmp_path: Path, prompts: list[list[int]]
) -> None:
    shutil.copytree(adapters_dir / "dora", tmp_path / "dora")
    tensors = safetensors.torch.load_file(tmp_path / "dora" / WEIGHTS_FILE)
    tensors["base_model.model.model.layers.1.self_attn.o_proj.lora_magnitude_vector"][3] = 0
    safetensors.torch.save_file(tensors, tmp_path / "dora" / WEIGHTS_FILE)
    adapter = engine.load(tmp_path / "dora")
    with pytest.raises(MergeRefused, match=r"'dora' cannot be merged: it all but erases an output of .*o_proj"):
        engine.merge(adapter)
    engine.core._merge_policy = eager_policy()
    engine.generate([(prompts[0], adapter)])
    assert engine.core.merged is None


@pytest.mark.skipif(not native.available(), reason="the native kernels are not built")
def test_a_quantized_base_says_no(model_dir: Path, adapters_dir: Path, prompts: list[list[int]]) -> None:
    engine = Engine(model_dir, quantization="int8")
    adapter = engine.load(adapters_dir / "plain")
    bypass = engine.generate([(prompts[0], adapter)])
    with pytest.raises(MergeRefused, match=r"plain.*quantized.*--quantization"):
        engine.merge(adapter)
    assert engine.core.merged is None
    assert engine.generate([(prompts[0], adapter)]) == bypass

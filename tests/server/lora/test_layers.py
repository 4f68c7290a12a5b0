"""Slots share the host's memory on the CPU, are reset when rewritten, and cost nothing while unused."""

from pathlib import Path

import pytest
import torch

from adapters.format import read_adapter
from server.config import EngineConfig
from server.engine.build import EngineParts, build_engine
from server.kernels import LayerWeights, LinearGroup, Segment, native
from server.lora.adapter import Adapter


@pytest.fixture(params=["auto", "torch"])
def parts(model_dir: Path, request: pytest.FixtureRequest) -> EngineParts:
    if request.param == "auto" and not native.available():
        pytest.skip("the native kernels are not built")
    return build_engine(EngineConfig(model=str(model_dir), device="cpu", dtype="float32", kernels=request.param))


def load(parts: EngineParts, folder: Path) -> Adapter:
    base = parts.runner.lora.base_weights
    return Adapter.from_files(read_adapter(folder, base.shapes, 64), folder.name, "1", 1, base)


def layer(parts: EngineParts, name: str) -> tuple[LinearGroup, int]:
    """A layer's group and its place in it."""
    return next((group, names.index(name)) for names, group in parts.runner.lora.groups if name in names)


def test_an_adapter_is_one_block_of_memory(parts: EngineParts, adapters_dir: Path) -> None:
    adapter = load(parts, adapters_dir / "plain")
    tensors = [tensor for layer in adapter.weights.values() for tensor in (layer.lora_a, layer.lora_b)]
    assert len({tensor.untyped_storage().data_ptr() for tensor in tensors}) == 1
    assert adapter.num_bytes == sum(tensor.nbytes for tensor in tensors) == tensors[0].untyped_storage().nbytes()


def test_a_slot_is_reset_before_it_is_written(parts: EngineParts, adapters_dir: Path) -> None:
    """What the old adapter had and the new one has not must be gone."""
    group, index = layer(parts, "model.layers.0.mlp.up_proj")
    x = torch.randn(1, 3, 64)
    passes = [parts.runner.lora.prepare([Segment(0, 0, 3)])]
    with torch.inference_mode():
        plain = group(x, passes)[index]
        parts.runner.lora.write(0, load(parts, adapters_dir / "plain"))
        adapted = group(x, passes)[index]
        parts.runner.lora.write(0, load(parts, adapters_dir / "attention"))
        assert not torch.equal(adapted, plain)
        assert torch.equal(group(x, passes)[index], plain)
        parts.runner.lora.write(0, None)
        assert torch.equal(group(x, passes)[index], plain)


def test_a_sick_slot_touches_no_other_token(parts: EngineParts, adapters_dir: Path) -> None:
    name = "model.layers.0.self_attn.q_proj"
    group, index = layer(parts, name)
    good, bad = load(parts, adapters_dir / "plain").weights[name], load(parts, adapters_dir / "plain").weights[name]
    bad.lora_a.fill_(float("nan"))
    x = torch.randn(1, 4, 64)
    prepare = parts.runner.lora.prepare
    with torch.inference_mode():
        group.set_slot(index, 0, good)
        group.set_slot(index, 1, LayerWeights(bad.lora_a, bad.lora_b, 1.0))
        expected = group(x, [prepare([Segment(0, 0, 2)])])[index]
        y = group(x, [prepare([Segment(0, 0, 2), Segment(1, 3, 4)])])[index]
    assert torch.equal(y[0, :3], expected[0, :3])
    assert y[0, 3].isnan().all()

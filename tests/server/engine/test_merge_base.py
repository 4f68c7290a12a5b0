"""The base's own weights stay what they were, however often adapters are merged and taken out."""

import hashlib
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from server.kernels import native
from server.kernels.cpu import CpuLinearGroup
from server.kernels.torch_ops import TorchLinearGroup
from tests.conftest import ADAPTERS
from tests.server.engine.conftest import Engine

NUM_CYCLES = 1000


@pytest.mark.parametrize("settings", [{}, {"dtype": "bfloat16"}, {"kernels": "torch"}], ids=["f32", "bf16", "torch"])
def test_the_base_is_bit_for_bit_what_it_was(model_dir: Path, adapters_dir: Path, settings: dict[str, str]) -> None:
    """Whether each adapter follows another, whose sums it is written over, or the base alone."""
    if "kernels" not in settings and not native.available():
        pytest.skip("the native kernels are not built")
    engine = Engine(model_dir, **settings)
    merge = engine.parts.runner.merge
    adapters = [engine.load(adapters_dir / name) for name in ADAPTERS]
    frozen, outputs = digest(frozen_tensors(engine)), digest(output_tensors(engine))
    merged_outputs = []
    for adapter in adapters:
        merge(adapter)
        merged_outputs.append(digest(output_tensors(engine)))
        merge(None)
    assert len({outputs, *merged_outputs}) == 1 + len(ADAPTERS)
    for cycle_number in range(NUM_CYCLES):
        merge(adapters[cycle_number % len(adapters)])
        if cycle_number % 3 == 2:
            merge(None)
    assert engine.core.merged is adapters[(NUM_CYCLES - 1) % len(adapters)]
    assert digest(frozen_tensors(engine)) == frozen
    assert digest(output_tensors(engine)) == merged_outputs[(NUM_CYCLES - 1) % len(adapters)]
    merge(None)
    assert digest(frozen_tensors(engine)) == frozen
    assert digest(output_tensors(engine)) == outputs


def frozen_tensors(engine: Engine) -> Iterator[torch.Tensor]:
    """All that the base is: parameters of the model, and the layers' weights and biases as they lie in memory."""
    yield from engine.parts.base.model.state_dict().values()
    for _, group in engine.parts.runner.lora.groups:
        if isinstance(group, CpuLinearGroup):
            tensors = [tensor for layer in group.packed for tensor in (layer.data, layer.bias)]
        else:
            assert isinstance(group, TorchLinearGroup)
            tensors = [*group._base, *group._biases]
        yield from (tensor.detach() for tensor in tensors if tensor is not None)


@torch.inference_mode()
def output_tensors(engine: Engine) -> Iterator[torch.Tensor]:
    """What every linear layer computes: its output for the rows of the unit matrix."""
    layers = engine.parts.base.linear_layers
    for names, group in engine.parts.runner.lora.groups:
        yield from group(torch.eye(layers[names[0]].in_features)[None], ())


def digest(tensors: Iterator[torch.Tensor]) -> str:
    """Of their bytes."""
    total = hashlib.sha256()
    for tensor in tensors:
        total.update(tensor.contiguous().view(torch.uint8).numpy().tobytes())
    return total.hexdigest()

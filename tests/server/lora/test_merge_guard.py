"""What may be merged: small enough beside the base's weights that others get theirs back."""

import pytest
import torch

from adapters.tensors import LinearShape
from server.kernels import LayerWeights
from server.lora.adapter import Adapter
from server.lora.base_weights import BaseWeights
from server.lora.merge_guard import MergeGuard

IN, OUT = 4, 200  # the embedding has OUT tokens of IN values
LAYER, EMBEDDING = "layer", "embedding"


def why_not(
    lora_a: float | list[float] = 1.0,
    lora_b: float | list[float] = 1.0,
    scaling: float = 1.0,
    *,
    module: str = LAYER,
    storage: torch.dtype = torch.float32,
    gain: float | None = None,
    bias: float | None = None,
) -> str:
    """Of an adapter of rank 1, or of as many as there are values, on weights whose rows have a norm of 1."""
    shapes = {LAYER: LinearShape(IN, OUT), EMBEDDING: LinearShape(OUT, IN, "embedding")}
    base = BaseWeights(shapes, storage)
    for name in shapes:
        base.add(name, lambda start, end: torch.full((end - start, IN), IN**-0.5))
    shape = shapes[module]
    a, b = (torch.tensor(value).view(-1, 1) for value in (lora_a, lora_b))
    weights = LayerWeights(
        a.repeat(1, shape.in_features),
        b.repeat(1, shape.out_features),
        scaling,
        None if gain is None else torch.tensor([1.0] * (OUT - 1) + [gain]),
        None if bias is None else torch.full((OUT,), bias),
    )
    return MergeGuard(base).why_not(Adapter("a", "1", 1, "", 1, (), {module: weights}, 0, 0))


@pytest.mark.parametrize(("storage", "limit"), [(torch.float32, 100.0), (torch.bfloat16, 8.0), (torch.float16, 8.0)])
def test_the_change_is_held_against_the_weights(storage: torch.dtype, limit: float) -> None:
    """A row of A has a norm of 2 here, and so has a row of B of the embedding."""
    for module in (LAYER, EMBEDDING):
        assert not why_not(0.49 * limit, module=module, storage=storage)
        reason = why_not(0.51 * limit, module=module, storage=storage)
        assert f"it changes {module} by up to {1.02 * limit:.3g} where the base's weights are about 1;" in reason
        assert why_not(1.0, 0.3 * limit, -2.0, module=module, storage=storage)


def test_large_terms_that_cancel_count() -> None:
    assert "it changes" in why_not([1e6, 1e6], [1.0, -1.0])


@pytest.mark.parametrize(
    ("lora_a", "lora_b", "scaling"), [(3e38, 1e-38, 1.0), (1e10, 1e-38, 1e20), (1e20, 1e-38, 1e-20)]
)
@pytest.mark.parametrize("module", [LAYER, EMBEDDING])
def test_what_overflows_on_the_way(lora_a: float, lora_b: float, scaling: float, module: str) -> None:
    assert "overflow" in why_not(lora_a, lora_b, scaling, module=module)


def test_half_width_ends_sooner() -> None:
    assert "overflow" in why_not(200.0, 1e-4, storage=torch.float16)
    assert not why_not(200.0, 1e-4, storage=torch.bfloat16)


@pytest.mark.parametrize(
    ("gain", "fault"), [(0.02, ""), (0.0, "erases"), (-0.001, "erases"), (99, ""), (1e30, "1e+30")]
)
def test_gains(gain: float, fault: str) -> None:
    reason = why_not(gain=gain)
    assert fault in reason
    assert bool(reason) == bool(fault)


def test_biases() -> None:
    assert not why_not(bias=-99.0)
    assert "adds up to 101" in why_not(bias=-101.0)
    assert why_not(bias=float("nan"))

"""Sums of layers with an adapter, beside the base's own weights."""

import mmap
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from server.kernels import LayerWeights, LinearGroup, Segment, Storage, native, native_lora
from server.kernels.cpu import CpuLinearGroup
from server.kernels.memory import Arena
from server.kernels.torch_ops import TorchLinearGroup

IN, OUTS = 37, (40, 16)

MakeGroup = Callable[[Sequence[nn.Module], int], LinearGroup]


def make_layers() -> list[nn.Module]:
    torch.manual_seed(0)
    return [nn.Linear(IN, OUTS[0]).requires_grad_(False), Conv1D(OUTS[1], IN).requires_grad_(False)]


def random_weights(rank: int, out_features: int, *, gain: bool = False, bias: bool = False) -> LayerWeights:
    extras = [torch.rand(out_features) + 0.5 if wanted else None for wanted in (gain, bias)]
    return LayerWeights(torch.randn(rank, IN), torch.randn(rank, out_features), 0.5, *extras)


@pytest.fixture(params=["torch", "float32", "bfloat16"])
def make_group(request: pytest.FixtureRequest) -> MakeGroup:
    if request.param == "torch":
        return TorchLinearGroup
    if not native.available():
        pytest.skip("the native kernels are not built")
    return partial(CpuLinearGroup, request.param, Arena())


@torch.inference_mode()
def test_a_sum_gives_what_the_bypass_gives(make_group: MakeGroup) -> None:
    group = make_group(make_layers(), 1)
    x = torch.randn(3, IN)
    base = group(x, ())
    prepare: Any = native_lora.Segments if isinstance(group, CpuLinearGroup) else list
    for extras in ({}, {"gain": True}, {"bias": True}, {"gain": True, "bias": True}):
        weights = [random_weights(5, out, **extras) for out in OUTS]
        for layer, lora in enumerate(weights):
            group.set_slot(layer, 0, lora)
        expected = group(x, [prepare([Segment(0, 0, 3)])])
        assert group.merge(weights) > 0
        for y, bypassed in zip(group(x, ()), expected, strict=True):
            torch.testing.assert_close(y, bypassed, rtol=2e-2, atol=0.1)
        group.unmerge()
        assert all(map(torch.equal, group(x, ()), base))


@torch.inference_mode()
def test_a_bias_alone_takes_no_memory(make_group: MakeGroup) -> None:
    """The weight stays the base's, and the next sum is not written over it."""
    group = make_group(make_layers(), 1)
    x = torch.randn(3, IN)
    base = group(x, ())
    only_bias = [random_weights(0, out, bias=True) for out in OUTS]
    assert group.merge(only_bias) == 0
    for y, own, lora in zip(group(x, ()), base, only_bias, strict=True):
        assert lora.bias is not None
        torch.testing.assert_close(y, own + lora.bias)
    assert group.merge([random_weights(5, out) for out in OUTS]) > 0
    assert not any(map(torch.equal, group(x, ()), base))
    group.unmerge()
    assert all(map(torch.equal, group(x, ()), base))


@pytest.mark.skipif(not native.available(), reason="the native kernels are not built")
@pytest.mark.parametrize("storage", ["float32", "bfloat16"])
def test_sums_lie_in_pages_of_their_own_and_are_written_again(storage: Storage) -> None:
    group = CpuLinearGroup(storage, Arena(), make_layers(), 1)
    places = []
    for _ in range(2):
        group.merge([random_weights(5, out) for out in OUTS])
        places.append([layer.data.data_ptr() for layer in group._group.linear.layers])
    assert places[0] == places[1]
    assert all(place % mmap.PAGESIZE == 0 for place in places[0])

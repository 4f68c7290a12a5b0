"""Layers packed for oneDNN against the layers themselves."""

import weakref
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from server.kernels import onednn

pytestmark = pytest.mark.skipif(not onednn.available(torch.float32), reason="torch was built without oneDNN")


def conv1d(in_features: int, out_features: int) -> nn.Module:
    layer = Conv1D(out_features, in_features)
    nn.init.normal_(layer.bias)
    return layer


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize(
    "make", [nn.Linear, partial(nn.Linear, bias=False), conv1d], ids=["linear", "without bias", "conv1d"]
)
@pytest.mark.parametrize(
    ("in_features", "out_features"), [(192, 576), (576, 192), (17, 33), (301, 100), (5, 1), (1, 16)]
)
@torch.inference_mode()
def test_any_size(
    make: Callable[[int, int], nn.Module], in_features: int, out_features: int, dtype: torch.dtype
) -> None:
    if not onednn.available(dtype):
        pytest.skip("this processor has no bfloat16 arithmetic")
    torch.manual_seed(0)
    layer = make(in_features, out_features).to(dtype)
    packed = onednn.PackedLinear(layer)
    for rows in (0, 1, 2, 3, 8, 16, 33, 200):
        x = torch.randn(1, rows, in_features).to(dtype)
        y, expected = packed(x), layer(x)
        assert y.is_contiguous()
        assert y.dtype == dtype
        torch.testing.assert_close(y, expected)


@torch.inference_mode()
def test_rows_may_lie_apart() -> None:
    layer = nn.Linear(12, 20)
    x = torch.randn(2, 7, 24)[..., ::2]
    torch.testing.assert_close(onednn.PackedLinear(layer)(x), layer(x))


def test_the_packed_weight_replaces_the_original() -> None:
    layer = nn.Linear(12, 20)
    original = weakref.ref(layer.weight.untyped_storage())
    packed = onednn.PackedLinear(layer.requires_grad_(False))
    del layer
    assert original() is None
    assert packed(torch.ones(1, 12)).shape == (1, 20)

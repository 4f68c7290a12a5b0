"""Packed linear layers against plain torch, on every instruction set this processor has."""

import pytest
import torch
from torch import Tensor

from server.kernels import Storage, native, native_linear
from tests.server.kernels.conftest import apply, compute_threads, random_split

pytestmark = pytest.mark.usefixtures("isa")

STORAGES: list[Storage] = ["float32", "bfloat16", "int8"]


def linear(x: Tensor, packed: native_linear.PackedLinear) -> Tensor:
    (y,) = apply(x, native_linear.LinearGroup([packed]))
    return y


def as_multiplied(x: Tensor, storage: Storage) -> Tensor:
    """x as a layer reads it: processors that multiply pairs of bfloat16 round it for weights of that type."""
    return x.bfloat16().float() if storage == "bfloat16" and native.isa() == "avx512_bf16" else x


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize(
    ("out_features", "in_features"), [(576, 192), (192, 576), (33, 17), (100, 301), (1, 5), (16, 1)]
)
def test_linear(out_features: int, in_features: int, storage: Storage) -> None:
    weight, bias = torch.randn(out_features, in_features), torch.randn(out_features)
    packed = native_linear.pack_linear(weight, bias, storage)
    reference = packed.unpack().double()
    tolerance = {"float32": 0.0, "bfloat16": 2**-8, "int8": 0.5 / 127}[storage]
    assert (reference - weight).abs().max() <= tolerance * weight.abs().max() + 1e-12
    for rows in (1, 2, 3, 4, 7, 16, 17, 25, 200):
        x = torch.randn(rows, in_features)
        expected = as_multiplied(x, storage).double() @ reference.T + bias
        torch.testing.assert_close(linear(x, packed).double(), expected, rtol=1e-5, atol=1e-4)


def test_linear_packs_transposed_parameters() -> None:
    weight, bias = torch.nn.Parameter(torch.randn(40, 50)), torch.nn.Parameter(torch.randn(50))
    packed = native_linear.pack_linear(weight.T, bias)
    assert torch.equal(packed.unpack(), weight.T)
    x = torch.randn(3, 40)
    y = linear(x, packed)
    assert not y.requires_grad
    torch.testing.assert_close(y, x @ weight.detach() + bias.detach())


def test_linear_takes_bfloat16_weights_and_leading_dimensions() -> None:
    weight = torch.randn(48, 64, dtype=torch.bfloat16)
    x = torch.randn(1, 5, 64)
    packed = native_linear.pack_linear(weight, storage="bfloat16")
    assert torch.equal(packed.unpack(), weight.float())
    torch.testing.assert_close(linear(x, packed), as_multiplied(x, "bfloat16") @ weight.float().T)


@pytest.mark.parametrize("storage", STORAGES)
def test_linear_rows_do_not_depend_on_their_batch(storage: Storage) -> None:
    packed = native_linear.pack_linear(torch.randn(90, 300), torch.randn(90), storage)
    x = torch.randn(900, 300)
    whole = linear(x, packed)
    for _ in range(3):
        pieces = [linear(piece, packed) for piece in x.split(random_split(900))]
        assert torch.equal(torch.cat(pieces), whole)


def test_linear_bits_do_not_depend_on_threads_or_grouping() -> None:
    layers = [native_linear.pack_linear(torch.randn(out, 300)) for out in (90, 32, 7)]
    x = torch.randn(50, 300)
    expected = [linear(x, layer) for layer in layers]
    for count in (1, 3):
        with compute_threads(count):
            assert all(map(torch.equal, apply(x, native_linear.LinearGroup(layers)), expected))


def test_products_in_float32(isa: str) -> None:
    packed, x = native_linear.pack_linear(torch.randn(40, 50), storage="bfloat16"), torch.randn(3, 50)
    with native.float32_products():
        torch.testing.assert_close(linear(x, packed), x @ packed.unpack().T)
    assert native.isa() == isa
    torch.testing.assert_close(linear(x, packed), as_multiplied(x, "bfloat16") @ packed.unpack().T)

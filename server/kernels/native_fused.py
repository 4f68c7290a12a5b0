"""Norms, rotary embedding, activations and sums by the native CPU kernels, each in one call; see `native`."""

import ctypes
from collections.abc import Iterator
from enum import Enum

import torch
from torch import Tensor

from server.kernels.native import INT, Function, contiguous, pointer

_rms_norm, _layer_norm, _rotary = Function("rms_norm"), Function("layer_norm"), Function("rotary")
_split_heads, _activation, _add = Function("split_heads"), Function("activation"), Function("add")


def rms_norm(x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None) -> Tensor:
    """weight * r / sqrt(mean(r^2) + eps) with r = x [..., n], or r = residual += x in place if there is a residual."""
    x, n = contiguous(x), weight.numel()
    assert x.shape[-1] == n or (x.shape[-1] % n == 0 and residual is None)
    assert residual is None or (residual.shape == x.shape and residual.is_contiguous())
    out = torch.empty(x.shape)
    _rms_norm(x.data_ptr(), pointer(residual), weight.data_ptr(), eps, out.data_ptr(), x.numel() // n, n)
    return out


def layer_norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, residual: Tensor | None = None
) -> Tensor:
    """weight * (r - mean(r)) / sqrt(var(r) + eps) + bias, r as in rms_norm.

    Weight and bias are [n], or [heads, n] for an x [..., heads, n].
    """
    x, n = contiguous(x), x.shape[-1]
    shapes = {vector.shape for vector in (weight, bias) if vector is not None} or {torch.Size([n])}
    assert len(shapes) == 1
    (shape,) = shapes
    assert shape == x.shape[-len(shape) :]
    assert residual is None or (residual.shape == x.shape and residual.is_contiguous())
    out = torch.empty(x.shape)
    _layer_norm(
        x.data_ptr(), pointer(residual), pointer(weight), pointer(bias), shape.numel() // n, eps, out.data_ptr(),
        x.numel() // n, n,
    )  # fmt: skip
    return out


class _LayoutStruct(ctypes.Structure):
    _fields_ = tuple((name, INT) for name in ("head_dim", "rotary_dim", "width", "step", "interleaved"))


class Rotary:
    """Rotary embedding: pairs of a head's elements (a, b) become (a cos - b sin, b cos + a sin)."""

    def __init__(self, head_dim: int, width: int, *, rotary_dim: int, step: int = 1, interleaved: bool = False) -> None:
        """
        Args:
            width: of a row of cos and sin; entry i * step is for pair i. A step goes with `interleaved` alone.
            rotary_dim: elements of a head that are turned, its first; the others stay as they are.
            interleaved: a pair is elements 2i and 2i + 1; otherwise i and i + rotary_dim / 2.
        """
        assert rotary_dim <= head_dim
        assert interleaved or step == 1
        assert step * (rotary_dim // 2 - 1) < width
        self._head_dim = head_dim
        self._width = width
        self._struct = _LayoutStruct(head_dim, rotary_dim, width, step, interleaved)
        self._pointer = ctypes.addressof(self._struct)

    @staticmethod
    def layouts(head_dim: int, width: int) -> Iterator["Rotary"]:
        """What models do with tables of a width; each entry is for one pair, or stands there twice."""
        if width <= head_dim:
            yield Rotary(head_dim, width, rotary_dim=width)
            yield Rotary(head_dim, width, rotary_dim=width, interleaved=True)
            yield Rotary(head_dim, width, rotary_dim=width, interleaved=True, step=2)
        if 2 * width <= head_dim:
            yield Rotary(head_dim, width, rotary_dim=2 * width)
            yield Rotary(head_dim, width, rotary_dim=2 * width, interleaved=True)

    def __call__(self, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> None:
        """In place for q [num_tokens, heads, head_dim] and k [num_tokens, kv_heads, head_dim].

        Heads lie side by side; cos and sin [..., width] are contiguous, a row a token.
        """
        num_tokens, heads, head_dim = q.shape
        assert cos.shape == sin.shape
        assert cos.numel() == num_tokens * self._width
        assert head_dim == k.shape[-1] == self._head_dim
        _rotary(
            self._pointer, q.data_ptr(), q.stride(0), heads, k.data_ptr(), k.stride(0), k.shape[1],
            cos.data_ptr(), sin.data_ptr(), num_tokens,
        )  # fmt: skip


def split_heads(x: Tensor, heads: int) -> Tensor:
    """x [..., 3 * heads * head_dim], q, k and v of each head in turn → the same with all of q first, then k and v."""
    x, width = contiguous(x), x.shape[-1]
    assert width % (3 * heads) == 0
    out = torch.empty(x.shape)
    _split_heads(x.data_ptr(), out.data_ptr(), heads, width // (3 * heads), x.numel() // width)
    return out


class Activation(Enum):
    """The activations there are, by their numbers in native.c."""

    SILU = 0
    GELU_TANH = 1
    GELU = 2
    RELU = 3
    RELU_SQUARED = 4
    CLAMPED_SILU = 5  # gpt-oss's: x / (1 + exp(-1.702 x)) for x up to 7, times 1 + up for up within 7 of 0
    SIGMOID = 6

    def __call__(self, x: Tensor, up: Tensor | None = None) -> Tensor:
        """activation(x), times up if there is one; both [..., n] with rows any stride apart, the same between all."""
        assert up is None or up.shape == x.shape
        out, n = torch.empty(x.shape), x.shape[-1]
        up_stride = 0 if up is None else up.stride(-2)
        _activation(
            self.value, x.data_ptr(), x.stride(-2), pointer(up), up_stride, out.data_ptr(), x.numel() // n, n
        )  # fmt: skip
        return out

    @staticmethod
    def inputs(count: int) -> Tensor:
        """By which activations are told apart: `count` from -20 to 20, and some beyond, where one may be clamped."""
        beyond = torch.logspace(1.5, 6, 10)
        return torch.cat([-beyond, torch.linspace(-20, 20, count), beyond])

    @staticmethod
    def that_gives(expected: Tensor, x: Tensor, up: Tensor | None = None) -> "Activation | None":
        """The one whose values are the expected ones; None: there is none."""
        same = (each for each in Activation if torch.allclose(each(x, up), expected, rtol=2e-6, atol=2e-6))
        return next(same, None)


def add(x: Tensor, y: Tensor, factor: float = 1) -> Tensor:
    """y += factor * x in place, both [..., n], y contiguous; returns y."""
    assert y.is_contiguous()
    assert x.shape == y.shape
    n = y.shape[-1]
    _add(contiguous(x).data_ptr(), y.data_ptr(), factor, y.numel() // n, n)
    return y

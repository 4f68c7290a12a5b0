"""Norms, rotary embedding and gated activations by the native CPU kernels, each in one call; see `native`."""

import torch
from torch import Tensor

from server.kernels.native import Function, contiguous, pointer

_rms_norm, _layer_norm, _rotary = Function("rms_norm"), Function("layer_norm"), Function("rotary")
_silu_mul, _gelu_tanh_mul, _add = Function("silu_mul"), Function("gelu_tanh_mul"), Function("add")


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
    """weight * (r - mean(r)) / sqrt(var(r) + eps) + bias, r as in rms_norm."""
    x, n = contiguous(x), x.shape[-1]
    assert all(vector is None or vector.numel() == n for vector in (weight, bias))
    assert residual is None or (residual.shape == x.shape and residual.is_contiguous())
    out = torch.empty(x.shape)
    _layer_norm(x.data_ptr(), pointer(residual), pointer(weight), pointer(bias), eps, out.data_ptr(), x.numel() // n, n)
    return out


def rotary(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> None:
    """x = x * cos + rotate_half(x) * sin in place for q [num_tokens, heads, head_dim], k [num_tokens, kv_heads, ...].

    Heads lie side by side; cos and sin [..., rotary_dim] are contiguous, a row a token; elements past it stay as is.
    """
    num_tokens, heads, head_dim = q.shape
    assert cos.shape == sin.shape
    assert cos.numel() == num_tokens * cos.shape[-1]
    assert cos.shape[-1] <= head_dim == k.shape[-1]
    _rotary(
        q.data_ptr(), q.stride(0), heads, k.data_ptr(), k.stride(0), k.shape[1],
        cos.data_ptr(), sin.data_ptr(), cos.shape[-1], head_dim, num_tokens,
    )  # fmt: skip


def add(x: Tensor, y: Tensor) -> Tensor:
    """y += x in place, both [..., n], y contiguous; returns y."""
    assert y.is_contiguous()
    assert x.shape == y.shape
    n = y.shape[-1]
    _add(contiguous(x).data_ptr(), y.data_ptr(), y.numel() // n, n)
    return y


def silu_mul(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up, both [..., n] with rows any stride apart, the same between all."""
    assert gate.shape == up.shape
    out, n = torch.empty(gate.shape), gate.shape[-1]
    _silu_mul(gate.data_ptr(), gate.stride(-2), up.data_ptr(), up.stride(-2), out.data_ptr(), gate.numel() // n, n)
    return out


def gelu_tanh_mul(gate: Tensor, up: Tensor) -> Tensor:
    """gelu(gate, approximate="tanh") * up, both as in silu_mul."""
    assert gate.shape == up.shape
    out, n = torch.empty(gate.shape), gate.shape[-1]
    _gelu_tanh_mul(gate.data_ptr(), gate.stride(-2), up.data_ptr(), up.stride(-2), out.data_ptr(), gate.numel() // n, n)
    return out

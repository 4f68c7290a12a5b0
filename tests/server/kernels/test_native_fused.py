"""Native norms, rotary embedding, activations and sums against plain torch, on every instruction set there is here."""

from collections.abc import Callable

import pytest
import torch

from server.kernels import native_fused
from server.kernels.native_fused import Activation

pytestmark = pytest.mark.usefixtures("isa")


@pytest.mark.parametrize(("rows", "n"), [(1, 576), (40, 576), (3, 37)])
def test_norms(rows: int, n: int) -> None:
    x, weight, bias, residual = torch.randn(rows, n), torch.randn(n), torch.randn(n), torch.randn(rows, n)
    expected = torch.nn.functional.rms_norm(x, (n,), weight, 1e-5)
    torch.testing.assert_close(native_fused.rms_norm(x, weight, 1e-5), expected)
    torch.testing.assert_close(
        native_fused.layer_norm(x, weight, bias, 1e-5), torch.nn.functional.layer_norm(x, (n,), weight, bias, 1e-5)
    )
    torch.testing.assert_close(
        native_fused.layer_norm(x, None, None, 1e-5), torch.nn.functional.layer_norm(x, (n,), None, None, 1e-5)
    )
    total = residual + x
    out = native_fused.rms_norm(x, weight, 1e-5, residual)
    assert torch.equal(residual, total)
    assert torch.equal(out, native_fused.rms_norm(total, weight, 1e-5))
    assert torch.equal(native_fused.rms_norm(total[-1:], weight, 1e-5), out[-1:])


def test_a_norm_with_weights_for_each_head() -> None:
    x, weight, bias = torch.randn(5, 3, 37), torch.randn(3, 37), torch.randn(3, 37)
    expected = torch.nn.functional.layer_norm(x, (37,), None, None, 1e-5)
    torch.testing.assert_close(native_fused.layer_norm(x, weight, None, 1e-5), expected * weight)
    torch.testing.assert_close(native_fused.layer_norm(x, weight, bias, 1e-5), expected * weight + bias)


@pytest.mark.parametrize(("interleaved", "step"), [(False, 1), (True, 1), (True, 2)])
@pytest.mark.parametrize(("head_dim", "rotary_dim"), [(64, 64), (80, 32), (24, 24)])
def test_rotary(head_dim: int, rotary_dim: int, interleaved: bool, step: int) -> None:
    tokens, pairs = 7, rotary_dim // 2
    packed = torch.randn(tokens, 3 * head_dim)
    q, k = packed[:, : 2 * head_dim].unflatten(1, (2, head_dim)), packed[:, 2 * head_dim :].unflatten(1, (1, head_dim))
    cos, sin = torch.randn(tokens, step * pairs), torch.randn(tokens, step * pairs)
    c, s = cos[:, None, ::step], sin[:, None, ::step]
    even, odd = (
        (slice(0, rotary_dim, 2), slice(1, rotary_dim, 2)) if interleaved else (slice(pairs), slice(pairs, rotary_dim))
    )
    expected = [q.clone(), k.clone()]
    for before, after in zip((q, k), expected, strict=True):
        after[..., even] = before[..., even] * c - before[..., odd] * s
        after[..., odd] = before[..., odd] * c + before[..., even] * s
    rotary = native_fused.Rotary(head_dim, step * pairs, rotary_dim=rotary_dim, step=step, interleaved=interleaved)
    rotary(q, k, cos[None], sin[None])
    torch.testing.assert_close(q, expected[0])
    torch.testing.assert_close(k, expected[1])


def test_split_heads() -> None:
    x = torch.randn(1, 5, 4 * 3 * 24)
    expected = x.view(1, 5, 4, 3, 24).transpose(2, 3).reshape(1, 5, -1)
    assert torch.equal(native_fused.split_heads(x, 4), expected)


ACTIVATIONS: dict[Activation, Callable[[torch.Tensor], torch.Tensor]] = {
    Activation.SILU: torch.nn.functional.silu,
    Activation.GELU_TANH: lambda x: torch.nn.functional.gelu(x, approximate="tanh"),
    Activation.GELU: torch.nn.functional.gelu,
    Activation.RELU: torch.nn.functional.relu,
    Activation.RELU_SQUARED: lambda x: torch.nn.functional.relu(x) ** 2,
    Activation.CLAMPED_SILU: lambda x: x.clamp(max=7) * torch.sigmoid(1.702 * x.clamp(max=7)),
    Activation.SIGMOID: torch.sigmoid,
}


@pytest.mark.parametrize("activation", Activation)
@pytest.mark.parametrize(("rows", "n"), [(1, 64), (30, 1536), (2, 19)])
def test_activations(rows: int, n: int, activation: Activation) -> None:
    both = 6 * torch.randn(rows, 2 * n)
    both[0, :4] = torch.tensor([-200.0, 200.0, 0.0, -1e-3])
    x, up = both.split(n, dim=1)
    expected = ACTIVATIONS[activation](x.double())
    gated = expected * (1 + up.clamp(-7, 7) if activation is Activation.CLAMPED_SILU else up)
    torch.testing.assert_close(activation(x).double(), expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(activation(x, up).double(), gated, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(activation(x[None], up[None]).double(), gated[None], rtol=1e-6, atol=1e-6)
    nan = torch.full((1, 20), torch.nan)
    assert activation(nan).isnan().all()


def test_sums() -> None:
    x, y = torch.randn(3, 37), torch.randn(3, 37)
    before = y.clone()
    assert native_fused.add(x, y) is y
    assert torch.equal(y, before + x)
    torch.testing.assert_close(native_fused.add(x, y, 0.25), before + 1.25 * x)

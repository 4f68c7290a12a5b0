"""Native norms, rotary embedding and gates against plain torch, on every instruction set this processor has."""

import pytest
import torch

from server.kernels import native_fused

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


@pytest.mark.parametrize(("head_dim", "rotary_dim"), [(64, 64), (80, 32), (24, 24)])
def test_rotary(head_dim: int, rotary_dim: int) -> None:
    tokens = 7
    packed = torch.randn(tokens, 3 * head_dim)
    q, k = packed[:, : 2 * head_dim].unflatten(1, (2, head_dim)), packed[:, 2 * head_dim :].unflatten(1, (1, head_dim))
    cos, sin = torch.randn(tokens, rotary_dim), torch.randn(tokens, rotary_dim)
    expected = []
    for x in (q, k):
        turned, rest = x.clone().split([rotary_dim, head_dim - rotary_dim], dim=2)
        first, second = turned.chunk(2, dim=2)
        turned = turned * cos[:, None] + torch.cat([-second, first], dim=2) * sin[:, None]
        expected.append(torch.cat([turned, rest], dim=2))
    native_fused.rotary(q, k, cos[None], sin[None])
    torch.testing.assert_close(q, expected[0])
    torch.testing.assert_close(k, expected[1])


@pytest.mark.parametrize(("rows", "n"), [(1, 64), (30, 1536), (2, 19)])
def test_gated_activations(rows: int, n: int) -> None:
    both = 6 * torch.randn(rows, 2 * n)
    both[0, :4] = torch.tensor([-200.0, 200.0, 0.0, -1e-3])
    gate, up = both.split(n, dim=1)
    silu = torch.nn.functional.silu(gate.double()) * up
    gelu = torch.nn.functional.gelu(gate.double(), approximate="tanh") * up
    torch.testing.assert_close(native_fused.silu_mul(gate, up).double(), silu, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(native_fused.silu_mul(gate[None], up[None]).double(), silu[None], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(native_fused.gelu_tanh_mul(gate, up).double(), gelu, rtol=1e-6, atol=1e-6)
    both_gelu = native_fused.gelu_tanh_mul(gate[None], up[None])
    torch.testing.assert_close(both_gelu.double(), gelu[None], rtol=1e-6, atol=1e-6)

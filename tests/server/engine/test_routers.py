"""Products by bare parameters, as routers have them, computed by the kernels of linear layers."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from server.engine.routers import pack_routers
from server.kernels import native
from server.kernels.cpu import cpu_kernels

pytestmark = pytest.mark.skipif(not native.available(), reason="the native kernels are not built")


class Router(nn.Module):
    """Scores of 40 experts, with a bias or not."""

    def __init__(self, *, bias: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(40, 96))
        self.bias = nn.Parameter(torch.randn(40)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        return functional.linear(x, self.weight, self.bias).softmax(dim=-1)


class Squared(Router):
    """Does more with its weight than to multiply by it."""

    def forward(self, x: Tensor) -> Tensor:
        return functional.linear(x, self.weight) * self.weight.square().sum()


@torch.inference_mode()
@pytest.mark.parametrize("bias", [False, True])
def test_a_row_has_the_same_bits_in_any_batch(*, bias: bool) -> None:
    router, x = Router(bias=bias), torch.randn(33, 96)
    expected = router(x)
    assert pack_routers(router, lambda: router(x), cpu_kernels("float32").linear_group) == 1
    assert not isinstance(router.weight, nn.Parameter)
    got = router(x)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)
    assert torch.equal(torch.cat([router(row[None]) for row in x]), got)


class Cast(Router):
    """Multiplies in float32, by one cast or another, whatever the model's dtype is."""

    def __init__(self, cast: Callable[[Any], Any]) -> None:
        super().__init__(bias=False)
        self._cast = cast

    def forward(self, x: Tensor) -> Tensor:
        return functional.linear(x.to(self.weight.dtype), self._cast(self.weight))


@torch.inference_mode()
@pytest.mark.parametrize(
    "cast", [lambda weight: weight.float(), lambda weight: weight.to(torch.float32), lambda w: w.type(torch.float32)]
)
def test_a_weight_may_be_cast_to_float32(cast: Callable[[Any], Any]) -> None:
    router, x = Cast(cast), torch.randn(33, 96)
    expected = router(x)
    assert pack_routers(router, lambda: router(x), cpu_kernels("float32").linear_group) == 1
    torch.testing.assert_close(router(x), expected, rtol=1e-5, atol=1e-5)


@torch.inference_mode()
def test_a_weight_that_is_cast_to_less_stays() -> None:
    router, x = Cast(lambda weight: weight.to(torch.bfloat16).float()), torch.randn(3, 96)
    assert pack_routers(router, lambda: router(x), cpu_kernels("float32").linear_group) == 0
    assert isinstance(router.weight, nn.Parameter)


@torch.inference_mode()
def test_what_is_used_otherwise_stays() -> None:
    router, x = Squared(bias=False), torch.randn(3, 96)
    weight: Any = router.weight
    expected = router(x)
    assert pack_routers(router, lambda: router(x), cpu_kernels("float32").linear_group) == 0
    assert router.weight is weight
    assert torch.equal(router(x), expected)


@torch.inference_mode()
def test_one_that_stays_keeps_no_other_from_being_packed() -> None:
    model = nn.ModuleList([Router(bias=True), Router(bias=False), Squared(bias=False), Router(bias=True)])
    x, runs = torch.randn(3, 96), 0

    def run() -> list[Tensor]:
        nonlocal runs
        runs += 1
        return [router(x) for router in model]

    expected = run()
    assert pack_routers(model, run, cpu_kernels("float32").linear_group) == 3
    assert [isinstance(router.weight, nn.Parameter) for router in model] == [False, False, True, False]
    assert runs == 7  # two before, and for all, either half, and each of the half that has it
    for got, y in zip(run(), expected, strict=True):
        torch.testing.assert_close(got, y, rtol=1e-5, atol=1e-6)

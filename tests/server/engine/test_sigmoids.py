"""Native sigmoids in a module's own forward: torch's values, and the same bits for a row alone and beside others."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from server.engine.fusion import fuse
from server.engine.probe import Probe
from server.engine.sigmoids import with_native_sigmoids
from server.kernels import native

pytestmark = pytest.mark.skipif(not native.available(), reason="the native kernels are not built")


@torch.inference_mode()
@pytest.mark.parametrize("sigmoid", [torch.sigmoid, functional.sigmoid, nn.Sigmoid(), lambda x: x.sigmoid()])
@pytest.mark.parametrize("width", [1, 5, 160])
def test_values_and_bits(sigmoid: nn.Module, width: int) -> None:
    x = 6 * torch.randn(33, width)
    forward = with_native_sigmoids(sigmoid)
    got = forward(x)
    torch.testing.assert_close(got, sigmoid(x), rtol=1e-6, atol=1e-7)
    assert torch.equal(torch.cat([forward(row[None]) for row in x]), got)
    assert torch.equal(forward(x.T.contiguous().T), got)


class Gated(nn.Module):
    """Gives its gate beside the result, as routers give shares beside scores."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x, x.sigmoid()


@torch.inference_mode()
def test_modules_that_have_one_are_given_it() -> None:
    model, x = nn.Sequential(Gated()), torch.randn(3, 5)
    assert fuse(model, lambda _: model(x), Probe()) == {"sigmoid": 1}
    assert torch.equal(model(x)[1], with_native_sigmoids(torch.sigmoid)(x))


@torch.inference_mode()
def test_it_is_held_against_all_that_the_module_gives(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not only against what comes first."""
    monkeypatch.setattr("server.engine.fusion.with_native_sigmoids", lambda _: lambda x: (x, x.tanh()))
    model, x = nn.Sequential(Gated()), torch.randn(3, 5)
    assert fuse(model, lambda _: model(x), Probe()) == {}

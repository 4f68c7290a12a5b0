"""Replayed layers against the calls that they were recorded from, bit by bit."""

from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from server.engine.attention import AttentionOptions
from server.engine.recorded_forward import Forward
from server.engine.replay import _HandedOn, _Replay, replay
from server.kernels import native, native_fused
from server.kernels.native_fused import Activation
from server.kernels.native_lora import Passes
from tests.conftest import ADAPTERS
from tests.server.engine.conftest import Engine

pytestmark = pytest.mark.skipif(not native.available(), reason="the native kernels are not built")


def unreplayed(forward: Forward) -> Forward:
    """What a layer's forward was before."""
    if isinstance(forward, _HandedOn):
        forward = forward._own
    return forward._forward if isinstance(forward, _Replay) else forward


def test_the_first_layer_replays_all_of_them_and_nothing_else_is_replayed(model_dir: Path) -> None:
    model = Engine(model_dir).parts.base.model
    first, *others = (layer.forward for layer in model.model.layers)
    assert isinstance(first, _Replay)
    assert others
    assert all(isinstance(forward, _HandedOn) for forward in others)
    assert [module.forward for module in model.modules() if unreplayed(module.forward) != module.forward] == [
        first,
        *others,
    ]


def test_replayed_or_not_the_logits_have_the_same_bits(
    model_dir: Path, adapters_dir: Path, prompts: list[list[int]]
) -> None:
    """Prompts in chunks over every adapter and the base, then once more with an adapter merged."""
    seen: list[list[Tensor]] = []
    for replayed in (True, False):
        engine = Engine(model_dir, max_num_batched_tokens=48, max_num_seqs=16)
        if not replayed:
            for layer in engine.parts.base.model.model.layers:
                layer.forward = unreplayed(layer.forward)
        adapters = [None, *(engine.load(adapters_dir / name) for name in ADAPTERS)]
        work = [(prompt, adapters[index % len(adapters)]) for index, prompt in enumerate(prompts)]
        rows: list[Tensor] = []
        engine.watch_logits(partial(_keep, rows))
        engine.generate(work, max_tokens=4)
        engine.merge(adapters[1])
        engine.generate(work, max_tokens=4)
        seen.append(rows)
    assert len(seen[0]) == 2 * 4 * len(prompts)
    assert all(map(torch.equal, *seen))


def _keep(rows: list[Tensor], request_id: int, logits: Tensor) -> None:
    rows.append(torch.cat([logits, torch.tensor([request_id])]))


class Doubled(nn.Module):
    """Two native calls."""

    def forward(self, x: Tensor, beside: Tensor | None = None) -> tuple[Tensor, None]:
        once = native_fused.layer_norm(x, None, None, 1e-5)
        return native_fused.add(once if beside is None else beside, Activation.SILU(once, once)), None


class Parent(nn.Module):
    """More than native calls, around some."""

    def __init__(self) -> None:
        super().__init__()
        self.child = Doubled()

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.child(x)[0]
        return y + 1


class NoAttention:
    """The attention of a step that has none."""

    addresses: tuple[int, ...] = ()

    def attend(self, layer: int | None, query: Tensor, key: Tensor, value: Tensor, options: AttentionOptions) -> Tensor:
        raise AssertionError("nobody asks")


def replayed(model: nn.Module) -> int:
    x, none = torch.randn(1, 6, 8), Passes(())
    return replay(model, lambda _: model(x.clone()), NoAttention(), lambda: none, lambda: None)


@torch.inference_mode()
def test_the_outermost_part_that_can_be_replayed_is() -> None:
    parent, plain = Parent(), Parent()
    assert replayed(parent) == 1
    assert isinstance(parent.child.forward, _Replay)
    assert not isinstance(parent.forward, _Replay)
    longer = torch.randn(1, 31, 8)
    assert torch.equal(parent(longer), plain(longer))
    # Rows that do not lie side by side are computed as they always were.
    strided = torch.randn(1, 8, 31).transpose(1, 2)
    assert torch.equal(parent(strided), plain(strided))


class Single(nn.Module):
    """One call is as fast by itself."""

    def forward(self, x: Tensor) -> Tensor:
        return native_fused.layer_norm(x, None, None, 1e-5)


class Constant(nn.Module):
    """The result is nothing of this step's."""

    def __init__(self) -> None:
        super().__init__()
        self.answer = torch.zeros(1, 6, 8)

    def forward(self, x: Tensor) -> Tensor:
        native_fused.add(native_fused.layer_norm(x, None, None, 1e-5), x)
        return self.answer


class Alternating(nn.Module):
    """Another answer at every call."""

    calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        gate = Activation.SILU if self.calls % 2 else Activation.GELU_TANH
        return gate(x, native_fused.layer_norm(x, None, None, 1e-5))


@pytest.mark.parametrize("part", [Single, Constant, Alternating])
def test_what_cannot_be_replayed_stays(part: type[nn.Module]) -> None:
    module = part()
    assert replayed(module) == 0
    assert not isinstance(module.forward, _Replay)


class Layers(nn.Module):
    """Each takes what the one before gives; `own` gives one an input of its own."""

    def __init__(self, own: int | None = None) -> None:
        super().__init__()
        self.layers = nn.ModuleList(InPlace() for _ in range(4))
        self._own = own

    def forward(self, x: Tensor) -> Tensor:
        for number, layer in enumerate(self.layers):
            x = layer(x * 2 if number == self._own else x)
        return x + 1


class InPlace(nn.Module):
    """Two native calls, the result in the input."""

    def forward(self, x: Tensor) -> Tensor:
        return native_fused.add(native_fused.layer_norm(x, None, None, 1e-5), x)


@torch.inference_mode()
@pytest.mark.parametrize(("own", "replays"), [(None, [0]), (2, [0, 2]), (3, [0, 3])])
def test_layers_that_follow_one_another_are_joined(own: int | None, replays: list[int]) -> None:
    model = Layers(own)
    assert replayed(model) == 4
    assert [number for number, layer in enumerate(model.layers) if isinstance(layer.forward, _Replay)] == replays
    for rows in (1, 31):
        other = torch.randn(1, rows, 8)
        assert torch.equal(model(other.clone()), Layers(own)(other.clone()))
    # Where the first layer is called otherwise and computes for itself, so do the others.
    first, other = model.layers[0].forward, torch.randn(1, 3, 8)
    model.layers[0].forward = lambda x: first(x=x)
    assert torch.equal(model(other.clone()), Layers(own)(other.clone()))

"""Replayed layers against the calls that they were recorded from, bit by bit."""

from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from server.engine.recorded_forward import Call
from server.engine.replay import _Replay, replay_parts
from server.kernels import native, native_fused
from server.kernels.native_lora import Passes
from tests.conftest import ADAPTERS
from tests.server.engine.conftest import Engine

pytestmark = pytest.mark.skipif(not native.available(), reason="the native kernels are not built")


def replays(engine: Engine) -> list[nn.Module]:
    return [module for module in engine.parts.base.model.modules() if isinstance(module.forward, _Replay)]


def test_every_layer_is_replayed_and_nothing_else(model_dir: Path) -> None:
    engine = Engine(model_dir)
    assert replays(engine) == list(engine.parts.base.model.model.layers)


def test_replayed_or_not_the_logits_have_the_same_bits(
    model_dir: Path, adapters_dir: Path, prompts: list[list[int]]
) -> None:
    """Prompts in chunks over every adapter and the base, then once more with an adapter merged."""
    seen: list[list[Tensor]] = []
    for replayed in (True, False):
        engine = Engine(model_dir, max_num_batched_tokens=48, max_num_seqs=16)
        if not replayed:
            for module in replays(engine):
                assert isinstance(module.forward, _Replay)
                module.forward = module.forward._forward
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
        return native_fused.add(once if beside is None else beside, native_fused.silu_mul(once, once)), None


class Parent(nn.Module):
    """More than native calls, around some."""

    def __init__(self) -> None:
        super().__init__()
        self.child = Doubled()

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.child(x)[0]
        return y + 1


@torch.inference_mode()
def test_the_outermost_part_that_can_be_replayed_is() -> None:
    parent, x, none = Parent(), torch.randn(1, 6, 8), Passes(())
    expected = parent(x.clone())
    calls = {
        "": Call((x.clone(),), {}, expected),
        "child": Call((x.clone(),), {}, parent.child(x.clone())),
    }
    assert replay_parts(parent, calls, lambda: none) == 1
    assert isinstance(parent.child.forward, _Replay)
    assert not isinstance(parent.forward, _Replay)
    longer = torch.randn(1, 31, 8)
    plain = Parent()
    assert torch.equal(parent(longer), plain(longer))
    # Rows that do not lie side by side are computed as they always were.
    strided = torch.randn(1, 8, 31).transpose(1, 2)
    assert torch.equal(parent(strided), plain(strided))


@torch.inference_mode()
def test_a_part_that_depends_on_its_call_alone_stays() -> None:
    """One call, a result that is not its own, or another answer than the recorded one."""
    x, none = torch.randn(1, 6, 8), Passes(())
    for answer in (x, native_fused.layer_norm(x, None, None, 1e-5)):
        module = Doubled()
        assert replay_parts(module, {"": Call((x.clone(),), {}, (answer, None))}, lambda: none) == 0
        assert not isinstance(module.forward, _Replay)

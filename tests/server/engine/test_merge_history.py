"""What was merged once shows in no later answer: K and V from other weights are not shared, in any number format."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from server.kernels import native
from server.lora.adapter import Adapter
from tests.server.engine.conftest import Engine

pytestmark = pytest.mark.skipif(not native.available(), reason="the native kernels are not built")

PROMPT = list(range(40, 80))  # two blocks and a half
MakeEngine = Callable[[], Engine]


@pytest.fixture(params=["float32", "bfloat16"])
def make_engine(model_dir: Path, request: pytest.FixtureRequest) -> MakeEngine:
    return lambda: Engine(model_dir, dtype=request.param)


def ask(engine: Engine, adapter: Adapter | None) -> tuple[torch.Tensor, int]:
    """Logits of a few tokens after the prompt, and how many tokens of that came from the prefix cache."""
    rows: list[torch.Tensor] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine.parts.runner, "run", engine.parts.runner.run)  # which is put back
        engine.watch_logits(lambda _, row: rows.append(row.clone()))
        engine.generate([(PROMPT, adapter)], max_tokens=4)
    return torch.stack(rows), engine.outputs[max(engine.outputs)][0].num_cached_tokens


def names_of(engine: Engine, adapters_dir: Path) -> list[Adapter | None]:
    """The base, the adapter that is merged, and another."""
    return [None, engine.load(adapters_dir / "plain"), engine.load(adapters_dir / "attention")]


def test_after_a_merge_answers_have_the_bits_they_had(make_engine: MakeEngine, adapters_dir: Path) -> None:
    engine = make_engine()
    everybody = names_of(engine, adapters_dir)
    fresh = make_engine()
    alone = [ask(fresh, on)[0] for on in names_of(fresh, adapters_dir)]
    engine.merge(everybody[1])
    merged = [ask(engine, on) for on in everybody]
    assert not all(torch.equal(rows, other) for (rows, _), other in zip(merged, alone, strict=True))
    engine.merge(None)
    for on, expected in zip(everybody, alone, strict=True):
        rows, num_cached = ask(engine, on)
        assert torch.equal(rows, expected)
        assert num_cached == 0


def test_what_was_computed_in_a_mode_serves_that_mode(make_engine: MakeEngine, adapters_dir: Path) -> None:
    engine = make_engine()
    base, plain, attention = names_of(engine, adapters_dir)
    for on in (base, plain):
        first = {}
        for merged in (None, plain, attention):
            engine.merge(merged)
            first[merged], num_cached = ask(engine, on)
            assert num_cached == 0
        for merged in (plain, attention, None):
            engine.merge(merged)
            again, num_cached = ask(engine, on)
            assert num_cached == 32
            assert torch.equal(again, first[merged])


@pytest.mark.parametrize("merged_at", [1, 20], ids=["in its prompt", "after it"])
def test_a_request_that_saw_a_switch_shares_what_it_had_before(
    make_engine: MakeEngine, adapters_dir: Path, merged_at: int
) -> None:
    """Merged and unmerged while it runs: its later blocks are of no one mode, though none is merged at its end."""
    expected, _ = ask(make_engine(), None)
    engine = make_engine()
    plain = engine.load(adapters_dir / "plain")
    engine.parts.scheduler._token_budget = 16  # a block a step
    engine.submit(PROMPT, None, max_tokens=24, ignore_eos=True)
    for step in range(30):
        if step == merged_at:
            engine.merge(plain)
        elif step == merged_at + 1:
            engine.merge(None)
        else:
            engine.core.step()
    engine.run()
    rows, num_cached = ask(engine, None)
    assert num_cached == (16 if merged_at == 1 else 32)
    assert torch.equal(rows, expected)

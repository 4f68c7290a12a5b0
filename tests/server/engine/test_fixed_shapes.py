"""A decode step padded to a fixed size gives what it gives unpadded."""

from pathlib import Path
from typing import Any

import pytest
import torch

from server.device import Device
from server.engine.fixed_shapes import FixedShapes
from server.engine.forward_batch import ForwardBatch, build_forward_batch
from server.engine.request import Request, SamplingParams
from server.engine.scheduler import ScheduledRequest
from server.kernels import Segment, native
from server.lora.adapter import Adapter
from tests.conftest import ADAPTERS
from tests.server.engine.conftest import Engine

BLOCK_SIZE = 4
PADDING_BLOCK = 9


def fixed_shapes(max_num_seqs: int = 6, max_blocks: int = 3) -> FixedShapes:
    return FixedShapes(
        max_num_seqs=max_num_seqs,
        max_blocks=max_blocks,
        block_size=BLOCK_SIZE,
        padding_block=PADDING_BLOCK,
        device=torch.device("cpu"),
    )


def step(*requests: tuple[list[int], int, list[int], int], num_tokens: int = 1) -> ForwardBatch:
    """A step of requests: tokens, how many of them are in the cache, blocks, adapter slot."""
    scheduled = []
    for token_ids, computed, blocks, slot in requests:
        request = Request(0, token_ids, SamplingParams(), None, frozenset())
        request.num_computed_tokens, request.block_table, request.adapter_slot = computed, blocks, slot
        scheduled.append(ScheduledRequest(request, num_tokens))
    return build_forward_batch(scheduled, BLOCK_SIZE, torch.device("cpu"))


THREE = step(([10], 0, [7], -1), ([20, 21, 22, 23, 24, 25], 5, [3, 1], 0), ([30, 31], 1, [5], 2))


@pytest.mark.parametrize(
    ("largest", "sizes"),
    [(1, (1,)), (2, (1, 2)), (3, (1, 2, 3)), (64, (1, 2, 4, 8, 16, 32, 64)), (65, (*(1 << n for n in range(7)), 65))],
)
def test_sizes(largest: int, sizes: tuple[int, ...]) -> None:
    assert fixed_shapes(largest).sizes == sizes


def test_every_tensor() -> None:
    padded = fixed_shapes().pad(THREE)
    assert padded is not None
    assert padded.input_ids.tolist() == [[10, 25, 31, 0]]
    assert padded.position_ids.tolist() == [[0, 5, 1, 0]]
    assert padded.slot_mapping.tolist() == [28, 5, 21, 36]
    assert padded.query_start_loc.tolist() == [0, 1, 2, 3, 4]
    assert padded.context_lens.tolist() == [1, 6, 2, 1]
    assert padded.block_tables[:3, :2].tolist() == [[7, 0], [3, 1], [5, 0]]
    assert padded.block_tables[3, 0] == PADDING_BLOCK
    assert padded.logits_indices.tolist() == [0, 1, 2, 3]
    assert padded.segments == padded.logits_segments == (Segment(0, 1, 2), Segment(2, 2, 3))
    assert (padded.query_lens, padded.kv_lens) == ((1,) * 4, (1, 6, 2, 1))


def test_a_step_leaves_nothing_in_the_next_ones_padding() -> None:
    shapes = fixed_shapes()
    fresh = shapes.pad(THREE)
    assert fresh is not None
    shapes.pad(step(*[([1, 2, 3, 4, 5], 4, [2, 4], 1)] * 6))
    again = shapes.pad(THREE)
    assert again is not None
    for name in ("input_ids", "position_ids", "slot_mapping", "context_lens"):
        assert torch.equal(getattr(again, name), getattr(fresh, name))
        assert getattr(again, name).data_ptr() == getattr(fresh, name).data_ptr()
    assert again.block_tables[3, 0] == PADDING_BLOCK


def test_what_is_no_decode_step_or_does_not_fit_is_left_alone() -> None:
    prompts = step(([1, 2], 0, [1], -1), ([1, 2, 3], 1, [2], -1), num_tokens=2)
    chunk_of_one = step(([1, 2], 0, [1], -1), ([1, 2], 1, [2], -1))
    assert fixed_shapes().pad(prompts) is None
    assert fixed_shapes().pad(chunk_of_one) is None
    assert fixed_shapes(max_num_seqs=2).pad(THREE) is None
    assert fixed_shapes(max_blocks=1).pad(THREE) is None


@pytest.fixture(params=["native", "torch"])
def kernels(request: pytest.FixtureRequest) -> str:
    if request.param == "native" and not native.available():
        pytest.skip("the native kernels are not built")
    return "torch" if request.param == "torch" else "auto"


@pytest.mark.parametrize("settings", [{}, {"max_num_batched_tokens": 16, "max_num_seqs": 11}, {"adapter_slots": 2}])
def test_padded_steps_give_the_same(
    model_dir: Path,
    adapters_dir: Path,
    prompts: list[list[int]],
    kernels: str,
    settings: dict[str, int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The same tokens for every mix of adapters; with the native kernels, whose rows stand alone, the same logits."""

    def run() -> tuple[list[list[int]], list[torch.Tensor]]:
        engine = Engine(model_dir, kernels=kernels, **settings)
        rows: dict[int, list[torch.Tensor]] = {}
        engine.watch_logits(lambda request_id, row: rows.setdefault(request_id, []).append(row.clone()))
        tokens = engine.generate(mix(engine, adapters_dir, prompts))
        return tokens, [torch.stack(rows[request_id]) for request_id in range(len(prompts))]

    def mix(engine: Engine, folder: Path, prompts: list[list[int]]) -> list[tuple[list[int], Adapter | None]]:
        adapters = [None, *(engine.load(folder / name) for name in ADAPTERS)]
        return [(prompt, adapters[index % len(adapters)]) for index, prompt in enumerate(prompts)]

    tokens, logits = run()
    padded_sizes = []
    pad = FixedShapes.pad

    def count(self: FixedShapes, batch: ForwardBatch) -> ForwardBatch | None:
        padded = pad(self, batch)
        if padded is not None:
            padded_sizes.append((batch.num_tokens, padded.num_tokens))
        return padded

    monkeypatch.setattr(FixedShapes, "pad", count)
    monkeypatch.setattr(Device, "fixed_shapes", lambda *_: True)
    padded_tokens, padded_logits = run()
    assert padded_tokens == tokens
    assert any(size > count for count, size in padded_sizes), "no step was padded"
    for got, expected in zip(padded_logits, logits, strict=True):
        assert torch.equal(got, expected) if kernels == "auto" else torch.allclose(got, expected, atol=1e-4)


def test_no_request_is_given_the_padding_block(
    model_dir: Path, prompts: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Device, "fixed_shapes", lambda *_: True)
    engine = Engine(model_dir, max_num_seqs=3, max_model_len=64)
    allocator = engine.parts.scheduler.allocator
    everything: list[int] = []
    assert allocator.grow(everything, engine.parts.num_blocks * allocator.block_size)
    assert not allocator.grow(everything, (engine.parts.num_blocks + 1) * allocator.block_size)
    shapes: Any = engine.parts.runner._fixed_shapes
    assert shapes._padding_block not in everything

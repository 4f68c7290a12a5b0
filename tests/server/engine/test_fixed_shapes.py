"""A decode step padded to a fixed size gives what it gives unpadded."""

from pathlib import Path
from typing import Any

import pytest
import torch

from server.device import Device
from server.engine.fixed_shapes import FixedShapes
from server.engine.forward_batch import ForwardBatch, build_forward_batch
from server.engine.scheduler import ScheduledRequest
from server.kernels import Segment, native
from server.lora.adapter import Adapter, WeightedAdapter
from tests.conftest import ADAPTERS
from tests.server.engine.conftest import Engine
from tests.server.engine.test_forward_batch import item

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


def step(*scheduled: ScheduledRequest) -> ForwardBatch:
    return build_forward_batch(scheduled, BLOCK_SIZE, torch.device("cpu"))


THREE = step(
    item([10], computed=0, num_tokens=1, blocks=[7]),
    item([20, 21, 22, 23, 24, 25], computed=5, num_tokens=1, blocks=[3, 1], slot0=1.0),
    item([30, 31], computed=1, num_tokens=1, blocks=[5], slot2=0.5),
)


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
    assert padded.passes == padded.logits_passes == ((Segment(0, 1, 2), Segment(2, 2, 3, 0.5)),)
    assert (padded.query_lens, padded.kv_lens) == ((1,) * 4, (1, 6, 2, 1))


def test_a_step_leaves_nothing_in_the_next_ones_padding() -> None:
    shapes = fixed_shapes()
    fresh = shapes.pad(THREE)
    assert fresh is not None
    shapes.pad(step(*[item([1, 2, 3, 4, 5], computed=4, num_tokens=1, blocks=[2, 4])] * 6))
    again = shapes.pad(THREE)
    assert again is not None
    for name in ("input_ids", "position_ids", "slot_mapping", "context_lens"):
        assert torch.equal(getattr(again, name), getattr(fresh, name))
        assert getattr(again, name).data_ptr() == getattr(fresh, name).data_ptr()
    assert again.block_tables[3, 0] == PADDING_BLOCK


def test_what_is_no_decode_step_or_does_not_fit_is_left_alone() -> None:
    decoding = item([1, 2], computed=1, num_tokens=1, blocks=[2])
    prompts = step(decoding, item([1, 2], computed=0, num_tokens=2, blocks=[1]))
    chunk_of_one = step(decoding, item([1, 2], computed=0, num_tokens=1, blocks=[1]))
    assert fixed_shapes().pad(prompts) is None
    assert fixed_shapes().pad(chunk_of_one) is None
    assert fixed_shapes(max_num_seqs=2).pad(THREE) is None
    assert fixed_shapes(max_blocks=1).pad(THREE) is None


@pytest.fixture(params=["native", "torch"])
def kernels(request: pytest.FixtureRequest) -> str:
    if request.param == "native" and not native.available():
        pytest.skip("the native kernels are not built")
    return "torch" if request.param == "torch" else "auto"


def generate(
    engine: Engine, folder: Path, prompts: list[list[int]]
) -> tuple[list[list[int]], list[torch.Tensor], list[tuple[int, int]]]:
    """Tokens and logits of requests with every adapter, a mixture and none, of different lengths; padded steps.

    A padded step is told by how many requests it had and to how many rows it was padded.
    """
    rows: dict[int, list[torch.Tensor]] = {}
    padded_steps = []
    pad = FixedShapes.pad

    def watched(self: FixedShapes, batch: ForwardBatch) -> ForwardBatch | None:
        padded = pad(self, batch)
        if padded is not None:
            padded_steps.append((batch.num_tokens, padded.num_tokens))
        return padded

    adapters: list[Adapter | list[WeightedAdapter] | None] = [engine.load(folder / name) for name in ADAPTERS]
    adapters += [None, [WeightedAdapter(engine.load(folder / name), 0.5) for name in ("plain", "head")]]
    engine.watch_logits(lambda request_id, row: rows.setdefault(request_id, []).append(row.clone()))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FixedShapes, "pad", watched)
        ids = [
            engine.submit(prompt, adapters[index % len(adapters)], max_tokens=4 + index)
            for index, prompt in enumerate(prompts)
        ]
        engine.run()
    return [engine.tokens(request_id) for request_id in ids], [torch.stack(rows[key]) for key in ids], padded_steps


@pytest.mark.parametrize(
    "settings", [{}, {"max_num_batched_tokens": 16, "max_num_seqs": 11}, {"adapter_slots": 2, "prefix_cache": False}]
)
def test_padded_steps_give_the_same(
    model_dir: Path,
    adapters_dir: Path,
    prompts: list[list[int]],
    kernels: str,
    settings: dict[str, int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The same tokens for every mix of adapters; with the native kernels, whose rows stand alone, the same bits."""
    tokens, logits, _ = generate(Engine(model_dir, kernels=kernels, **settings), adapters_dir, prompts)
    monkeypatch.setattr(Device, "fixed_shapes", lambda *_: True)
    padded = generate(Engine(model_dir, kernels=kernels, **settings), adapters_dir, prompts)
    assert padded[0] == tokens
    assert any(size > count for count, size in padded[2])
    for got, expected in zip(padded[1], logits, strict=True):
        assert torch.equal(got, expected) if kernels == "auto" else torch.allclose(got, expected, atol=1e-4)


def test_no_request_is_given_the_padding_block(model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Device, "fixed_shapes", lambda *_: True)
    engine = Engine(model_dir, max_num_seqs=3, max_model_len=64)
    allocator = engine.parts.scheduler.allocator
    blocks: list[int] = []
    assert allocator.grow(blocks, engine.parts.num_blocks * allocator.block_size)
    assert not allocator.grow(blocks, (engine.parts.num_blocks + 1) * allocator.block_size)
    shapes: Any = engine.parts.runner._fixed_shapes
    assert shapes._padding_block not in blocks

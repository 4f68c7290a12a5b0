"""The native bypasses against plain torch, on every instruction set this processor has."""

import math
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from server.kernels import LayerWeights, Segment, native_linear, native_lora
from server.kernels.torch_ops import TorchEmbeddingBypass, add_lora
from tests.server.kernels.conftest import apply, compute_threads, random_split

pytestmark = pytest.mark.usefixtures("isa")

POPULARITY = {
    "distinct": [1] * 12,
    "identical": [70],
    "uniform": [5, 5, 5, 5],
    "skewed": [40, 9, 3, 1, 1],
}


class Adapters:
    """Slots of two layers that share x, with a rank of its own in each, and their reference."""

    def __init__(self, ranks: list[int], in_features: int, outs: tuple[int, ...], dtype: torch.dtype) -> None:
        self.layers = [native_lora.LoRASlots(in_features, out, len(ranks)) for out in outs]
        weights = [native_linear.pack_linear(torch.randn(out, in_features), torch.randn(out)) for out in outs]
        self.linear = native_linear.LinearGroup(weights)
        for layer in self.layers:
            for slot, rank in enumerate(ranks):
                a = torch.randn(rank, in_features).to(dtype) / math.sqrt(in_features)
                b = torch.randn(rank, layer.out_features).to(dtype)
                layer.set(slot, LayerWeights(a, b, 0.5 + slot))

    def __call__(self, x: Tensor, *passes: Sequence[Segment]) -> list[Tensor]:
        return apply(x, self.linear, self.layers, *passes)

    def reference(self, layer: int, slot: int, x: Tensor) -> Tensor:
        weights = self.layers[layer].weights[slot]
        assert weights is not None
        return weights.scaling * (x.double() @ weights.lora_a.double().T) @ weights.lora_b.double()


def zeros(in_features: int, out_features: int) -> native_linear.LinearGroup:
    return native_linear.LinearGroup([native_linear.pack_linear(torch.zeros(out_features, in_features))])


def segments_of(lengths: list[int], start: int = 2) -> list[Segment]:
    """One segment a slot, in order, after `start` rows without an adapter."""
    segments = []
    for slot, length in enumerate(lengths):
        segments.append(Segment(slot, start, start + length, 0.5 - slot % 2))
        start += length
    return segments


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("popularity", POPULARITY)
@pytest.mark.parametrize(("in_features", "outs"), [(96, (64, 144)), (37, (19, 100))])
def test_add_lora(in_features: int, outs: tuple[int, ...], popularity: str, dtype: torch.dtype) -> None:
    lengths = POPULARITY[popularity]
    ranks = [(8, 1, 16, 3, 128, 13)[slot % 6] for slot in range(len(lengths))]
    adapters = Adapters(ranks, in_features, outs, dtype)
    segments = segments_of(lengths)
    x = torch.randn(segments[-1].end + 3, in_features)
    for layer, (y, base) in enumerate(zip(adapters(x, segments), apply(x, adapters.linear), strict=True)):
        expected = base.double()
        for slot, start, end, scale in segments:
            expected[start:end] += scale * adapters.reference(layer, slot, x[start:end])
        torch.testing.assert_close(y.double(), expected, rtol=1e-5, atol=1e-4)
        assert torch.equal(y[:2], base[:2])
        assert torch.equal(y[-3:], base[-3:])


@pytest.mark.parametrize("rows", [100, 200])  # with bypasses after the layers, and with those of a panel at once
@pytest.mark.parametrize("rank", [1, 2, 4, 7, 8, 15, 16, 17, 32, 33, 64, 128])
def test_every_rank_with_one_row_and_with_many(rank: int, rows: int) -> None:
    lengths = [1, 2, 3, 6, 7, 25, rows - 44]
    adapters = Adapters([rank] * len(lengths), 70, (40, 75), torch.float32)
    segments = segments_of(lengths, start=0)
    x = torch.randn(rows, 70)
    for layer, (y, base) in enumerate(zip(adapters(x, segments), apply(x, adapters.linear), strict=True)):
        expected = base.double()
        for slot, start, end, scale in segments:
            expected[start:end] += scale * adapters.reference(layer, slot, x[start:end])
        torch.testing.assert_close(y.double(), expected, rtol=1e-5, atol=1e-4)


def test_bits_depend_neither_on_rows_nor_on_threads() -> None:
    """Two passes over more rows than are packed at once are what each row gives alone, with a team of threads too."""
    adapters = Adapters([8, 33, 5], 96, (48, 90), torch.float32)
    for layer in adapters.layers:
        weights = LayerWeights(
            torch.randn(4, 96), torch.randn(4, layer.out_features), 0.1, torch.randn(layer.out_features)
        )
        layer.set(2, weights)
    x = torch.randn(900, 96)
    first = [Segment(0, 0, 130), Segment(1, 130, 131), Segment(2, 131, 700, 0.5), Segment(1, 800, 900)]
    second = [Segment(1, 60, 790, -0.25), Segment(0, 795, 880)]
    whole = adapters(x, first, second)
    with compute_threads(3):
        assert all(map(torch.equal, adapters(x, first, second), whole))
        start = 0
        for size in random_split(900):
            piece = slice(start, start + size)
            ys = adapters(x[piece], *(_within(segments, start, start + size) for segments in (first, second)))
            assert all(torch.equal(y, expected[piece]) for y, expected in zip(ys, whole, strict=True))
            start += size


def _within(segments: Sequence[Segment], start: int, end: int) -> list[Segment]:
    """The segments of rows [start, end), counted from `start`."""
    return [
        Segment(each.slot, max(each.start, start) - start, min(each.end, end) - start, each.scale)
        for each in segments
        if each.start < end and each.end > start
    ]


def test_add_lora_halves_are_exact() -> None:
    numbers = [1.0, -2.5, 65504.0, 6e-8, -3.0e-5, 0.0, math.inf, math.nan]
    layer = native_lora.LoRASlots(1, 8, 1)
    b = torch.tensor([numbers], dtype=torch.float16)
    layer.set(0, LayerWeights(torch.ones(1, 1, dtype=torch.float16), b, 1.0))
    (y,) = apply(torch.ones(1, 1), zeros(1, 8), [layer], [Segment(0, 0, 1)])
    expected = torch.tensor([numbers], dtype=torch.float16).float()
    assert torch.equal(y.nan_to_num(7.0), expected.nan_to_num(7.0))


@pytest.mark.parametrize("rank", [0, 5])
@pytest.mark.parametrize("extras", [(True, False), (False, True), (True, True)])
def test_add_lora_scales_and_shifts_what_comes_out(rank: int, extras: tuple[bool, bool]) -> None:
    """DoRA's output scale and a bias, with and without a bypass, whole and row by row; an emptied slot has neither."""
    layer = native_lora.LoRASlots(37, 75, 1)
    scale, bias = (torch.randn(75) if wanted else None for wanted in extras)
    layer.set(0, LayerWeights(torch.randn(rank, 37), torch.randn(rank, 75), 0.5, scale, bias))
    linear, x = native_linear.LinearGroup([native_linear.pack_linear(torch.randn(75, 37))]), torch.randn(20, 37)
    (base,) = apply(x, linear)
    reference = base.double()
    weights = layer.weights[0]
    assert weights is not None
    add_lora(reference, x.double(), [weights], [Segment(0, 3, 17, 2.0)])
    (y,) = apply(x, linear, [layer], [Segment(0, 3, 17, 2.0)])
    torch.testing.assert_close(y.double(), reference, rtol=1e-5, atol=1e-5)
    (single,) = apply(x, linear, [layer], *([Segment(0, row, row + 1, 2.0)] for row in range(3, 17)))
    assert torch.equal(single, y)
    layer.clear(0)
    (after,) = apply(x, linear, [layer], [Segment(0, 0, 20)])
    assert torch.equal(after, base)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rank", [0, 1, 16, 21])
def test_add_embedding_lora(rank: int, dtype: torch.dtype) -> None:
    slots = native_lora.LoRASlots(50, 40, 2)
    weights = LayerWeights(
        torch.randn(rank, 50).to(dtype), torch.randn(rank, 40).to(dtype), 0.5, torch.randn(40), torch.randn(40)
    )
    slots.set(1, weights)
    token_ids, y = torch.randint(50, (12,)), torch.randn(12, 40)
    reference, single = y.double(), y.clone()
    bypass = TorchEmbeddingBypass(50, 40, 2)
    bypass.set_slot(1, weights)
    segments = [Segment(0, 0, 2), Segment(1, 2, 9, -1.5)]
    bypass(reference, token_ids, segments)
    native_lora.add_embedding_lora(y, token_ids, slots, native_lora.Segments(segments))
    torch.testing.assert_close(y.double(), reference, rtol=1e-5, atol=1e-5)
    for row in range(2, 9):
        native_lora.add_embedding_lora(single, token_ids, slots, native_lora.Segments([Segment(1, row, row + 1, -1.5)]))
    assert torch.equal(single, y)


def test_add_lora_rows_do_not_depend_on_their_segments() -> None:
    adapters = Adapters([13], 100, (90, 33), torch.float32)
    x = torch.randn(200, 100)
    whole = adapters(x, [Segment(0, 0, 200)])
    for _ in range(3):
        start, segments = 0, []
        for size in random_split(200):
            segments.append(Segment(0, start, start + size))
            start += size
        assert all(map(torch.equal, adapters(x, segments), whole))


@pytest.mark.parametrize("length", [3, 70])
def test_add_lora_nan_stays_in_its_slot_and_empty_slots_add_nothing(length: int) -> None:
    adapters = Adapters([8, 8, 8], 32, (48,), torch.float32)
    x = torch.randn(3 * length, 32)
    segments = segments_of([length] * 3, start=0)
    middle = slice(length, 2 * length)
    (clean,) = adapters(x, segments)
    weights = adapters.layers[0].weights[1]
    assert weights is not None
    weights.lora_a.fill_(math.nan)
    (y,) = adapters(x, segments)
    assert y[middle].isnan().all()
    assert torch.equal(y[:length], clean[:length])
    assert torch.equal(y[2 * length :], clean[2 * length :])
    adapters.layers[0].clear(1)
    (y,) = adapters(x, segments)
    assert torch.equal(y[middle], apply(x, adapters.linear)[0][middle])

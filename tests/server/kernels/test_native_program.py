"""Recorded native calls give the same bits as the calls themselves, for any number of rows."""

from itertools import combinations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from server.kernels import LayerWeights, Segment, native, native_fused, native_lora
from server.kernels.cpu import CpuLinearGroup
from server.kernels.memory import CACHE_LINE, Arena
from server.kernels.native_program import WORDS, Buffer, NotRecordable, Program, Workspace, plan, record

WIDTH, INNER, RECORDED = 64, 56, 12

pytestmark = pytest.mark.usefixtures("isa")


class FeedForward:
    """Norm, two layers of one input, gate, a layer, and the sum in place if asked for."""

    def __init__(self, *, in_place: bool = False) -> None:
        self._in_place = in_place
        self._weight = torch.randn(WIDTH)
        self.both = CpuLinearGroup("float32", Arena(), [nn.Linear(WIDTH, INNER), nn.Linear(WIDTH, INNER)], 2)
        self.down = CpuLinearGroup("float32", Arena(), [nn.Linear(INNER, WIDTH)], 2)
        for group, inner, outer in ((self.both, WIDTH, INNER), (self.down, INNER, WIDTH)):
            group.set_slot(0, 1, LayerWeights(torch.randn(3, inner), torch.randn(3, outer), 0.5))

    def __call__(self, x: Tensor, passes: native_lora.Passes) -> Tensor:
        gate, up = self.both(native_fused.rms_norm(x, self._weight, 1e-5), passes)
        y = self.down(native_fused.Activation.SILU(gate.view(gate.shape), up), passes)[0]
        return native_fused.add(y, x) if self._in_place else y

    def record(self) -> Program:
        x, passes = torch.randn(1, RECORDED, WIDTH), native_lora.Passes(())
        return record(lambda: self(x, passes), [Buffer.of(x), Buffer(passes.pointer, 1)], RECORDED)


def bypass(rows: int) -> native_lora.Passes:
    """The first half of the rows takes the adapter once, the last row twice."""
    half, last = Segment(1, 0, rows // 2), Segment(1, rows - 1, rows, -0.5)
    return native_lora.Passes([native_lora.Segments([half, last]), native_lora.Segments([last])])


@pytest.mark.parametrize("in_place", [False, True])
@torch.inference_mode()
def test_other_rows_other_adapters_another_base(in_place: bool) -> None:
    part, workspace = FeedForward(in_place=in_place), Workspace()
    program = part.record()
    assert program.num_calls == 4 + in_place
    merged = LayerWeights(torch.randn(2, INNER), torch.randn(2, WIDTH), 1.0)
    for rows in (1, 7, RECORDED, 65, 3):
        for weights in (None, merged):
            part.down.unmerge() if weights is None else part.down.merge([weights])
            for passes in (native_lora.Passes(()), bypass(rows)):
                x = torch.randn(1, rows, WIDTH)
                expected = part(x.clone(), passes)
                result = program(rows, [x.data_ptr(), passes.pointer], workspace)
                assert (result is None) == in_place
                assert torch.equal(x if result is None else result, expected)


@torch.inference_mode()
def test_calls_without_passes_of_their_own_name_memory_that_stays() -> None:
    group, x = CpuLinearGroup("float32", Arena(), [nn.Linear(WIDTH, WIDTH)], 0), torch.randn(1, RECORDED, WIDTH)
    with native.recorded_calls() as calls:
        for _ in range(2):
            group(x, ())
            others = [native_lora.Passes(()) for _ in range(3)]  # memory that is free by now is theirs
    assert calls[0].args[3] == calls[1].args[3]
    assert all(calls[0].args[3] != other.pointer for other in others)


@torch.inference_mode()
def test_what_lies_between_shares_memory() -> None:
    """The gate writes where the norm's output was, which nobody reads any more."""
    part = FeedForward()
    aligned = [-(-4 * size // CACHE_LINE) * CACHE_LINE for size in (WIDTH, INNER, INNER, INNER)]
    assert part.record()._bytes_per_row < sum(aligned)


@torch.inference_mode()
def test_more_than_native_calls_is_refused() -> None:
    part, passes = FeedForward(), native_lora.Passes(())
    x, elsewhere = torch.randn(1, RECORDED, WIDTH), torch.randn(1, RECORDED, WIDTH)
    inputs = [Buffer.of(x), Buffer(passes.pointer, 1)]
    for run, reason in (
        (lambda: part(x, passes) + 1, "aten.add"),
        (lambda: part(x.transpose(1, 2).contiguous().view(x.shape), passes), "aten.contiguous"),
        (lambda: part(x[:, :9], passes), r"\(1, 9, 64\), not \[1, 12, width\]"),
        (lambda: (native_fused.rms_norm(x[:, :9], part._weight, 1e-5), part(x, passes))[1], "9 is not in proportion"),
        (lambda: part.both(x, passes)[0][..., : INNER // 2], "not"),
        (
            lambda: native_fused.rms_norm(x.view(2 * RECORDED, -1)[RECORDED:], part._weight[:32], 1e-5)[None],
            "later row",
        ),
        (lambda: x, "names"),
        (lambda: torch.zeros_like(x), "aten.zeros_like"),
        (lambda: elsewhere, "neither"),
    ):
        with pytest.raises(NotRecordable, match=reason):
            record(run, inputs, RECORDED)
    assert record(lambda: part(x, passes), inputs, RECORDED).num_calls == 4  # nothing is left switched on


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 5), st.integers(1, 4)), max_size=12))
def test_a_plan_overlaps_nothing_that_lives(things: list[tuple[int, int, int]]) -> None:
    lives = [(first, first + more) for first, more, _ in things]
    sizes = [CACHE_LINE * size for *_, size in things]
    offsets, total = plan(lives, sizes)
    spans = [(offset, offset + size) for offset, size in zip(offsets, sizes, strict=True)]
    assert total == max((end for _, end in spans), default=0) <= sum(sizes)
    for (one, life), (other, other_life) in combinations(list(zip(spans, lives, strict=True)), 2):
        together = life[0] <= other_life[1] and other_life[0] <= life[1]
        assert not together or one[1] <= other[0] or other[1] <= one[0]


@pytest.mark.parametrize("name", WORDS)
def test_a_recorded_call_has_the_words_of_the_function(name: str) -> None:
    assert native.recordable(name) >= 0
    allowed = {native.POINTER: "P*", native.INT: "RC", native.FLOAT: "F"}
    for kind, type_ in zip(WORDS[name], native._SIGNATURES[name], strict=True):
        assert kind in allowed[type_]  # type: ignore[index]

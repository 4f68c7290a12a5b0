"""The Triton kernels without a GPU: values by Triton's interpreter, machine code by its compiler for GPUs not there."""

import copy
import math
import re
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from server.kernels import LayerWeights, LinearGroup, Segment
from server.kernels.slot_tables import SlotTables
from server.kernels.torch_ops import TorchEmbeddingBypass, TorchLinearGroup
from tests.server.kernels.interpreted import interpreted_triton_ops

triton = pytest.importorskip("triton", reason="triton is not installed")
triton_ops = pytest.importorskip("server.kernels.triton_ops")

CPU = torch.device("cpu")
MAX_RANK = 128
RANKS = (8, 1, 16, 3, 64, 128, 13, 40)
POPULARITY = {
    "distinct": [1] * 8,
    "identical": [50],
    "uniform": [5, 5, 5, 5],
    "skewed": [34, 9, 3, 1, 1],
}
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}


@pytest.fixture(scope="module")
def interpreted() -> Iterator[Any]:
    with interpreted_triton_ops() as module:
        yield module


def random_weights(rank: int, in_features: int, out_features: int, scaling: float) -> LayerWeights:
    return LayerWeights(
        torch.randn(rank, in_features) / math.sqrt(in_features),
        torch.randn(rank, out_features) / math.sqrt(rank),
        scaling,
    )


def fill(groups: Sequence[LinearGroup], ranks: Sequence[int], in_features: int, outs: Sequence[int]) -> None:
    """Gives all groups the same weights: in slot s of layer n a rank of its own, in some an output scale or a bias."""
    for layer, out_features in enumerate(outs):
        for slot in range(len(ranks)):
            weights = random_weights(ranks[(slot + layer) % len(ranks)], in_features, out_features, 0.5 + slot)
            if slot % 2:
                weights = replace(weights, gain=torch.randn(out_features))
            if slot % 3 == 1:
                weights = replace(weights, bias=torch.randn(out_features))
            for group in groups:
                group.set_slot(layer, slot, weights)


def bypasses(module: Any, ranks: Sequence[int], in_features: int, outs: Sequence[int], dtype: torch.dtype) -> Any:
    """A filled group whose layers are zero."""
    layers = [nn.Linear(in_features, out, bias=False, dtype=dtype).requires_grad_(False) for out in outs]
    for layer in layers:
        nn.init.zeros_(layer.weight)
    group = module.TritonLinearGroup(CPU, MAX_RANK, layers, len(ranks))
    fill([group], ranks, in_features, outs)
    return group


def segments_of(lengths: Sequence[int], start: int = 2) -> list[Segment]:
    """One segment a slot, in order, after `start` rows without an adapter."""
    segments = []
    for slot, length in enumerate(lengths):
        segments.append(Segment(slot, start, start + length, 0.5 - slot % 2))
        start += length
    return segments


def equal(ys: Sequence[Tensor], others: Sequence[Tensor]) -> bool:
    return all(torch.equal(y, other) for y, other in zip(ys, others, strict=True))


# ---------------------------------------------------------------------------------------------------- values


def test_cut_tiles() -> None:
    tiles = triton_ops.cut_tiles(CPU, [Segment(3, 1, 18, 0.5), Segment(0, 18, 19)])
    assert tiles.table.tolist() == [[3, 1, 17], [3, 17, 18], [0, 18, 19]]
    assert tiles.scales.tolist() == [0.5, 0.5, 1]
    padded = triton_ops.cut_tiles(CPU, [Segment(3, 1, 2)], num_tiles=3)
    assert padded.table.tolist() == [[3, 1, 2], [-1, 0, 0], [-1, 0, 0]]
    assert padded.scales.tolist() == [1, 0, 0]


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("popularity", POPULARITY)
@pytest.mark.parametrize(("in_features", "outs"), [(640, (272, 48)), (37, (19, 1, 100))])
@torch.inference_mode()
def test_linear_group(
    interpreted: Any, in_features: int, outs: tuple[int, ...], popularity: str, dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    lengths = POPULARITY[popularity]
    layers = [nn.Linear(in_features, out, dtype=dtype) for out in outs]
    group = interpreted.TritonLinearGroup(CPU, MAX_RANK, layers, len(lengths))
    reference = TorchLinearGroup([copy.deepcopy(layer).double() for layer in layers], len(lengths))
    fill([group, reference], RANKS[: len(lengths)], in_features, outs)
    segments = segments_of(lengths)
    x = torch.randn(1, segments[-1].end + 3, in_features, dtype=dtype)
    ys = group(x, [interpreted.cut_tiles(CPU, segments)])
    for y, layer, expected in zip(ys, layers, reference(x.double(), [segments]), strict=True):
        torch.testing.assert_close(y.double(), expected, rtol=TOLERANCE[dtype], atol=8 * TOLERANCE[dtype])
        assert torch.equal(y[:, :2], layer(x)[:, :2])
        assert torch.equal(y[:, -3:], layer(x)[:, -3:])


@torch.inference_mode()
def test_a_layer_that_has_only_a_bias(interpreted: Any) -> None:
    group, bias = bypasses(interpreted, (8,), 32, (48, 16), torch.float32), torch.randn(48)
    group.set_slot(0, 0, LayerWeights(torch.empty(0, 32), torch.empty(0, 48), 1.0, bias=bias))
    y, _ = group(torch.randn(3, 32), [interpreted.cut_tiles(CPU, [Segment(0, 1, 2)])])
    assert torch.equal(y, torch.stack([torch.zeros(48), bias, torch.zeros(48)]))


@pytest.mark.parametrize("dtype", TOLERANCE)
@torch.inference_mode()
def test_embedding_bypass(interpreted: Any, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    bypass, reference = interpreted.TritonEmbeddingBypass(CPU, dtype, 100, 272, 3), TorchEmbeddingBypass(100, 272, 3)
    for slot, rank in enumerate((1, 40)):
        weights = replace(random_weights(rank, 100, 272, 0.5 + slot), gain=torch.randn(272))
        for filled in (bypass, reference):
            filled.set_slot(slot, weights)
    token_ids, y = torch.randint(100, (30,)), torch.randn(30, 272, dtype=dtype)
    segments = [Segment(1, 1, 20, -1.5), Segment(0, 20, 25), Segment(2, 25, 28)]
    before, expected = y.clone(), y.double()
    bypass(y, token_ids, interpreted.cut_tiles(CPU, segments))
    reference(expected, token_ids, segments)
    torch.testing.assert_close(y.double(), expected, rtol=TOLERANCE[dtype], atol=8 * TOLERANCE[dtype])
    assert torch.equal(y[[0, *range(25, 30)]], before[[0, *range(25, 30)]])
    single = before[19:20].clone()
    bypass(single, token_ids[19:20], interpreted.cut_tiles(CPU, [Segment(1, 0, 1, -1.5)]))
    assert torch.equal(single, y[19:20])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.inference_mode()
def test_rows_do_not_depend_on_their_batch(interpreted: Any, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    group = bypasses(interpreted, (13, 40), 700, (90, 33), dtype)
    x = torch.randn(40, 700, dtype=dtype)
    whole = group(x, [interpreted.cut_tiles(CPU, [Segment(0, 0, 35), Segment(1, 35, 40)])])
    for slot, row in ((0, 0), (0, 15), (0, 16), (0, 34), (1, 35), (1, 39)):
        alone = group(x[row : row + 1], [interpreted.cut_tiles(CPU, [Segment(slot, 0, 1)])])
        assert equal(alone, [y[row : row + 1] for y in whole])
    pieces = [Segment(0, 0, 3), Segment(0, 3, 30), Segment(0, 30, 35), Segment(1, 35, 40)]
    assert equal(group(x, [interpreted.cut_tiles(CPU, pieces, num_tiles=9)]), whole)


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # the interpreter's, on NaN
@torch.inference_mode()
def test_nan_stays_in_its_slot_and_in_its_row(interpreted: Any) -> None:
    torch.manual_seed(0)
    group = bypasses(interpreted, (8, 8, 8), 32, (48,), torch.float32)
    tiles = interpreted.cut_tiles(CPU, [Segment(0, 0, 3), Segment(1, 3, 6), Segment(2, 6, 9)])
    x = torch.randn(9, 32)
    (clean,) = group(x, [tiles])
    bad = random_weights(8, 32, 48, 1.0)
    bad.lora_a.fill_(math.nan)
    group.set_slot(0, 1, bad)
    (y,) = group(x, [tiles])
    assert y[3:6].isnan().all()
    assert torch.equal(y[:3], clean[:3])
    assert torch.equal(y[6:], clean[6:])
    group.set_slot(0, 1, random_weights(8, 32, 48, 1.0))
    (clean,) = group(x, [tiles])
    kept = [row for row in range(9) if row != 4]
    x[4, 7] = math.nan
    (y,) = group(x, [tiles])
    assert y[4].isnan().all()
    assert torch.equal(y[kept], clean[kept])


def addresses(tables: SlotTables) -> list[int]:
    return [table.data_ptr() for table in vars(tables).values() if isinstance(table, Tensor)]


@torch.inference_mode()
def test_slots_are_replaced_and_emptied_in_place(interpreted: Any) -> None:
    torch.manual_seed(0)
    group = bypasses(interpreted, (40, 8), 32, (48, 16), torch.float32)
    tables = addresses(group._tables)
    tiles = interpreted.cut_tiles(CPU, [Segment(0, 0, 4)])
    x = torch.randn(4, 32)
    before = group(x, [tiles])
    weights = random_weights(3, 32, 48, 2.0)
    group.set_slot(0, 0, weights)
    first, second = group(x, [tiles])
    torch.testing.assert_close(first, 2.0 * x @ weights.lora_a.T @ weights.lora_b)
    assert torch.equal(second, before[1])
    group.set_slot(0, 0, None)
    first, second = group(x, [tiles])
    assert torch.equal(first, torch.zeros(4, 48))
    assert torch.equal(second, before[1])
    assert tables == addresses(group._tables)


@torch.inference_mode()
def test_other_segments_in_the_same_memory(interpreted: Any) -> None:
    """A captured graph launches over the same table again: what is written there is what it computes."""
    torch.manual_seed(0)
    group = bypasses(interpreted, (13, 40), 70, (90, 33), torch.float32)
    x = torch.randn(20, 70)
    fixed = interpreted.triton_kernels(CPU, torch.float32, MAX_RANK).fixed_segments(20)
    memory = fixed.table.data_ptr(), fixed.scales.data_ptr()
    assert not any(y.any() for y in group(x, [fixed]))
    for segments in (
        [Segment(0, 0, 18, 0.5), Segment(1, 18, 20)],
        [Segment(row % 2, row, row + 1, row / 8) for row in range(20)],
        [Segment(1, 3, 4)],
    ):
        fixed.write(segments)
        assert equal(group(x, [fixed]), group(x, [interpreted.cut_tiles(CPU, segments)]))
    assert memory == (fixed.table.data_ptr(), fixed.scales.data_ptr())


# ---------------------------------------------------------------------------------------------------- machine code


def compiled(patch: pytest.MonkeyPatch, arch: int, in_features: int, outs: Sequence[int], dtype: torch.dtype) -> Any:
    """All kernels, exactly as a step launches them, for a GPU of a compute capability."""
    target = triton.backends.compiler.GPUTarget("cuda", arch, 32)
    driver = SimpleNamespace(
        get_current_device=lambda: arch, get_current_stream=lambda device: 0, get_current_target=lambda: target
    )
    patch.setattr(triton.runtime.driver, "_active", driver)
    kernels = []
    for function in (triton_ops.shrink, triton_ops.expand, triton_ops.embed):

        def compile_only(*args: Any, run: Any = function.run, **options: Any) -> None:
            kernels.append(run(*args, **options | {"warmup": True}))

        patch.setattr(function, "run", compile_only)
    tiles = triton_ops.cut_tiles(CPU, [Segment(0, 0, 3)])
    bypasses(triton_ops, (8,), in_features, outs, dtype)(torch.zeros(3, in_features, dtype=dtype), [tiles])
    embedding = triton_ops.TritonEmbeddingBypass(CPU, dtype, in_features, outs[-1], 1)
    embedding(torch.zeros(3, outs[-1], dtype=dtype), torch.zeros(3, dtype=torch.int64), tiles)
    return kernels


def resources(kernel: Any, folder: Path) -> dict[str, int]:
    """What the machine code takes: REG per thread, STACK and LOCAL bytes (spilled registers), and more."""
    cubin = folder / "kernel.cubin"
    cubin.write_bytes(kernel.asm["cubin"])
    command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", str(cubin)]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return {name: int(value) for name, value in re.findall(r"\b([A-Z]+):(\d+)", output)}


@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(("in_features", "outs"), [(4096, (4096, 1024, 1024)), (301, (100, 19))])
def test_machine_code(
    arch: int,
    in_features: int,
    outs: tuple[int, ...],
    dtype: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    is_aligned = in_features % 16 == 0
    for kernel in compiled(monkeypatch, arch, in_features, outs, dtype):
        usage = resources(kernel, tmp_path)
        assert usage["STACK"] == usage["LOCAL"] == 0, "registers are spilled"
        assert usage["REG"] <= (128 if is_aligned else 200)
        assert kernel.metadata.shared <= 64 << 10
        assert ("mma.sync" in kernel.asm["ptx"]) == (dtype != torch.float32)
        assert bool(re.search(r"cp\.async.*0x10", kernel.asm["ptx"])) == is_aligned, "reads 16 bytes at once"

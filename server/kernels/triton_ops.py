"""LoRA bypasses on CUDA in Triton: shrink and expand (Punica's SGMV) over adapters that stay where they are in memory.

A step's segments are cut into tiles of a few rows, a program each: one launch serves decode (a row per slot) and
prefill (hundreds). Kernels find a slot's weights through tables of pointers, so that each has a rank of its own and
nothing is padded to the largest. Shapes and order of all sums follow from the layer and the rank alone: an output row
has the same bits whatever other rows share its call. The tables stay in place: a captured CUDA graph sees later writes.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor, nn

from server.kernels import Kernels, LayerWeights, Segment
from server.kernels.slot_tables import EMPTY as EMPTY_RANK
from server.kernels.slot_tables import SlotTables
from server.kernels.torch_ops import MergeableLayers

TILE_ROWS = 16  # the fewest that tl.dot takes: decode wastes no more than it must
RANK_STEP = 16  # what passes from shrink to expand is read in units of this many ranks
RANK_BLOCK = 32  # ranks that are computed at once
IN_BLOCK_BYTES = 128  # what a shrink program reads at once of a row of x and of lora_a
SPLIT_FEATURES = 512  # input features that are worth a shrink program of their own,
MAX_SPLITS = 8  # and how many programs share a sum at most
OUT_BLOCK = 256  # output features of an expand program
EMBED_BLOCK = 128  # and of an embed program, which has less to wait for
EMPTY = tl.constexpr(EMPTY_RANK)


@dataclass(frozen=True, slots=True)
class Tiles:
    """A pass's segments in pieces of at most `TILE_ROWS` rows, on the device."""

    table: Tensor  # [num_tiles, 3] int32: slot, start, end; slot −1 is padding
    scales: Tensor  # [num_tiles] float32

    def __len__(self) -> int:
        return len(self.table)

    def write(self, segments: Sequence[Segment]) -> None:
        """Puts other segments into the same memory, padded to its size: a captured CUDA graph sees them."""
        tiles = cut_tiles(torch.device("cpu"), segments, len(self))
        self.table.copy_(tiles.table, non_blocking=True)
        self.scales.copy_(tiles.scales, non_blocking=True)


def cut_tiles(device: torch.device, segments: Sequence[Segment], num_tiles: int = 0) -> Tiles:
    """Cuts segments into tiles, padded to `num_tiles` for CUDA graphs, which replay a table of one size."""
    table, scales = [], []
    for slot, start, end, scale in segments:
        for row in range(start, end, TILE_ROWS):
            table.append((slot, row, min(row + TILE_ROWS, end)))
            scales.append(scale)
    padding = num_tiles - len(table)
    table += [(-1, 0, 0)] * padding
    scales += [0.0] * padding
    return Tiles(
        torch.tensor(table, dtype=torch.int32).reshape(-1, 3).to(device, non_blocking=True),
        torch.tensor(scales, dtype=torch.float32).to(device, non_blocking=True),
    )


class TritonLinearGroup(MergeableLayers):
    """Layers that stay as they are, and the bypasses of them all in two launches."""

    def __init__(self, device: torch.device, max_rank: int, layers: Sequence[nn.Module], num_slots: int) -> None:
        super().__init__(layers)
        self._max_rank = max_rank
        self._tables = SlotTables(device, next(layers[0].parameters()).dtype, len(layers), num_slots)

    def set_slot(self, layer: int, slot: int, weights: LayerWeights | None) -> None:
        assert weights is None or len(weights.lora_a) <= self._max_rank
        self._tables.set(layer, slot, weights)

    def __call__(self, x: Tensor, passes: Sequence[Tiles]) -> list[Tensor]:
        outputs = self.outputs(x)
        if passes:
            assert all(y.is_contiguous() for y in outputs)
            rows = x.reshape(-1, x.shape[-1]).contiguous()
            for tiles in passes:
                self._add_lora(outputs, rows, tiles)
        return outputs

    def _add_lora(self, ys: Sequence[Tensor], x: Tensor, tiles: Tiles) -> None:
        """Adds the layers' bypasses for x [num_tokens, in_features] to their ys [..., out_features], in place."""
        num_tokens, in_features = x.shape
        tables = self._tables
        num_layers, num_slots = tables.shape
        out_features = tuple(y.shape[-1] for y in ys)
        in_block = IN_BLOCK_BYTES // x.element_size()
        num_splits = min(MAX_SPLITS, triton.cdiv(in_features, SPLIT_FEATURES))
        split = in_block * triton.cdiv(in_features, in_block * num_splits)
        width = RANK_STEP * triton.cdiv(self._max_rank, RANK_STEP)
        shrunk = torch.empty(num_layers, num_splits, num_tokens, width, dtype=torch.float32, device=x.device)
        shrink[len(tiles), num_splits, num_layers](
            x, tiles.table, tables.a_ptrs, tables.ranks, shrunk, num_slots, num_tokens, in_features, split, width,
            TILE_ROWS=TILE_ROWS, RANK_STEP=RANK_STEP, RANK_BLOCK=RANK_BLOCK, IN_BLOCK=in_block,
            num_warps=4, num_stages=6, enable_fp_fusion=True,
        )  # fmt: skip
        expand[len(tiles), triton.cdiv(max(out_features), OUT_BLOCK), num_layers](
            tuple(ys), tiles.table, tiles.scales, tables.b_ptrs, tables.gain_ptrs, tables.bias_ptrs, tables.ranks,
            tables.scalings, shrunk, num_slots, num_tokens, width,
            OUT_FEATURES=out_features, NUM_SPLITS=num_splits,
            TILE_ROWS=TILE_ROWS, RANK_STEP=RANK_STEP, RANK_BLOCK=RANK_BLOCK, OUT_BLOCK=OUT_BLOCK,
            num_warps=8, num_stages=2, enable_fp_fusion=True,
        )  # fmt: skip


class TritonEmbeddingBypass:
    """The bypasses of an embedding in one launch."""

    def __init__(
        self, device: torch.device, dtype: torch.dtype, vocab_size: int, hidden_size: int, num_slots: int
    ) -> None:
        self._tables = SlotTables(device, dtype, 1, num_slots)
        self._vocab_size = vocab_size

    def set_slot(self, slot: int, weights: LayerWeights | None) -> None:
        self._tables.set(0, slot, weights)

    def __call__(self, y: Tensor, token_ids: Tensor, segments: Tiles) -> None:
        assert y.is_contiguous()
        tables, out_features = self._tables, y.shape[-1]
        embed[len(segments), triton.cdiv(out_features, EMBED_BLOCK)](
            y, token_ids, segments.table, segments.scales, tables.a_ptrs, tables.b_ptrs, tables.gain_ptrs,
            tables.bias_ptrs, tables.ranks, tables.scalings, self._vocab_size,
            OUT_FEATURES=out_features, TILE_ROWS=TILE_ROWS, RANK_BLOCK=RANK_BLOCK, OUT_BLOCK=EMBED_BLOCK,
            num_warps=8, num_stages=2, enable_fp_fusion=True,
        )  # fmt: skip


def triton_kernels(device: torch.device, dtype: torch.dtype, max_rank: int) -> Kernels:
    """The kernels for a CUDA device, a model of `dtype` and adapters of at most `max_rank`."""
    return Kernels(
        "triton",
        partial(TritonLinearGroup, device, max_rank),
        partial(cut_tiles, device),
        partial(TritonEmbeddingBypass, device, dtype),
        groups_layers=True,
        fixed_segments=partial(cut_tiles, device, ()),  # a tile for every row, at worst
    )


@triton.jit(do_not_specialize=["num_slots", "num_tokens"])  # type: ignore[untyped-decorator]
def shrink(
    x: tl.tensor,
    tiles: tl.tensor,
    a_ptrs: tl.tensor,
    ranks: tl.tensor,
    shrunk: tl.tensor,
    num_slots: int,
    num_tokens: int,
    in_features: int,
    split: int,
    width: int,
    TILE_ROWS: tl.constexpr,
    RANK_STEP: tl.constexpr,
    RANK_BLOCK: tl.constexpr,
    IN_BLOCK: tl.constexpr,
) -> None:
    """The first product, its sum over in_features cut into pieces of `split` so that few rows keep a device busy:

        shrunk[layer, n, t, :rank] = x[t, piece_n] @ lora_a[:, piece_n]ᵀ

    x [num_tokens, in_features], lora_a [rank, in_features], shrunk [layers, pieces, num_tokens, width] float32, tables
    [layers, num_slots]. Grid: tiles, pieces, layers. Ranks up to the next RANK_STEP are set to zero.
    """
    slot, start, row, in_tile = _tile(tiles, TILE_ROWS)
    piece, layer = tl.program_id(1), tl.program_id(2)
    rank = tl.load(ranks + layer * num_slots + slot, mask=slot >= 0, other=EMPTY)
    if rank <= 0:
        return
    a = tl.load(a_ptrs + layer * num_slots + slot).to(tl.pointer_type(x.dtype.element_ty))
    a = tl.multiple_of(a, 16)
    x += start * in_features
    shrunk += ((layer * tl.num_programs(1) + piece) * num_tokens + start) * width
    first_in = piece * split
    end_in = min(first_in + split, in_features)
    for first_rank in range(0, rank, RANK_BLOCK):
        r = first_rank + tl.arange(0, RANK_BLOCK)
        total = tl.full((TILE_ROWS, RANK_BLOCK), 0, tl.float32)
        for first in range(first_in, end_in, IN_BLOCK):
            k = first + tl.arange(0, IN_BLOCK)[None, :]
            x_block = tl.load(x + row * in_features + k, mask=in_tile & (k < end_in), other=0)
            a_block = tl.load(a + r[:, None] * in_features + k, mask=(r < rank)[:, None] & (k < end_in), other=0)
            total = tl.dot(x_block, a_block.T, total, input_precision="ieee")
        is_kept = r < (rank + RANK_STEP - 1) // RANK_STEP * RANK_STEP
        tl.store(shrunk + row * width + r[None, :], total, mask=in_tile & is_kept[None, :])


@triton.jit(do_not_specialize=["num_slots", "num_tokens"])  # type: ignore[untyped-decorator]
def expand(
    ys: tl.tuple,
    tiles: tl.tensor,
    scales: tl.tensor,
    b_ptrs: tl.tensor,
    gain_ptrs: tl.tensor,
    bias_ptrs: tl.tensor,
    ranks: tl.tensor,
    scalings: tl.tensor,
    shrunk: tl.tensor,
    num_slots: int,
    num_tokens: int,
    width: int,
    OUT_FEATURES: tl.constexpr,
    NUM_SPLITS: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    RANK_STEP: tl.constexpr,
    RANK_BLOCK: tl.constexpr,
    OUT_BLOCK: tl.constexpr,
) -> None:
    """The second product, of the first one's pieces added in their order:

        y[t] = gain ⊙ (y[t] + scale · scaling · (Σ_n shrunk[layer, n, t, :rank]) @ lora_b) + bias

    Per layer y [num_tokens, out_features]; lora_b [rank, out_features], gain and bias [out_features] float32 where
    there are any, shrunk [layers, NUM_SPLITS, num_tokens, width], tables [layers, num_slots], scales [num_tiles].
    Grid: tiles, blocks of the widest layer's outputs, layers.
    """
    slot, start, row, in_tile = _tile(tiles, TILE_ROWS)
    layer, first_out = tl.program_id(2), tl.program_id(1) * OUT_BLOCK
    y, out_features = ys[0], OUT_FEATURES[0]
    for other in tl.static_range(1, len(ys)):
        if layer == other:
            y, out_features = ys[other], OUT_FEATURES[other]
    entry = layer * num_slots + slot
    rank = tl.load(ranks + entry, mask=slot >= 0, other=EMPTY)
    if (rank == EMPTY) | (first_out >= out_features):
        return
    b = tl.load(b_ptrs + entry).to(tl.pointer_type(y.dtype.element_ty))
    b = tl.multiple_of(b, 16)
    scaling = tl.load(scalings + entry) * tl.load(scales + tl.program_id(0))
    out = first_out + tl.arange(0, OUT_BLOCK)[None, :]
    y_block, y_mask = y + start * out_features + row * out_features + out, in_tile & (out < out_features)
    base = tl.load(y_block, mask=y_mask)
    total = tl.full((TILE_ROWS, OUT_BLOCK), 0, tl.float32)
    for first_rank in range(0, rank, RANK_BLOCK):
        r = first_rank + tl.arange(0, RANK_BLOCK)
        is_kept = r < (rank + RANK_STEP - 1) // RANK_STEP * RANK_STEP
        h = tl.full((TILE_ROWS, RANK_BLOCK), 0, tl.float32)
        for piece in tl.static_range(NUM_SPLITS):
            h_rows = shrunk + ((layer * NUM_SPLITS + piece) * num_tokens + start) * width
            h += tl.load(h_rows + row * width + r[None, :], mask=in_tile & is_kept[None, :], other=0)
        b_block = tl.load(b + r[:, None] * out_features + out, mask=(r < rank)[:, None] & (out < out_features), other=0)
        total = tl.dot(h.to(b_block.dtype), b_block, total, input_precision="ieee")
    y_new = base.to(tl.float32) + scaling * total
    y_new = _row(gain_ptrs + entry, out, out_features, 1) * y_new + _row(bias_ptrs + entry, out, out_features, 0)
    tl.store(y_block, y_new, mask=y_mask)


@triton.jit  # type: ignore[untyped-decorator]
def embed(
    y: tl.tensor,
    token_ids: tl.tensor,
    tiles: tl.tensor,
    scales: tl.tensor,
    a_ptrs: tl.tensor,
    b_ptrs: tl.tensor,
    gain_ptrs: tl.tensor,
    bias_ptrs: tl.tensor,
    ranks: tl.tensor,
    scalings: tl.tensor,
    vocab_size: int,
    OUT_FEATURES: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    RANK_BLOCK: tl.constexpr,
    OUT_BLOCK: tl.constexpr,
) -> None:
    """Both products for an embedding, the first of which picks columns:

        y[t] = gain ⊙ (y[t] + scale · scaling · lora_a[:rank, token_ids[t]]ᵀ @ lora_b) + bias

    y [num_tokens, OUT_FEATURES], token_ids [num_tokens] int64, lora_a [rank, vocab_size], lora_b [rank, OUT_FEATURES],
    tables [num_slots], scales [num_tiles]. Grid: tiles, blocks of outputs.
    """
    slot, start, row, in_tile = _tile(tiles, TILE_ROWS)
    rank = tl.load(ranks + slot, mask=slot >= 0, other=EMPTY)
    if rank == EMPTY:
        return
    a = tl.load(a_ptrs + slot).to(tl.pointer_type(y.dtype.element_ty))
    b = tl.load(b_ptrs + slot).to(tl.pointer_type(y.dtype.element_ty))
    b = tl.multiple_of(b, 16)
    scaling = tl.load(scalings + slot) * tl.load(scales + tl.program_id(0))
    token = tl.load(token_ids + start + row, mask=in_tile, other=0)
    out = tl.program_id(1) * OUT_BLOCK + tl.arange(0, OUT_BLOCK)[None, :]
    y_block, y_mask = y + start * OUT_FEATURES + row * OUT_FEATURES + out, in_tile & (out < OUT_FEATURES)
    base = tl.load(y_block, mask=y_mask)
    total = tl.full((TILE_ROWS, OUT_BLOCK), 0, tl.float32)
    for first_rank in range(0, rank, RANK_BLOCK):
        r = first_rank + tl.arange(0, RANK_BLOCK)
        h = tl.load(a + r[None, :].to(tl.int64) * vocab_size + token, mask=in_tile & (r < rank)[None, :], other=0)
        b_block = tl.load(b + r[:, None] * OUT_FEATURES + out, mask=(r < rank)[:, None] & (out < OUT_FEATURES), other=0)
        total = tl.dot(h, b_block, total, input_precision="ieee")
    y_new = base.to(tl.float32) + scaling * total
    y_new = _row(gain_ptrs + slot, out, OUT_FEATURES, 1) * y_new + _row(bias_ptrs + slot, out, OUT_FEATURES, 0)
    tl.store(y_block, y_new, mask=y_mask)


@triton.jit  # type: ignore[untyped-decorator]
def _row(entry: tl.tensor, out: tl.tensor, out_features: int, other: tl.constexpr) -> tl.tensor:
    """A block of the float32 row whose address an entry of a table holds; `other` throughout if it holds none."""
    address = tl.load(entry)
    is_there = out < tl.where(address == 0, 0, out_features)
    return tl.load(address.to(tl.pointer_type(tl.float32)) + out, mask=is_there, other=other)


@triton.jit  # type: ignore[untyped-decorator]
def _tile(tiles: tl.tensor, TILE_ROWS: tl.constexpr) -> tuple[tl.tensor, tl.tensor, tl.tensor, tl.tensor]:
    """The program's tile: slot, first row in int64, and of the rows after it [TILE_ROWS, 1] which ones it covers."""
    tile = tiles + 3 * tl.program_id(0)
    start, row = tl.load(tile + 1), tl.arange(0, TILE_ROWS)[:, None]
    return tl.load(tile), start.to(tl.int64), row, start + row < tl.load(tile + 2)

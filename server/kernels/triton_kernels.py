"""The Triton kernels themselves. Which shapes they are launched with is in `triton_ops`.

They find a slot's weights through tables of pointers, so that each has a rank of its own and nothing is padded to the
largest.
"""

import triton
import triton.language as tl

from server.kernels.slot_tables import EMPTY as EMPTY_RANK

EMPTY = tl.constexpr(EMPTY_RANK)


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

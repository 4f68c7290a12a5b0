"""LoRA bypasses on CUDA in Triton: shrink and expand (Punica's SGMV) over adapters that stay where they are in memory.

A step's segments are cut into tiles of a few rows, a program each: one launch serves decode (a row per slot) and
prefill (hundreds). Shapes and order of all sums follow from the layer and the rank alone: an output row has the same
bits whatever other rows share its call. The tables stay in place: a captured CUDA graph sees later writes.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
import triton
from torch import Tensor, nn

from server.kernels import Kernels, LayerWeights, Segment
from server.kernels.slot_tables import SlotTables
from server.kernels.torch_ops import MergeableLayers
from server.kernels.triton_kernels import embed, expand, shrink

TILE_ROWS = 16  # the fewest that tl.dot takes: decode wastes no more than it must
RANK_STEP = 16  # what passes from shrink to expand is read in units of this many ranks
RANK_BLOCK = 32  # ranks that are computed at once
IN_BLOCK_BYTES = 128  # what a shrink program reads at once of a row of x and of lora_a
SPLIT_FEATURES = 512  # input features that are worth a shrink program of their own,
MAX_SPLITS = 8  # and how many programs share a sum at most
OUT_BLOCK = 256  # output features of an expand program
EMBED_BLOCK = 128  # and of an embed program, which has less to wait for


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

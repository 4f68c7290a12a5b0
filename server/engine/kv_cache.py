"""The paged KV cache and attention over it, in plain torch: runs on every device. Engine thread only."""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from server.engine.attention import AttentionOptions
from server.engine.forward_batch import ForwardBatch
from server.kernels import torch_ops


@dataclass(frozen=True, slots=True)
class KVShape:
    """What the cache of one token looks like in this model, and how it is read."""

    num_layers: int
    num_kv_heads: int
    head_dim: int
    plain_attention: bool = True  # no layer has a soft cap or sinks

    def bytes_per_token(self, dtype: torch.dtype) -> int:
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim * dtype.itemsize


class TorchKVCache:
    """Owns K and V of every layer, a row for each token: block * block_size + offset."""

    def __init__(
        self, shape: KVShape, num_blocks: int, block_size: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.block_size = block_size
        size = (shape.num_layers, num_blocks * block_size, shape.num_kv_heads, shape.head_dim)
        self.keys = torch.zeros(size, dtype=dtype, device=device)
        self.values = torch.zeros(size, dtype=dtype, device=device)

    def step(self, batch: ForwardBatch) -> "TorchAttentionStep":
        return TorchAttentionStep(self, batch)


class TorchAttentionStep:
    """Attention of one step: writes the new K and V into the cache and reads every request's context from it."""

    addresses: tuple[int, ...] = ()

    def __init__(self, cache: TorchKVCache, batch: ForwardBatch) -> None:
        self._batch = batch
        self._cache = cache
        decoding = [row for row, length in enumerate(batch.query_lens) if length == 1]
        prefilling = [row for row, length in enumerate(batch.query_lens) if length > 1]
        self._decode = _DecodeRows(batch, cache.block_size, decoding) if decoding else None
        self._sequences = [_Sequence(batch, cache.block_size, row) for row in prefilling]
        self._decoding = decoding

    @cached_property
    def _decode_sequences(self) -> list["_Sequence"]:
        """The decoding requests one by one, for layers with soft caps or sinks."""
        return [_Sequence(self._batch, self._cache.block_size, row) for row in self._decoding]

    def attend(self, layer: int | None, query: Tensor, key: Tensor, value: Tensor, options: AttentionOptions) -> Tensor:
        assert layer is not None
        keys, values = self._cache.keys[layer], self._cache.values[layer]
        keys.index_copy_(0, self._batch.slot_mapping, key)
        values.index_copy_(0, self._batch.slot_mapping, value)
        output = torch.empty_like(query, memory_format=torch.contiguous_format)
        sequences = self._sequences
        if self._decode is not None:
            if options.softcap is None and options.sinks is None:
                self._decode.attend(
                    output, query, keys, values, scaling=options.scaling, sliding_window=options.sliding_window
                )
            else:
                sequences = sequences + self._decode_sequences
        for sequence in sequences:
            output[sequence.tokens] = torch_ops.attention(
                query[sequence.tokens].transpose(0, 1),
                keys[sequence.cached].transpose(0, 1),
                values[sequence.cached].transpose(0, 1),
                **options._asdict(),
            ).transpose(0, 1)
        return output


class _Sequence:
    """One request's rows of the step and rows of the cache."""

    def __init__(self, batch: ForwardBatch, block_size: int, row: int) -> None:
        start = sum(batch.query_lens[:row])
        self.tokens = slice(start, start + batch.query_lens[row])
        positions = torch.arange(batch.kv_lens[row], device=batch.block_tables.device)
        self.cached = _cache_rows(batch.block_tables[row : row + 1], positions[None], block_size)[0]


class _DecodeRows:
    """All requests that compute a single token, handled together with contexts padded to the longest."""

    def __init__(self, batch: ForwardBatch, block_size: int, rows: list[int]) -> None:
        self._all = len(rows) == batch.num_tokens
        row_index = torch.tensor(rows, device=batch.block_tables.device)
        self._tokens = batch.query_start_loc[row_index].long()
        own = batch.context_lens[row_index, None].long() - 1
        positions = torch.arange(max(batch.kv_lens[row] for row in rows), device=own.device)
        self._distance = own - positions  # from a request's own token back; negative in the padding
        # Padding repeats the own token: others may have left a NaN in the cache, which no weight of 0 takes away.
        self._cached = _cache_rows(batch.block_tables[row_index], torch.minimum(positions, own), block_size)
        self._visible: dict[int | None, Tensor] = {}  # by sliding window, the same in all layers that have it

    def attend(
        self, output: Tensor, query: Tensor, keys: Tensor, values: Tensor, *, scaling: float, sliding_window: int | None
    ) -> None:
        if sliding_window not in self._visible:
            visible = self._distance >= 0
            if sliding_window is not None:
                visible &= self._distance < sliding_window
            self._visible[sliding_window] = visible
        attended = torch_ops.decode_attention(
            query if self._all else query[self._tokens],
            keys[self._cached],
            values[self._cached],
            self._visible[sliding_window],
            scaling=scaling,
        )
        if self._all:
            output.copy_(attended)
        else:
            output[self._tokens] = attended


def _cache_rows(block_tables: Tensor, positions: Tensor, block_size: int) -> Tensor:
    """Rows of the cache that hold each request's tokens at `positions`, both [num_requests, length]."""
    return block_tables.gather(1, positions // block_size).long() * block_size + positions % block_size

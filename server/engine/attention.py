"""The one attention function that every base model uses, over the paged KV cache. Engine thread only.

transformers hands the keyword arguments of `model(...)` down to its attention function, so the step travels with the
call: no global state, and no code for any one architecture.
"""

from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from server.engine.forward_batch import ForwardBatch
from server.engine.kv_cache import KVCache
from server.kernels import torch_ops

ATTENTION_NAME = "loraplex_paged"


class AttentionStep(Protocol):
    """Whoever answers a layer's attention during one forward."""

    def attend(
        self,
        layer: int | None,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        scaling: float,
        sliding_window: int | None,
        softcap: float | None,
        sinks: Tensor | None,
    ) -> Tensor:
        """Query [num_heads, num_tokens, head_dim] → output [num_tokens, num_heads, head_dim]; K and V as the query."""


def paged_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None = None,
    *,
    attention_step: AttentionStep | None = None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """The function registered with transformers: tensors are [1, num_heads, num_tokens, head_dim]."""
    if attention_step is None:
        raise TypeError("the model does not pass its keyword arguments on to the attention function")
    output = attention_step.attend(
        getattr(module, "layer_idx", None),
        query[0],
        key[0],
        value[0],
        scaling=query.shape[-1] ** -0.5 if scaling is None else scaling,
        sliding_window=sliding_window,
        softcap=softcap,
        sinks=s_aux,
    )
    return output[None], None


AttentionInterface.register(ATTENTION_NAME, paged_attention)


class PagedAttention:
    """Attention of one step: writes the new K and V into the cache and reads every request's context from it."""

    def __init__(self, batch: ForwardBatch, cache: KVCache) -> None:
        self._batch = batch
        self._cache = cache
        decoding = [row for row, length in enumerate(batch.query_lens) if length == 1]
        prefilling = [row for row, length in enumerate(batch.query_lens) if length > 1]
        self._decode = _DecodeRows(batch, cache.block_size, decoding) if decoding else None
        self._sequences = [_Sequence(batch, cache.block_size, row) for row in prefilling]
        self._decode_sequences = [_Sequence(batch, cache.block_size, row) for row in decoding]

    def attend(
        self,
        layer: int | None,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        scaling: float,
        sliding_window: int | None,
        softcap: float | None,
        sinks: Tensor | None,
    ) -> Tensor:
        assert layer is not None
        self._cache.write(layer, self._batch.slot_mapping, key.transpose(0, 1), value.transpose(0, 1))
        keys, values = self._cache.keys[layer], self._cache.values[layer]
        output = torch.empty_like(query.transpose(0, 1), memory_format=torch.contiguous_format)
        sequences = self._sequences
        if self._decode is not None:
            if softcap is None and sinks is None:
                self._decode.attend(output, query, keys, values, scaling=scaling, sliding_window=sliding_window)
            else:
                sequences = sequences + self._decode_sequences
        for sequence in sequences:
            output[sequence.tokens] = torch_ops.attention(
                query[:, sequence.tokens],
                keys[sequence.cached].transpose(0, 1),
                values[sequence.cached].transpose(0, 1),
                scaling=scaling,
                sliding_window=sliding_window,
                softcap=softcap,
                sinks=sinks,
            ).transpose(0, 1)
        return output


class _Sequence:
    """One request's rows of the step and rows of the cache."""

    def __init__(self, batch: ForwardBatch, block_size: int, row: int) -> None:
        start = sum(batch.query_lens[:row])
        self.tokens = slice(start, start + batch.query_lens[row])
        self.cached = _cache_rows(batch.block_tables[row : row + 1], batch.kv_lens[row], block_size)[0]


class _DecodeRows:
    """All requests that compute a single token, handled together with contexts padded to the longest."""

    def __init__(self, batch: ForwardBatch, block_size: int, rows: list[int]) -> None:
        self._all = len(rows) == batch.num_tokens
        row_index = torch.tensor(rows, device=batch.block_tables.device)
        self._tokens = batch.query_start_loc[row_index].long()
        self._kv_lens = batch.context_lens[row_index]
        longest = max(batch.kv_lens[row] for row in rows)
        self._cached = _cache_rows(batch.block_tables[row_index], longest, block_size)

    def attend(
        self, output: Tensor, query: Tensor, keys: Tensor, values: Tensor, *, scaling: float, sliding_window: int | None
    ) -> None:
        by_token = query.transpose(0, 1)
        attended = torch_ops.decode_attention(
            by_token if self._all else by_token[self._tokens],
            keys[self._cached],
            values[self._cached],
            self._kv_lens,
            scaling=scaling,
            sliding_window=sliding_window,
        )
        if self._all:
            output.copy_(attended)
        else:
            output[self._tokens] = attended


def _cache_rows(block_tables: Tensor, length: int, block_size: int) -> Tensor:
    """Rows of the cache [num_requests, length] that hold the first `length` tokens of each request."""
    positions = torch.arange(length, device=block_tables.device)
    return block_tables[:, positions // block_size].long() * block_size + positions % block_size

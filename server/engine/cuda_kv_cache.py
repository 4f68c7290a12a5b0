"""The paged KV cache and attention over it, by torch's own flash attention for CUDA. Engine thread only."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn

from server.engine.attention import AttentionOptions
from server.engine.forward_batch import ForwardBatch
from server.engine.kv_cache import KVShape


class CudaKVCache:
    """Owns K and V of every layer in pages of whole blocks, as the kernel takes them."""

    page_size = 256  # tokens; the kernel wants whole multiples of it in a block

    def __init__(
        self,
        shape: KVShape,
        num_blocks: int,
        block_size: int,
        dtype: torch.dtype,
        device: torch.device,
        attend: Callable[..., Any] = varlen_attn,
    ) -> None:
        """`attend` computes as `torch.nn.attention.varlen.varlen_attn` does."""
        assert block_size % self.page_size == 0
        self.block_size = block_size
        self.varlen_attn = attend
        size = (shape.num_layers, num_blocks, block_size, shape.num_kv_heads, shape.head_dim)
        self.keys = torch.zeros(size, dtype=dtype, device=device)
        self.values = torch.zeros(size, dtype=dtype, device=device)

    @classmethod
    def serves(cls, shape: KVShape, dtype: torch.dtype) -> bool:
        """Whether the kernel computes such a model's attention: half precision, up to 256 a head, softmax alone."""
        is_half = dtype in (torch.float16, torch.bfloat16)
        return is_half and shape.head_dim % 8 == 0 and shape.head_dim <= 256 and shape.plain_attention

    def step(self, batch: ForwardBatch) -> "CudaAttentionStep":
        return CudaAttentionStep(self, batch)


class CudaAttentionStep:
    """Attention of one step: chunks of prompts and decoding requests in one call per layer.

    Nothing of it is read back to the host, so a CUDA graph can hold it. Each request's sum runs over its context in one
    fixed order (`num_splits=1`, and the same kernel whatever the step is made of).
    """

    addresses: tuple[int, ...] = ()

    def __init__(self, cache: CudaKVCache, batch: ForwardBatch) -> None:
        self._cache = cache
        self._slot_mapping = batch.slot_mapping
        self._options = {
            "cu_seq_q": batch.query_start_loc,
            # The kernel asks for it beside block tables, where `seqused_k` says how long each context is.
            "cu_seq_k": F.pad(batch.context_lens.cumsum(0, dtype=torch.int32), (1, 0)),
            "max_q": max(batch.query_lens),
            "max_k": batch.block_tables.shape[1] * cache.block_size,
            "seqused_k": batch.context_lens,
            "block_table": batch.block_tables,
            "num_splits": 1,
        }

    def attend(self, layer: int | None, query: Tensor, key: Tensor, value: Tensor, options: AttentionOptions) -> Tensor:
        assert layer is not None
        assert options.softcap is None
        assert options.sinks is None
        keys, values = self._cache.keys[layer], self._cache.values[layer]
        keys.flatten(0, 1).index_copy_(0, self._slot_mapping, key)
        values.flatten(0, 1).index_copy_(0, self._slot_mapping, value)
        window = -1 if options.sliding_window is None else options.sliding_window - 1  # tokens before the query's own
        output: Tensor = self._cache.varlen_attn(
            query, keys, values,
            scale=options.scaling, window_size=(window, 0), enable_gqa=query.shape[1] != key.shape[1], **self._options,
        )  # fmt: skip
        return output

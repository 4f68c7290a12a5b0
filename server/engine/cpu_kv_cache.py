"""The paged KV cache and attention over it, by the native CPU kernel. Engine thread only."""

import torch
from torch import Tensor

from server.engine.attention import AttentionOptions
from server.engine.forward_batch import ForwardBatch
from server.engine.kv_cache import KVShape
from server.kernels import native_attention


class CpuKVCache:
    """Owns K and V of every layer in the kernel's own layout, whose blocks have a fixed size."""

    block_size = native_attention.BLOCK_SIZE

    def __init__(self, shape: KVShape, num_blocks: int, dtype: torch.dtype = torch.float32) -> None:
        self._layers = [
            native_attention.KVCacheLayer(num_blocks, shape.num_kv_heads, shape.head_dim, dtype)
            for _ in range(shape.num_layers)
        ]
        self._options: dict[tuple[object, ...], native_attention.AttentionOptions] = {}

    def step(self, batch: ForwardBatch) -> "CpuAttentionStep":
        return CpuAttentionStep(self, batch)

    def layer(self, layer: int) -> native_attention.KVCacheLayer:
        return self._layers[layer]

    def options(self, layer: int, num_heads: int, options: AttentionOptions) -> native_attention.AttentionOptions:
        """How a layer attends, as the kernel wants it; made once."""
        scaling, sliding_window, softcap, sinks = options
        key = (layer, num_heads, scaling, sliding_window, softcap, sinks is None)
        made = self._options.get(key)
        if made is None:
            made = self._options[key] = native_attention.AttentionOptions(num_heads, **options._asdict())
        return made


class CpuAttentionStep:
    """Attention of one step. Each query reduces over its context in one fixed order, whatever else is in the batch."""

    def __init__(self, cache: CpuKVCache, batch: ForwardBatch) -> None:
        self._cache = cache
        self._slot_mapping = batch.slot_mapping
        self._batch = native_attention.AttentionBatch(batch.block_tables, batch.query_start_loc, batch.position_ids[0])
        self.addresses = (self._batch.pointer, self._slot_mapping.data_ptr())  # of what the kernels read in every layer

    def attend(self, layer: int | None, query: Tensor, key: Tensor, value: Tensor, options: AttentionOptions) -> Tensor:
        assert layer is not None
        cache = self._cache.layer(layer)
        native_attention.write_kv(cache, _side_by_side(key), _side_by_side(value), self._slot_mapping)
        made = self._cache.options(layer, query.shape[1], options)
        return native_attention.paged_attention(_side_by_side(query), cache, made, self._batch)


def _side_by_side(tokens: Tensor) -> Tensor:
    """[num_tokens, num_heads, head_dim] with a token's heads side by side, as the kernels read them."""
    _, of_head, of_element = tokens.stride()
    return tokens if of_element == 1 and of_head == tokens.shape[2] else tokens.contiguous()

"""Paged attention by the native CPU kernels; see `native`."""

import ctypes

import torch
from torch import Tensor

from server.kernels.memory import lazy_zeros
from server.kernels.native import FLOAT, INT, KINDS, PANEL, POINTER, Function, pointer

BLOCK_SIZE = 16  # positions of a KV block
MAX_HEAD_DIM = 256

_attention, _write_kv = Function("attention"), Function("write_kv")


def serves_head_dim(head_dim: int) -> bool:
    """Whether the attention kernel is made for heads of this size."""
    return head_dim % 8 == 0 and 0 < head_dim <= MAX_HEAD_DIM


class _CacheStruct(ctypes.Structure):
    _fields_ = (("keys", POINTER), ("values", POINTER), ("kind", INT), ("kv_heads", INT), ("head_dim", INT))


class _OptionsStruct(ctypes.Structure):
    _fields_ = (
        ("heads", INT),
        ("sliding_window", INT),
        ("sinks", POINTER),
        ("scaling", FLOAT),
        ("softcap", FLOAT),
    )


class _BatchStruct(ctypes.Structure):
    _fields_ = (
        ("num_seqs", INT),
        ("max_blocks", INT),
        ("block_tables", POINTER),
        ("query_start_loc", POINTER),
        ("positions", POINTER),
    )


class KVCacheLayer:
    """A layer's keys [num_blocks, kv_heads, head_dim, 16] and values [num_blocks, kv_heads, 16, head_dim up to 16s]."""

    def __init__(self, num_blocks: int, kv_heads: int, head_dim: int, dtype: torch.dtype = torch.float32) -> None:
        if not serves_head_dim(head_dim):
            raise ValueError(f"head_dim {head_dim} is not a multiple of 8 up to {MAX_HEAD_DIM}")
        if dtype not in (torch.float32, torch.bfloat16):
            raise ValueError(f"the KV cache is float32 or bfloat16, not {dtype}")
        self.kv_heads, self.head_dim = kv_heads, head_dim
        value_dim = -(-head_dim // PANEL) * PANEL
        self.keys = lazy_zeros((num_blocks, kv_heads, head_dim, BLOCK_SIZE), dtype)
        self.values = lazy_zeros((num_blocks, kv_heads, BLOCK_SIZE, value_dim), dtype)
        self._struct = _CacheStruct(self.keys.data_ptr(), self.values.data_ptr(), KINDS[dtype], kv_heads, head_dim)
        self.pointer = ctypes.addressof(self._struct)


class AttentionOptions:
    """How a layer attends: scores scaling * q @ k.T, over the last `sliding_window` positions.

    Scores are capped as softcap * tanh(score / softcap); a logit per head in `sinks` [heads] joins the denominator.
    """

    def __init__(
        self,
        heads: int,
        scaling: float,
        *,
        softcap: float | None = None,
        sliding_window: int | None = None,
        sinks: Tensor | None = None,
    ) -> None:
        self.heads = heads
        self._sinks = None if sinks is None else sinks.detach().float().contiguous()
        self._struct = _OptionsStruct(heads, sliding_window or 0, pointer(self._sinks), scaling, softcap or 0.0)
        self.pointer = ctypes.addressof(self._struct)


class AttentionBatch:
    """A step's tokens: those of sequence s are rows query_start_loc[s] .. query_start_loc[s + 1] - 1.

    block_tables [num_seqs, max_blocks] and query_start_loc [num_seqs + 1] are int32, positions [num_tokens] int64.
    """

    def __init__(self, block_tables: Tensor, query_start_loc: Tensor, positions: Tensor) -> None:
        if block_tables.dtype != torch.int32 or query_start_loc.dtype != torch.int32 or positions.dtype != torch.int64:
            raise ValueError("block_tables and query_start_loc are int32, positions int64")
        if query_start_loc.numel() != block_tables.shape[0] + 1:
            raise ValueError(f"{query_start_loc.numel()} query starts for {block_tables.shape[0]} sequences")
        self._tensors = (block_tables.contiguous(), query_start_loc.contiguous(), positions.contiguous())
        pointers = (tensor.data_ptr() for tensor in self._tensors)
        self._struct = _BatchStruct(block_tables.shape[0], block_tables.shape[1], *pointers)
        self.pointer = ctypes.addressof(self._struct)


def write_kv(cache: KVCacheLayer, k: Tensor, v: Tensor, slot_mapping: Tensor) -> None:
    """Caches k and v [num_tokens, kv_heads, head_dim] at slot_mapping [num_tokens] (int64, block * 16 + offset).

    A negative position is skipped. Heads lie side by side; tokens may be any stride apart.
    """
    _write_kv(
        cache.pointer,
        k.data_ptr(),
        k.stride(0),
        v.data_ptr(),
        v.stride(0),
        slot_mapping.data_ptr(),
        slot_mapping.numel(),
    )


def paged_attention(q: Tensor, cache: KVCacheLayer, options: AttentionOptions, batch: AttentionBatch) -> Tensor:
    """out [num_tokens, heads, head_dim] = softmax(scaling * q @ k.T) @ v over the cached positions up to a token's own.

    write_kv has stored them, the token's own included. Heads of q lie side by side; tokens may be any stride apart.
    """
    out = torch.empty(q.shape)
    failed = _attention(
        cache.pointer, options.pointer, batch.pointer, q.data_ptr(), q.stride(0), out.data_ptr(), out.stride(0)
    )
    if failed:
        raise MemoryError(f"no scratch memory for the attention of {q.shape[0]} tokens")
    return out

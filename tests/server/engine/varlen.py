"""`torch.nn.attention.varlen.varlen_attn` over pages as its documentation has it, in plain torch: what it asks of its
arguments is asserted, and nothing is read on the host, so that it can be recorded as a CUDA graph records a kernel."""

import math

import torch
from torch import Tensor


def varlen_attn(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seq_q: Tensor,
    cu_seq_k: Tensor | None,
    max_q: int,
    max_k: int,
    *,
    scale: float | None = None,
    window_size: tuple[int, int] = (-1, -1),
    enable_gqa: bool = False,
    seqused_k: Tensor | None = None,
    block_table: Tensor | None = None,
    num_splits: int | None = None,
) -> Tensor:
    """Attention of packed sequences, aligned at their ends.

    Args:
        query: [T_q, H_q, D]. key, value: [pages, page_size, H_kv, D].
        window_size: tokens to the left and right that a token sees beside itself; −1: all.
    """
    num_seqs = len(cu_seq_q) - 1
    assert block_table is not None
    assert seqused_k is not None, "block_table requires seqused_k"
    assert cu_seq_k is not None, "the flash attention built into torch wants both or none"
    for tensor, shape in ((seqused_k, (num_seqs,)), (cu_seq_k, (num_seqs + 1,)), (cu_seq_q, (num_seqs + 1,))):
        assert tensor.shape == shape
        assert tensor.dtype == torch.int32
        assert tensor.is_contiguous()
    assert block_table.dtype == torch.int32
    assert len(block_table) == num_seqs
    assert key.shape[1] % 256 == 0, "page size"
    assert query.stride(-1) == key.stride(-1) == value.stride(-1) == block_table.stride(-1) == 1
    assert query.dtype == key.dtype == value.dtype
    num_heads, num_kv_heads, head_dim = query.shape[1], key.shape[2], query.shape[2]
    assert num_heads == num_kv_heads or enable_gqa
    assert head_dim % 8 == 0
    assert num_splits == 1, "batch invariance"
    left, right = window_size
    assert right == 0, "causal"

    tokens = torch.arange(len(query))
    sequence = torch.searchsorted(cu_seq_q[1:], tokens.int(), right=True)
    own = tokens - cu_seq_q[sequence + 1] + seqused_k[sequence]  # each token's position in its sequence
    positions = torch.arange(max_k)
    pages = block_table[sequence][:, positions // key.shape[1]].long()
    k, v = (cache[pages, positions % key.shape[1]] for cache in (key, value))  # [T_q, max_k, H_kv, D]
    distance = own[:, None] - positions
    visible = distance >= 0
    if left >= 0:
        visible = visible & (distance <= left)
    # What no token may see is cleared, not weighted with zero: it could be NaN.
    k, v = (cached.masked_fill(~visible[..., None, None], 0) for cached in (k, v))
    k, v = (cached.repeat_interleave(num_heads // num_kv_heads, 2) for cached in (k, v))
    scores = torch.einsum("thd,tkhd->thk", query, k) * (1 / math.sqrt(head_dim) if scale is None else scale)
    weights = scores.masked_fill(~visible[:, None], float("-inf")).softmax(-1)
    return torch.einsum("thk,tkhd->thd", weights, v)

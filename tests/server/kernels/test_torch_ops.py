"""Attention in plain torch, against its definition in float64."""

import math

import pytest
import torch
from torch import Tensor

from server.kernels import torch_ops

HEAD_DIMS = [8, 40, 64, 80, 96, 128]
NUM_HEADS, NUM_KV_HEADS = 6, 2

head_dims = pytest.mark.parametrize("head_dim", HEAD_DIMS)


def defined(query: Tensor, key: Tensor, value: Tensor, scaling: float, window: int | None) -> Tensor:
    """Of the last tokens' queries [num_heads, q, head_dim] over keys and values [num_kv_heads, k, head_dim]."""
    num_queries, num_keys = query.shape[1], key.shape[1]
    key, value = (heads.double().repeat_interleave(len(query) // len(key), 0) for heads in (key, value))
    scores = query.double() @ key.transpose(1, 2) * scaling
    for row in range(num_queries):
        own = num_keys - num_queries + row
        scores[:, row, own + 1 :] = -math.inf
        if window is not None:
            scores[:, row, : max(0, own + 1 - window)] = -math.inf
    return scores.softmax(-1) @ value


@head_dims
@pytest.mark.parametrize("window", [None, 1, 7, 100])
@pytest.mark.parametrize(("num_queries", "num_keys"), [(1, 1), (20, 20), (1, 20), (5, 20)])
def test_attention(num_queries: int, num_keys: int, window: int | None, head_dim: int) -> None:
    torch.manual_seed(0)
    query = torch.randn(NUM_HEADS, num_queries, head_dim)
    key, value = torch.randn(2, NUM_KV_HEADS, num_keys, head_dim)
    expected = defined(query, key, value, 0.2, window)
    output = torch_ops.attention(query, key, value, scaling=0.2, sliding_window=window)
    torch.testing.assert_close(output.double(), expected, rtol=1e-5, atol=1e-5)
    # A cap that no score comes near takes the other path and changes nothing.
    capped = torch_ops.attention(query, key, value, scaling=0.2, sliding_window=window, softcap=1e5)
    torch.testing.assert_close(capped.double(), expected, rtol=1e-5, atol=1e-5)


@head_dims
def test_decode_attention(head_dim: int) -> None:
    """Each sequence as alone, over what it sees."""
    torch.manual_seed(0)
    query = torch.randn(3, NUM_HEADS, head_dim)
    key, value = torch.randn(2, 3, 20, NUM_KV_HEADS, head_dim)
    visible = torch.zeros(3, 20, dtype=torch.bool)
    ranges = [(0, 1), (0, 20), (5, 8)]
    for sequence, (start, end) in enumerate(ranges):
        visible[sequence, start:end] = True
    outputs = torch_ops.decode_attention(query, key, value, visible, scaling=0.2)
    for sequence, (start, end) in enumerate(ranges):
        keys, values = (cached[sequence, start:end].transpose(0, 1) for cached in (key, value))
        expected = defined(query[sequence, :, None], keys, values, 0.2, None)[:, 0]
        torch.testing.assert_close(outputs[sequence].double(), expected, rtol=1e-5, atol=1e-5)

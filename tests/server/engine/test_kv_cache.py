"""Attention over the paged cache in plain torch: steps of any make-up give what each request has alone."""

import math
from collections.abc import Sequence

import pytest
import torch

from server.engine.attention import AttentionOptions
from server.engine.forward_batch import build_forward_batch
from server.engine.kv_cache import KVShape, TorchKVCache
from server.engine.request import Request, SamplingParams
from server.engine.scheduler import ScheduledRequest
from server.kernels import torch_ops

CPU = torch.device("cpu")
BLOCK, NUM_BLOCKS = 4, 12
NUM_HEADS, NUM_KV_HEADS, HEAD_DIM = 4, 2, 16

Part = tuple[int, int, list[int]]  # tokens in the cache already, tokens to compute, blocks

STEPS: dict[str, list[Part]] = {
    "decode": [(0, 1, [3]), (4, 1, [7, 1]), (17, 1, [9, 2, 0, 5, 8])],
    "mixed": [(3, 1, [3]), (0, 9, [6, 4, 11]), (10, 1, [9, 1, 10]), (5, 6, [7, 8, 0])],
}


@pytest.mark.parametrize("windows", [[None, None], [5, None], [1, 5], [100, 5]], ids=str)
@pytest.mark.parametrize("kind", STEPS)
def test_each_request_attends_to_its_own_context(kind: str, windows: Sequence[int | None]) -> None:
    """Layers may have windows of their own; what others left in the rest of a block, a NaN even, does not matter."""
    torch.manual_seed(0)
    parts = STEPS[kind]
    cache = TorchKVCache(KVShape(len(windows), NUM_KV_HEADS, HEAD_DIM), NUM_BLOCKS, BLOCK, torch.float32, CPU)
    cache.keys.fill_(math.nan)
    cache.values.fill_(math.nan)
    rows = [[blocks[at // BLOCK] * BLOCK + at % BLOCK for at in range(old + new)] for old, new, blocks in parts]
    for (old, _, _), cached in zip(parts, rows, strict=True):
        for tensor in (cache.keys, cache.values):
            tensor[:, cached[:old]] = torch.randn(len(windows), old, NUM_KV_HEADS, HEAD_DIM)

    scheduled = []
    for old, new, blocks in parts:
        request = Request(0, [0] * (old + new), SamplingParams(), (), frozenset())
        request.num_computed_tokens, request.block_table = old, blocks
        scheduled.append(ScheduledRequest(request, new))
    batch = build_forward_batch(scheduled, BLOCK, CPU)
    step = cache.step(batch)
    sizes = [new for _, new, _ in parts]
    for layer, window in enumerate(windows):
        query = torch.randn(batch.num_tokens, NUM_HEADS, HEAD_DIM)
        key, value = torch.randn(2, batch.num_tokens, NUM_KV_HEADS, HEAD_DIM)
        outputs = step.attend(layer, query, key, value, AttentionOptions(0.3, window, None, None))
        for own_query, output, cached in zip(query.split(sizes), outputs.split(sizes), rows, strict=True):
            context = (tensor[layer, cached].transpose(0, 1) for tensor in (cache.keys, cache.values))
            expected = torch_ops.attention(own_query.transpose(0, 1), *context, scaling=0.3, sliding_window=window)
            torch.testing.assert_close(output, expected.transpose(0, 1))

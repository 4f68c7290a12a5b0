"""The arguments of torch's flash attention, by what they give under an operator that does what they say."""

import inspect

import pytest
import torch
from torch import Tensor
from torch.nn.attention import varlen

from server.engine.attention import AttentionOptions
from server.engine.cuda_kv_cache import CudaKVCache
from server.engine.forward_batch import ForwardBatch, build_forward_batch
from server.engine.kv_cache import KVShape, TorchKVCache
from server.engine.request import Request, SamplingParams
from server.engine.scheduler import ScheduledRequest
from tests.server.engine.varlen import varlen_attn

CPU = torch.device("cpu")
BLOCK = CudaKVCache.page_size
NUM_BLOCKS = 12
NUM_HEADS = 4


def step(*requests: tuple[int, int, list[int]]) -> ForwardBatch:
    """A step of requests: tokens in the cache already, tokens to compute, blocks."""
    scheduled = []
    for computed, num_tokens, blocks in requests:
        request = Request(0, [0] * (computed + num_tokens), SamplingParams(), (), frozenset())
        request.num_computed_tokens, request.block_table = computed, blocks
        scheduled.append(ScheduledRequest(request, num_tokens))
    return build_forward_batch(scheduled, BLOCK, CPU)


STEPS = {
    "decode": step((0, 1, [3]), (255, 1, [7]), (256, 1, [1, 9]), (700, 1, [2, 0, 5])),
    "prefill": step((0, 300, [3, 1]), (0, 7, [5])),
    "chunks": step((0, 5, [3]), (250, 20, [7, 8]), (512, 100, [2, 0, 5])),
    "mixed": step((40, 1, [3]), (0, 260, [6, 4]), (511, 1, [9, 1]), (300, 40, [7, 8])),
}


def test_the_stand_in_takes_what_torch_takes() -> None:
    real, ours = (
        {
            name: (parameter.kind, parameter.default)
            for name, parameter in inspect.signature(function).parameters.items()
        }
        for function in (varlen.varlen_attn, varlen_attn)
    )
    assert ours.items() <= real.items()


@pytest.mark.parametrize("num_kv_heads", [1, 2, 4])
@pytest.mark.parametrize("window", [None, 1, 100, 10_000])
@pytest.mark.parametrize("kind", STEPS)
def test_equals_torch(kind: str, window: int | None, num_kv_heads: int) -> None:
    check(STEPS[kind], KVShape(num_layers=2, num_kv_heads=num_kv_heads, head_dim=16), window)


@pytest.mark.parametrize("head_dim", [64, 80, 96, 128])
def test_equals_torch_for_heads_of_any_size(head_dim: int) -> None:
    check(STEPS["decode"], KVShape(num_layers=1, num_kv_heads=2, head_dim=head_dim), window=100)


def check(batch: ForwardBatch, shape: KVShape, window: int | None) -> None:
    torch.manual_seed(0)
    flash = CudaKVCache(shape, NUM_BLOCKS, BLOCK, torch.float32, CPU, varlen_attn)
    plain = TorchKVCache(shape, NUM_BLOCKS, BLOCK, torch.float32, CPU)
    for cached, others in ((flash.keys, plain.keys), (flash.values, plain.values)):
        others.normal_()
        cached.copy_(others.view_as(cached))
    options = AttentionOptions(0.3, window, None, None)
    steps = flash.step(batch), plain.step(batch)
    for layer in range(shape.num_layers):
        query, key, value = (
            torch.randn(batch.num_tokens, heads, shape.head_dim) for heads in (NUM_HEADS, *[shape.num_kv_heads] * 2)
        )
        output, expected = (attention.attend(layer, query, key, value, options) for attention in steps)
        torch.testing.assert_close(output, expected)
    assert torch.equal(flash.keys.view_as(plain.keys), plain.keys)
    assert torch.equal(flash.values.view_as(plain.values), plain.values)


def test_what_lies_beyond_a_context_does_not_matter() -> None:
    """A reused block holds what others left there."""
    torch.manual_seed(0)
    batch = STEPS["mixed"]
    query, key, value = (torch.randn(batch.num_tokens, heads, 16) for heads in (NUM_HEADS, 2, 2))

    def attend(left_behind: float) -> Tensor:
        cache = CudaKVCache(KVShape(1, 2, 16), NUM_BLOCKS, BLOCK, torch.float32, CPU, varlen_attn)
        for cached in (cache.keys, cache.values):
            pages = cached[0].fill_(left_behind)
            for blocks, length in zip(batch.block_tables, batch.kv_lens, strict=True):
                for index in range(length):
                    pages[blocks[index // BLOCK], index % BLOCK] = index / length
        return cache.step(batch).attend(0, query, key, value, AttentionOptions(0.3, None, None, None))

    assert torch.equal(attend(0.0), attend(float("nan")))


@pytest.mark.parametrize(
    ("shape", "dtype", "serves"),
    [
        (KVShape(1, 2, 64), torch.bfloat16, True),
        (KVShape(1, 2, 256), torch.float16, True),
        (KVShape(1, 2, 64), torch.float32, False),
        (KVShape(1, 2, 20), torch.bfloat16, False),
        (KVShape(1, 2, 264), torch.bfloat16, False),
        (KVShape(1, 2, 64, plain_attention=False), torch.bfloat16, False),
    ],
)
def test_what_the_kernel_serves(shape: KVShape, dtype: torch.dtype, serves: bool) -> None:
    assert CudaKVCache.serves(shape, dtype) == serves

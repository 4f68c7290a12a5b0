"""On a GPU alone, and collected only where there is one: the kernels that the CPU's tests have stand-ins for."""

from collections.abc import Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from server.engine.attention import AttentionOptions
from server.engine.cuda_kv_cache import CudaKVCache
from server.engine.forward_batch import ForwardBatch
from server.engine.kv_cache import KVShape, TorchKVCache
from tests.conftest import ADAPTERS
from tests.server.engine.conftest import Engine
from tests.server.engine.test_cuda_kv_cache import BLOCK, NUM_BLOCKS, STEPS

CUDA = torch.device("cuda")
NUM_HEADS = 8
SHAPES = [KVShape(num_layers=1, num_kv_heads=2, head_dim=head_dim) for head_dim in (64, 80, 96, 128)]

head_sizes = pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.head_dim)


def on_cuda(batch: ForwardBatch) -> ForwardBatch:
    def move(value: Any) -> Any:
        return value.to(CUDA) if isinstance(value, Tensor) else value

    return ForwardBatch(**{field.name: move(getattr(batch, field.name)) for field in fields(batch)})


def random_heads(num_tokens: int, shape: KVShape) -> tuple[Tensor, Tensor, Tensor]:
    """Query, key and value."""

    def heads(count: int) -> Tensor:
        return torch.randn(num_tokens, count, shape.head_dim, device=CUDA, dtype=torch.bfloat16)

    return heads(NUM_HEADS), heads(shape.num_kv_heads), heads(shape.num_kv_heads)


@head_sizes
@pytest.mark.parametrize("window", [None, 1, 100, 10_000])
@pytest.mark.parametrize("kind", STEPS)
def test_flash_attention_equals_torch(kind: str, window: int | None, shape: KVShape) -> None:
    torch.manual_seed(0)
    flash = CudaKVCache(shape, NUM_BLOCKS, BLOCK, torch.bfloat16, CUDA)
    plain = TorchKVCache(shape, NUM_BLOCKS, BLOCK, torch.bfloat16, CUDA)
    for cached, others in ((flash.keys, plain.keys), (flash.values, plain.values)):
        others.normal_()
        cached.copy_(others.view_as(cached))
    batch = on_cuda(STEPS[kind])
    query, key, value = random_heads(batch.num_tokens, shape)
    options = AttentionOptions(0.1, window, None, None)
    output, expected = (cache.step(batch).attend(0, query, key, value, options) for cache in (flash, plain))
    torch.testing.assert_close(output, expected, atol=2e-2, rtol=2e-2)


@head_sizes
def test_a_request_attends_with_the_same_bits_in_any_step(shape: KVShape) -> None:
    """The first request of the mixed step alone, and then with all the others."""
    torch.manual_seed(0)
    mixed = on_cuda(STEPS["mixed"])
    alone = replace(
        mixed,
        slot_mapping=mixed.slot_mapping[:1],
        query_start_loc=mixed.query_start_loc[:2],
        context_lens=mixed.context_lens[:1],
        block_tables=mixed.block_tables[:1, :1].contiguous(),
        query_lens=mixed.query_lens[:1],
        kv_lens=mixed.kv_lens[:1],
    )
    cache = CudaKVCache(shape, NUM_BLOCKS, BLOCK, torch.bfloat16, CUDA)
    cache.keys.normal_()
    cache.values.normal_()
    query, key, value = random_heads(mixed.num_tokens, shape)
    options = AttentionOptions(0.1, None, None, None)
    together = cache.step(mixed).attend(0, query, key, value, options)
    single = cache.step(alone).attend(0, query[:1], key[:1], value[:1], options)
    assert torch.equal(together[:1], single)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_graphs_compute_what_the_same_step_computes(
    model_dir: Path, adapters_dir: Path, prompts: list[list[int]], dtype: str
) -> None:
    engine = Engine(model_dir, device="cuda", dtype=dtype, max_num_seqs=6)
    runner: Any = engine.parts.runner
    graphs = runner._graphs
    replay, differences = graphs.replay, []

    def compared(batch: ForwardBatch) -> Tensor | None:
        expected = runner._forward(batch, runner.cache.step(batch)).float()
        logits: Tensor | None = replay(batch)
        if logits is not None:
            differences.append((bool(batch.passes), float((logits.float() - expected).abs().max() / expected.std())))
        return logits

    graphs.replay = compared
    adapters = [None, *(engine.load(adapters_dir / name) for name in ADAPTERS)]
    work = [(prompt, adapters[index % len(adapters)]) for index, prompt in enumerate(prompts)]
    assert all(len(tokens) for tokens in engine.generate([*work, *((prompt, None) for prompt in prompts)]))
    assert {adapted for adapted, _ in differences} == {False, True}
    assert max(difference for _, difference in differences) < 0.02


@pytest.mark.parametrize("settings", [{}, {"cuda_graphs": False}, {"kernels": "torch"}, {"dtype": "float32"}])
def test_it_serves(model_dir: Path, adapters_dir: Path, prompts: list[list[int]], settings: Mapping[str, Any]) -> None:
    """The self-check at the start passes; requests on adapters come to their end."""
    engine = Engine(model_dir, **{"device": "cuda", "dtype": "bfloat16", **settings})
    adapter = engine.load(adapters_dir / "plain")
    answers = engine.generate([(prompts[0], adapter), (prompts[1], None)], ignore_eos=True)
    assert [len(tokens) for tokens in answers] == [12, 12]

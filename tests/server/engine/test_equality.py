"""The heart: a request's tokens are the same alone, in any batch, in any chunking, after preemption, and PEFT's own."""

import copy
import gc
import weakref
from concurrent.futures import Future
from pathlib import Path

import peft
import pytest
import torch

from server.engine.commands import Evict
from server.engine.forward_batch import build_forward_batch
from server.engine.request import Request, SamplingParams
from server.engine.scheduler import ScheduledRequest
from server.kernels import native, onednn
from server.lora.adapter import Adapter, WeightedAdapter
from tests.conftest import ADAPTERS
from tests.server.engine.conftest import Engine, peft_greedy, peft_logits, peft_mixture

NUM_TOKENS = 12
NAMES = ["", *ADAPTERS]  # the empty name is the base
BLOCK_BYTES = 16 * 2 * 2 * 2 * 16 * 4  # block_size · (K, V) · layers · KV heads · head size · float32


@pytest.fixture(params=["native", "onednn", "torch"])
def kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Every implementation that is chosen by itself, and the reference; the native one where it is built."""
    if request.param == "native" and not native.available():
        pytest.skip("the native kernels are not built")
    if request.param == "onednn":
        if not onednn.available(torch.float32):
            pytest.skip("torch was built without oneDNN")
        monkeypatch.setattr(native, "available", lambda: False)
    return "torch" if request.param == "torch" else "auto"


@pytest.fixture(scope="module")
def expected(reference: peft.PeftModel, prompts: list[list[int]]) -> list[list[int]]:
    """PEFT's greedy tokens: request i uses name i mod their number."""
    return [
        peft_greedy(reference, prompt, NAMES[index % len(NAMES)], NUM_TOKENS) for index, prompt in enumerate(prompts)
    ]


def mixed(engine: Engine, adapters_dir: Path, prompts: list[list[int]]) -> list[tuple[list[int], Adapter | None]]:
    adapters = {name: engine.load(adapters_dir / name) for name in ADAPTERS}
    return [(prompt, adapters.get(NAMES[index % len(NAMES)])) for index, prompt in enumerate(prompts)]


def test_the_mix_is_a_mix(expected: list[list[int]], reference: peft.PeftModel, prompts: list[list[int]]) -> None:
    """Every adapter says something else than the base does, else equality would prove nothing."""
    for index, prompt in enumerate(prompts):
        if NAMES[index % len(NAMES)]:
            assert expected[index] != peft_greedy(reference, prompt, "", NUM_TOKENS)


def test_alone(
    model_dir: Path, adapters_dir: Path, prompts: list[list[int]], expected: list[list[int]], kernels: str
) -> None:
    engine = Engine(model_dir, kernels=kernels)
    work = mixed(engine, adapters_dir, prompts)
    assert [engine.generate([item])[0] for item in work] == expected


SETTINGS = {
    "mixed batch": {},
    "chunked prefill": {"max_num_batched_tokens": 16, "max_num_seqs": 16},
    "chunked, few at a time": {"max_num_batched_tokens": 37, "max_num_seqs": 5},
    "preemption": {"block_size": 16, "kv_cache_bytes": 16 * BLOCK_BYTES},
    "small blocks": {"block_size": 8, "max_num_batched_tokens": 37, "max_num_seqs": 5},  # torch attends
    "slot eviction": {"adapter_slots": 2},
    "all tight": {"adapter_slots": 1, "max_num_seqs": 3, "max_num_batched_tokens": 8},
}


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_together(
    model_dir: Path,
    adapters_dir: Path,
    prompts: list[list[int]],
    expected: list[list[int]],
    settings: dict[str, int],
    kernels: str,
) -> None:
    engine = Engine(model_dir, kernels=kernels, **settings)
    assert engine.generate(mixed(engine, adapters_dir, prompts)) == expected
    if "kv_cache_bytes" in settings:
        assert engine.parts.scheduler.num_preemptions > 0


@pytest.mark.skipif(not native.available(), reason="the native kernels are not built")
def test_adapters_in_another_number_format(
    model_dir: Path, adapters_dir: Path, prompts: list[list[int]], reference: peft.PeftModel
) -> None:
    """Rounded when they load, they answer as PEFT does with the same rounded weights."""
    rounded = copy.deepcopy(reference)
    for name, parameter in rounded.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.bfloat16().float()
    engine = Engine(model_dir, lora_dtype="bfloat16")
    answers = engine.generate(mixed(engine, adapters_dir, prompts))
    for index, prompt in enumerate(prompts):
        assert answers[index] == peft_greedy(rounded, prompt, NAMES[index % len(NAMES)], NUM_TOKENS)


MIXTURES: list[dict[str, float]] = [
    {"plain": 0.7, "attention": 0.3},
    {"plain": -1.0},
    {"rslora": 2.0},
    {"head": 0.5, "feed-forward": 1.0, "one-layer": -3.0},
    {"attention": 0.3, "plain": 0.7},
    {"embedding": 0.6, "head": -1.0},
]


@pytest.mark.parametrize("settings", [{}, {"adapter_slots": 3, "max_num_batched_tokens": 16, "max_num_seqs": 4}])
def test_mixtures(
    model_dir: Path,
    adapters_dir: Path,
    prompts: list[list[int]],
    expected: list[list[int]],
    reference: peft.PeftModel,
    settings: dict[str, int],
    kernels: str,
) -> None:
    """Weighted sums of adapters, among requests of single ones."""
    engine = Engine(model_dir, kernels=kernels, **settings)
    work = mixed(engine, adapters_dir, prompts)
    adapters = {adapter.name: adapter for _, adapter in work if adapter}
    mixtures = [[WeightedAdapter(adapters[name], weight) for name, weight in mix.items()] for mix in MIXTURES]
    answers = engine.generate([*work, *zip(prompts, mixtures, strict=False)])
    assert answers[: len(work)] == expected
    for prompt, mix, answer in zip(prompts, MIXTURES, answers[len(work) :], strict=False):
        with peft_mixture(reference, mix):
            assert answer == peft_greedy(reference, prompt, None, NUM_TOKENS), mix


def test_logits_of_a_mixed_batch(
    model_dir: Path, adapters_dir: Path, prompts: list[list[int]], reference: peft.PeftModel, kernels: str
) -> None:
    engine = Engine(model_dir, kernels=kernels)
    work = mixed(engine, adapters_dir, prompts)
    scheduled, names = [], []
    for slot, name in enumerate(ADAPTERS):
        index = NAMES.index(name)
        prompt, adapter = work[index]
        engine.parts.runner.lora.write(slot, adapter)
        scheduled.append(_scheduled(engine, prompt, slot, adapter))
        names.append((prompt, name))
    scheduled.insert(0, _scheduled(engine, prompts[0], -1, None))
    names.insert(0, (prompts[0], ""))

    batch = build_forward_batch(scheduled, engine.parts.runner.cache.block_size, torch.device("cpu"))
    logits = engine.parts.runner.forward(batch)

    for row, (prompt, name) in enumerate(names):
        assert torch.allclose(logits[row], peft_logits(reference, prompt, name)[-1], atol=1e-4), name


def _scheduled(engine: Engine, prompt: list[int], slot: int, adapter: Adapter | None) -> ScheduledRequest:
    request = Request(slot + 1, prompt, SamplingParams(), [WeightedAdapter(adapter)] if adapter else [], frozenset())
    assert engine.parts.scheduler.allocator.grow(request.block_table, len(prompt))
    request.adapter_slots = (slot,) if adapter else ()
    return ScheduledRequest(request, len(prompt))


STORAGES = {
    "f32": {},
    "bf16": {"dtype": "bfloat16"},
    "int8": {"quantization": "int8"},
    "f32, the rest bf16": {"kv_cache_dtype": "bfloat16", "lora_dtype": "bfloat16"},
}


@pytest.mark.skipif(not native.available(), reason="the native kernels are not built")
@pytest.mark.parametrize("storage", STORAGES.values(), ids=STORAGES)
def test_logits_are_the_same_bits_in_any_batch(
    model_dir: Path, adapters_dir: Path, prompts: list[list[int]], storage: dict[str, str]
) -> None:
    """Batch invariance: alone, mixed, in chunks of any size and after preemption, not one bit of the logits differs."""

    def logits(**settings: int) -> list[torch.Tensor]:
        engine = Engine(model_dir, **{**settings, **storage})
        rows: dict[int, list[torch.Tensor]] = {}
        engine.watch_logits(lambda request_id, row: rows.setdefault(request_id, []).append(row.clone()))
        work = mixed(engine, adapters_dir, prompts)
        if settings.get("max_num_seqs") == 1:
            for item in work:
                engine.generate([item])
        else:
            engine.generate(work)
        return [torch.stack(rows[request_id]) for request_id in range(len(work))]

    alone = logits(max_num_seqs=1, prefix_cache=False)
    sixteen_blocks = 16 * BLOCK_BYTES // (2 if "bfloat16" in storage.values() else 1)
    for settings in ({}, {"max_num_batched_tokens": 16, "max_num_seqs": 16}, {"kv_cache_bytes": sixteen_blocks}):
        assert all(map(torch.equal, logits(**settings), alone)), settings


def test_a_new_generation_of_a_name_meets_nothing_of_the_old(
    model_dir: Path, adapters_dir: Path, prompts: list[list[int]], expected: list[list[int]]
) -> None:
    engine = Engine(model_dir)
    first = engine.load(adapters_dir / "plain")
    second = engine.load(adapters_dir / "attention")
    index = NAMES.index("plain")
    other = NAMES.index("attention")
    tokens = engine.generate([(prompts[index], first), (prompts[other], second), (prompts[index], first)])
    assert tokens == [expected[index], expected[other], expected[index]]


def test_sampling_with_a_seed_does_not_depend_on_the_batch(
    model_dir: Path, adapters_dir: Path, prompts: list[list[int]]
) -> None:
    engine = Engine(model_dir)
    work = mixed(engine, adapters_dir, prompts)
    together = engine.generate(work, temperature=0.9, top_p=0.95, top_k=50, seed=7)
    alone = [engine.generate([item], temperature=0.9, top_p=0.95, top_k=50, seed=7)[0] for item in work]
    assert together == alone
    assert together != engine.generate(work, temperature=0.9, top_p=0.95, top_k=50, seed=8)


def test_a_prefix_from_the_cache_changes_no_token(
    model_dir: Path, adapters_dir: Path, prompts: list[list[int]], expected: list[list[int]], kernels: str
) -> None:
    engine = Engine(model_dir, kernels=kernels)
    work = mixed(engine, adapters_dir, prompts)
    assert engine.generate(work) == expected
    assert engine.generate(work) == expected
    check_cached_tokens(engine, prompts)


@pytest.mark.skipif(not native.available(), reason="the native kernels are not built")
@pytest.mark.parametrize("storage", STORAGES.values(), ids=STORAGES)
def test_a_prefix_from_the_cache_changes_not_one_bit(
    model_dir: Path, adapters_dir: Path, prompts: list[list[int]], storage: dict[str, str]
) -> None:
    engine = Engine(model_dir, **storage)
    work = mixed(engine, adapters_dir, prompts)
    rows: dict[int, list[torch.Tensor]] = {}
    engine.watch_logits(lambda request_id, row: rows.setdefault(request_id, []).append(row.clone()))
    engine.generate(work)
    engine.generate(work)
    check_cached_tokens(engine, prompts)
    for first in range(len(work)):
        assert torch.equal(torch.stack(rows[first]), torch.stack(rows[first + len(work)]))


def check_cached_tokens(engine: Engine, prompts: list[list[int]]) -> None:
    """What ran twice found all whole blocks of its prompt the second time, but for the last token."""
    for first, prompt in enumerate(prompts):
        assert engine.outputs[first][0].num_cached_tokens == 0
        assert engine.outputs[first + len(prompts)][0].num_cached_tokens == (len(prompt) - 1) // 16 * 16


def test_a_prefix_is_shared_only_by_the_same_adapter(
    model_dir: Path, adapters_dir: Path, prompts: list[list[int]]
) -> None:
    engine = Engine(model_dir)
    prompt = max(prompts, key=len)
    plain, again = (engine.load(adapters_dir / "plain") for _ in range(2))
    engine.generate([(prompt, plain)])
    for adapter, cached in ((None, False), (again, False), (plain, True)):
        engine.generate([(prompt, adapter)])
        last = max(engine.outputs)
        assert bool(engine.outputs[last][0].num_cached_tokens) == cached


def test_an_adapter_that_overflows_fails_alone_and_leaves_nothing_behind(
    model_dir: Path, adapters_dir: Path, prompts: list[list[int]], kernels: str
) -> None:
    """Finite weights whose sums are not: the request fails, the engine goes on, and reused blocks harm nobody."""
    engine = Engine(model_dir, kernels=kernels)
    sick = engine.load(adapters_dir / "plain")
    for layer in sick.weights.values():
        layer.lora_a.fill_(3e38)
        layer.lora_b.fill_(3e38)
    long, short = prompts[0][:1] * 40, prompts[0][:1] * 3
    expected = engine.generate([(long, None), (short, None)])
    failed = engine.submit(long, sick)
    engine.run()
    assert engine.outputs[failed][0].error is not None
    assert engine.generate([(short, None), (long, None)]) == expected[::-1]


def test_a_forgotten_adapter_is_freed(model_dir: Path, adapters_dir: Path, prompts: list[list[int]]) -> None:
    engine = Engine(model_dir)
    adapter = engine.load(adapters_dir / "plain")
    engine.generate([(prompts[0] * 20, adapter)], max_tokens=1)
    engine.core._obey(Evict(adapter, Future()))
    alive = weakref.ref(next(iter(adapter.weights.values())).lora_a.untyped_storage())
    del adapter
    gc.collect()
    assert alive() is None


def test_a_cache_of_one_block_starts(model_dir: Path) -> None:
    engine = Engine(model_dir, max_num_seqs=1, max_model_len=16)
    assert engine.generate([([1, 2, 3], None)])[0]

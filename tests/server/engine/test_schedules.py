"""The whole engine under random schedules: whatever runs beside a request, it answers bit for bit as it does alone."""

import random
from collections import Counter, defaultdict
from collections.abc import Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from server.engine.block_allocator import BlockAllocator
from server.engine.commands import Abort, Evict
from server.engine.request import FinishReason
from server.engine.scheduler import Scheduler
from server.kernels import native
from server.lora.adapter import Adapter
from server.lora.slots import AdapterSlots
from tests.conftest import ADAPTERS, VOCAB_SIZE
from tests.server.engine.conftest import Engine
from tests.server.kernels.conftest import compute_threads

NUM_SCHEDULES = 200
MAX_STEPS = 2000  # a schedule that needs more has lost somebody
MAX_OUTPUT = 20  # tokens
MAX_MODEL_LEN = 80  # tokens
BLOCK_SIZE = 16
NUM_BLOCKS = 16
NUM_SLOTS = 3
# What all schedules together must contain.
FLOORS = {"requests": 1500, "cancellations": 100, "preemptions": 100, "prefix_hits": 100, "slot_rewrites": 50}

pytestmark = pytest.mark.skipif(not native.available(), reason="bits are promised by the native kernels alone")


@dataclass(frozen=True, slots=True)
class Work:
    """What a request asks for, and the longest answer to it, given by an engine that had nothing else to do."""

    prompt: list[int]
    adapter: Adapter | None
    sampling: Mapping[str, Any]
    token_ids: list[int]
    logits: torch.Tensor  # [MAX_OUTPUT, vocab_size], what each token was sampled from


@dataclass(frozen=True, slots=True)
class Expected:
    """A request of a schedule, and how it must end if nobody cancels it."""

    work: Work
    num_tokens: int
    finish_reason: FinishReason


class Player:
    """Plays schedules on one engine, so that each finds slots and KV blocks full of what others left there."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.works: list[Work] = []
        self.totals: Counter[str] = Counter()  # what all schedules contained
        self._rows: defaultdict[int, list[torch.Tensor]] = defaultdict(list)  # logits by request
        engine.watch_logits(lambda request_id, row: self._rows[request_id].append(row.clone()))

    def learn(self, prompt: list[int], adapter: Adapter | None, **sampling: Any) -> None:
        """Adds something to ask for: runs it alone, its prompt in one piece."""
        self._restart(NUM_BLOCKS, num_slots=1, max_num_seqs=1, budget=MAX_MODEL_LEN, prefix_cache=False)
        (token_ids,) = self.engine.generate([(prompt, adapter)], max_tokens=MAX_OUTPUT, **sampling)
        self.works.append(Work(prompt, adapter, sampling, token_ids, torch.stack(self._rows[0])))

    def play(self, seed: int) -> None:
        """Arrivals, cancellations and evictions in a random course under random limits; checks who got what."""
        chance = random.Random(seed)
        max_num_seqs = chance.randint(1, 8)
        self._restart(
            num_blocks=chance.randint(MAX_MODEL_LEN // BLOCK_SIZE, NUM_BLOCKS),
            num_slots=chance.randint(1, NUM_SLOTS),
            max_num_seqs=max_num_seqs,
            budget=chance.randint(max_num_seqs, MAX_MODEL_LEN),
            prefix_cache=chance.random() < 0.8,
        )
        arrivals = [chance.choice((0, 0, 1, 2, 6)) for _ in range(chance.randint(1, 10))]
        cancel_rate, evict_rate = chance.choice((0, 0.1, 0.3)), chance.choice((0, 0.1))
        submitted: dict[int, Expected] = {}
        cancelled: set[int] = set()
        for step in range(MAX_STEPS):
            for _ in range(arrivals[step] if step < len(arrivals) else 0):
                request_id, expected = self._submit(chance)
                submitted[request_id] = expected
            live = [request_id for request_id in submitted if self._finish_reason(request_id) is None]
            if live and chance.random() < cancel_rate:
                victim = chance.choice(live)
                cancelled.add(victim)
                self.engine.core.put(Abort(victim))
            adapter = chance.choice(self.works).adapter
            if adapter is not None and chance.random() < evict_rate:
                self.engine.core.put(Evict(adapter, Future()))
            self.engine.core.step()
            if step >= len(arrivals) and not self.engine.parts.scheduler.has_work:
                break
        for request_id, expected in submitted.items():
            self._check(f"schedule {seed}, request {request_id}", request_id, expected, request_id in cancelled)
        self._check_given_back(f"schedule {seed}")
        self._count(submitted, cancelled)

    def _restart(self, num_blocks: int, *, num_slots: int, max_num_seqs: int, budget: int, prefix_cache: bool) -> None:
        self._rows.clear()
        scheduler = Scheduler(
            BlockAllocator(num_blocks, BLOCK_SIZE, prefix_cache=prefix_cache),
            AdapterSlots(num_slots),
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=budget,
            max_model_len=MAX_MODEL_LEN,
        )
        self.engine.restart(scheduler)

    def _submit(self, chance: random.Random) -> tuple[int, Expected]:
        work = chance.choice(self.works)
        max_tokens = chance.randint(1, MAX_OUTPUT)
        stop = frozenset(chance.sample(work.token_ids, chance.choice((0, 0, 0, 1))))
        request_id = self.engine.submit(
            work.prompt, work.adapter, max_tokens=max_tokens, stop_token_ids=stop, **work.sampling
        )
        for num_tokens, token_id in enumerate(work.token_ids[:max_tokens], start=1):
            if token_id in stop:
                return request_id, Expected(work, num_tokens, FinishReason.STOP)
        return request_id, Expected(work, max_tokens, FinishReason.LENGTH)

    def _finish_reason(self, request_id: int) -> FinishReason | None:
        outputs = self.engine.outputs[request_id]
        return outputs[-1].finish_reason if outputs else None

    def _check(self, label: str, request_id: int, expected: Expected, cancelled: bool) -> None:
        """A request has the tokens and bits that it has alone; one that was cancelled, the beginning of them."""
        token_ids, rows = self.engine.tokens(request_id), self._rows[request_id]
        if not cancelled:
            assert self._finish_reason(request_id) is expected.finish_reason, label
            assert len(token_ids) == expected.num_tokens, label
        assert token_ids == expected.work.token_ids[: len(token_ids)], label
        assert len(rows) == len(token_ids), label
        assert all(map(torch.equal, rows, expected.work.logits)), label

    def _check_given_back(self, label: str) -> None:
        scheduler = self.engine.parts.scheduler
        assert not scheduler.has_work, label
        assert scheduler.allocator.num_free == scheduler.allocator.num_blocks, label
        for adapter in scheduler.slots.adapters():
            assert scheduler.slots.remove(adapter) is not None, f"{label}: {adapter.name} is still in use"

    def _count(self, submitted: Mapping[int, Expected], cancelled: set[int]) -> None:
        outputs = [output for output in self.engine.outputs.values() if output]
        writes = self.engine.metrics.adapters.total("adapter_loads", "device")
        self.totals.update(
            requests=len(submitted),
            cancellations=len(cancelled & {first.request_id for first, *_ in outputs}),  # of those in mid-answer
            preemptions=self.engine.parts.scheduler.num_preemptions,
            prefix_hits=sum(first.num_cached_tokens > 0 for first, *_ in outputs),
            slot_rewrites=max(0, writes - len({expected.work.adapter for expected in submitted.values()})),
        )


def test_random_schedules(model_dir: Path, adapters_dir: Path) -> None:
    """Also: nobody is lost, and blocks and slots all come back. Some run with a team of threads."""
    kv_cache_bytes = NUM_BLOCKS * BLOCK_SIZE * 2 * 2 * 2 * 16 * 4  # K and V · layers · KV heads · head size · float32
    player = Player(
        Engine(model_dir, kv_cache_bytes=kv_cache_bytes, max_model_len=MAX_MODEL_LEN, adapter_slots=NUM_SLOTS)
    )
    chance = random.Random(1)
    adapters = [None, *(player.engine.load(adapters_dir / name) for name in list(ADAPTERS)[:5])]
    for length in (5, 20, 40):
        beginning = [chance.randrange(VOCAB_SIZE) for _ in range(length)]
        for rest in (1, 20):
            prompt = beginning + [chance.randrange(VOCAB_SIZE) for _ in range(rest)]
            for adapter in adapters:
                player.learn(prompt, adapter)
            player.learn(prompt, chance.choice(adapters), temperature=0.8, seed=length)

    for seed in range(NUM_SCHEDULES):
        with compute_threads(3 if seed % 8 == 0 else 1):
            player.play(seed)

    for kind, floor in FLOORS.items():
        assert player.totals[kind] >= floor, f"the schedules contain too few {kind}"

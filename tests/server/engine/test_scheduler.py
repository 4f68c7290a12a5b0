"""The scheduler over plain ids: budgets, preemption, adapter slots, and nothing lost."""

import random
from collections import Counter

import pytest

from server.engine.block_allocator import BlockAllocator
from server.engine.request import FinishReason, Request, RequestStatus, SamplingParams
from server.engine.scheduler import Scheduler
from server.lora.adapter import Adapter, WeightedAdapter
from server.lora.slots import AdapterSlots
from server.lora.tier import AdapterTier

MAX_MODEL_LEN = 64


def adapter(name: str) -> Adapter:
    return Adapter(name, "1", 1, "", 8, ("q_proj",), {}, 0, 0)


def scheduler(num_blocks: int = 32, num_slots: int = 2, max_num_seqs: int = 8, budget: int = 16) -> Scheduler:
    return Scheduler(
        BlockAllocator(num_blocks, block_size=4),
        AdapterSlots(num_slots),
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=budget,
        max_model_len=MAX_MODEL_LEN,
    )


def request(request_id: int, length: int, on: Adapter | None = None, max_tokens: int = 4) -> Request:
    """Prompts have tokens of their own, so that nothing is shared by accident."""
    prompt = list(range(1000 * request_id, 1000 * request_id + length))
    return Request(
        request_id, prompt, SamplingParams(max_tokens=max_tokens), [WeightedAdapter(on)] if on else [], frozenset()
    )


def step(sched: Scheduler) -> tuple[dict[int, int], dict[int, FinishReason]]:
    """One step with token 1 for whoever samples; what was computed and who finished."""
    batch = sched.schedule()
    sampled = {item.request.request_id: 1 for item in batch.requests if item.samples}
    computed = {item.request.request_id: item.num_tokens for item in batch.requests}
    assert sum(computed.values()) <= sched._token_budget
    return computed, sched.update(batch, sampled)


def check_integrity(sched: Scheduler) -> None:
    users = Counter(block for item in sched.running for block in item.block_table)
    allocator = sched.allocator
    assert all(allocator._num_users[block] == users[block] for block in range(allocator.num_blocks))
    assert len(users) + allocator.num_free == allocator.num_blocks
    assert not users.keys() & allocator._free.keys()
    assert all(not item.block_table and not item.adapter_slots for item in sched.waiting)
    adapters = [part.adapter for item in sched.running for part in item.adapters]
    assert all(slot.num_users == adapters.count(adapter) for adapter, slot in sched.slots._slots.items())


def test_a_long_prompt_runs_in_chunks_beside_decoding() -> None:
    sched = scheduler(budget=16)
    sched.add(request(1, 4))
    assert step(sched)[0] == {1: 4}
    sched.add(request(2, 40))
    assert step(sched)[0] == {1: 1, 2: 15}
    assert step(sched)[0] == {1: 1, 2: 15}
    assert step(sched) == ({1: 1, 2: 10}, {1: FinishReason.LENGTH})
    assert step(sched)[0] == {2: 1}


def test_a_decoding_request_is_not_held_up_by_an_older_prompt() -> None:
    sched = scheduler(budget=8)
    sched.add(request(1, 40))
    sched.add(request(2, 2))
    sched.running.append(sched.waiting.pop())  # 2 runs already …
    sched.running[0].status = RequestStatus.RUNNING
    assert step(sched)[0] == {2: 2, 1: 6}
    sched.running.sort(key=lambda item: item.request_id)  # … and is the younger one
    assert step(sched)[0] == {2: 1, 1: 7}


def test_the_youngest_is_preempted_and_comes_back_first() -> None:
    sched = scheduler(num_blocks=4, budget=32)
    for request_id in (1, 2):
        sched.add(request(request_id, 8, max_tokens=8))
    sched.add(request(3, 4))
    assert set(step(sched)[0]) == {1, 2}
    assert step(sched)[0] == {1: 1}
    assert sched.num_preemptions == 1
    assert [item.request_id for item in sched.waiting] == [2, 3]
    check_integrity(sched)
    for _ in range(30):
        step(sched)
    assert not sched.has_work
    assert sched.allocator.num_free == 4


def test_a_request_that_lacks_a_slot_is_passed_but_not_for_ever() -> None:
    hot, cold = adapter("hot"), adapter("cold")
    sched = scheduler(num_slots=1, max_num_seqs=4, budget=64)
    sched.add(request(0, 2, hot))
    step(sched)
    sched.add(request(1, 2, cold))
    served, next_id = 0, 2
    while sched._requests[1].status is RequestStatus.WAITING:
        sched.add(request(next_id, 2, hot))
        next_id += 1
        step(sched)
        check_integrity(sched)
        served += 1
        assert served < 20, "the cold adapter starves"
    assert sched._requests[1].adapter_slots == (0,)


def test_steps_that_admit_nobody_do_not_make_it_wait_longer() -> None:
    """The batch is full in every other step, and each hot request that ends lets in another."""
    hot, cold = adapter("hot"), adapter("cold")
    sched = scheduler(num_slots=1, max_num_seqs=2, budget=64)
    for request_id in range(2):
        sched.add(request(request_id, 2, hot, max_tokens=2 + request_id))
    step(sched)
    sched.add(request(2, 2, cold))
    for request_id in range(3, 20):
        sched.add(request(request_id, 2, hot, max_tokens=4))
    passed = 0
    while sched._requests[2].status is RequestStatus.WAITING:
        computed, _ = step(sched)
        passed += sum(count == 2 for request_id, count in computed.items() if request_id != 2)
    assert passed == 2  # --max-num-seqs


def test_a_preempted_request_that_comes_back_does_not_make_it_wait_longer() -> None:
    """KV blocks run out in the middle of each hot request, so that the younger one is preempted before the cold one."""
    hot, cold = adapter("hot"), adapter("cold")
    sched = scheduler(num_blocks=5, num_slots=1, max_num_seqs=2, budget=64)
    sched.add(request(0, 8, hot, max_tokens=8))
    sched.add(request(1, 8, cold, max_tokens=8))
    for request_id in range(2, 20):
        sched.add(request(request_id, 8, hot, max_tokens=8))
    passed: set[int] = set()
    while sched._requests[1].status is RequestStatus.WAITING:
        passed |= step(sched)[0].keys() - {0, 1}
    assert sched.num_preemptions > 0
    assert len(passed) == 2  # --max-num-seqs


def test_whoever_lacks_a_slot_next_is_passed_as_often() -> None:
    """The first one that waits for a slot is aborted; what was counted for it is not held against others."""
    hot, cold = adapter("hot"), adapter("cold")
    sched = scheduler(num_slots=1, max_num_seqs=2, budget=64)
    sched.add(request(0, 2, hot, max_tokens=20))
    for request_id in (1, 2):
        sched.add(request(request_id, 2, cold))
    for request_id in range(3, 6):
        sched.add(request(request_id, 2, hot, max_tokens=1))
    for _ in range(4):
        step(sched)
    assert 5 in sched._requests
    sched.abort(1)
    step(sched)
    assert 5 not in sched._requests


def test_a_request_knows_where_its_adapter_was_found() -> None:
    """Before its first slot; what it finds after a preemption, or after it has waited for blocks, changes nothing."""
    on = adapter("a")
    sched = scheduler(num_blocks=4, budget=32)
    requests = [request(1, 8, on, max_tokens=8), request(2, 8, on, max_tokens=8), request(3, 12, adapter("b"))]
    for item in requests:
        sched.add(item)
    step(sched)
    tiers = [(AdapterTier.HOST,), (AdapterTier.DEVICE,), (AdapterTier.HOST,)]
    assert [item.tiers for item in requests] == tiers
    assert requests[2].status is RequestStatus.WAITING, "there are no blocks for it yet"
    while sched.has_work:
        step(sched)
    assert sched.num_preemptions
    assert [item.tiers for item in requests] == tiers


def test_requests_are_ordered_by_slot_and_slots_are_written_once() -> None:
    first, second = adapter("first"), adapter("second")
    sched = scheduler(budget=64)
    for request_id, on in enumerate([second, None, first, second]):
        sched.add(request(request_id, 2, on))
    batch = sched.schedule()
    slots = [item.request.adapter_slots for item in batch.requests]
    assert slots == sorted(slots) == [(), (0,), (0,), (1,)]
    assert batch.slot_writes == [(0, second), (1, first)]


@pytest.mark.parametrize("status", ["waiting", "running"])
def test_abort_frees_everything(status: str) -> None:
    sched = scheduler()
    sched.add(request(1, 4, adapter("one")))
    if status == "running":
        step(sched)
    sched.abort(1)
    sched.abort(1)
    assert not sched.has_work
    check_integrity(sched)
    assert sched.allocator.num_free == sched.allocator.num_blocks


def test_a_request_ends_at_the_context() -> None:
    sched = scheduler(budget=64)
    sched.add(request(1, MAX_MODEL_LEN - 1, max_tokens=50))
    assert step(sched)[1] == {1: FinishReason.LENGTH}


def test_random_schedules_keep_their_invariants() -> None:
    for seed in range(60):
        chance = random.Random(seed)
        adapters: list[Adapter | None] = [None, *(adapter(str(index)) for index in range(5))]
        sched = scheduler(
            num_blocks=chance.randint(16, 40),
            num_slots=chance.randint(1, 4),
            max_num_seqs=chance.randint(1, 8),
            budget=chance.randint(8, 40),
        )
        finished: set[int] = set()
        aborted: set[int] = set()
        for request_id in range(40):
            made = request(request_id, chance.randint(1, 40), chance.choice(adapters), chance.randint(1, 20))
            if chance.random() < 0.5:
                made.token_ids = list(range(len(made.token_ids)))  # a beginning that others have too
            sched.add(made)
            if chance.random() < 0.2:
                victim = chance.randint(0, request_id)
                if victim not in finished:
                    aborted.add(victim)
                sched.abort(victim)
            for _ in range(chance.randint(0, 3)):
                finished |= step(sched)[1].keys()
                check_integrity(sched)
        for _ in range(5000):
            if not sched.has_work:
                break
            finished |= step(sched)[1].keys()
            check_integrity(sched)
        assert not sched.has_work
        assert finished | aborted == set(range(40))
        assert sched.allocator.num_free == sched.allocator.num_blocks

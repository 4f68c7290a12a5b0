"""What runs in the next step. Plain Python over ids; engine thread only.

There is no prefill phase and no decode phase: every request has tokens that are computed and tokens that are not, and a
step lets each running request catch up under one token budget. A prompt longer than what is left of the budget is
computed in chunks; a decoding request lacks exactly one token. When KV blocks run out, the youngest running request is
preempted: it gives its blocks back and waits, at the head of the queue, to be computed again.
"""

import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from server.engine.block_allocator import BlockAllocator
from server.engine.request import FinishReason, Request, RequestStatus
from server.lora.adapter import Adapter
from server.lora.slots import AdapterSlots
from server.lora.tier import AdapterTier


@dataclass(frozen=True, slots=True)
class ScheduledRequest:
    """A request and how many of its tokens the step computes."""

    request: Request
    num_tokens: int

    @property
    def samples(self) -> bool:
        """Whether the step reaches the last known token, so that the next one can be sampled."""
        return self.num_tokens == self.request.num_missing_tokens


@dataclass(slots=True)
class ScheduledBatch:
    """One step's work: requests ordered by adapter slot, and the slots to write before they run."""

    requests: list[ScheduledRequest] = field(default_factory=list)
    slot_writes: list[tuple[int, Adapter]] = field(default_factory=list)

    @property
    def num_tokens(self) -> int:
        return sum(scheduled.num_tokens for scheduled in self.requests)


class Scheduler:
    """Owns the requests, their KV blocks and their adapter slots from `add` until they finish."""

    def __init__(
        self,
        allocator: BlockAllocator,
        slots: AdapterSlots,
        *,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        max_model_len: int,
    ) -> None:
        self.allocator = allocator
        self.slots = slots
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []  # oldest first
        self.num_preemptions = 0
        self._requests: dict[int, Request] = {}
        self._max_num_seqs = max_num_seqs
        self._token_budget = max_num_batched_tokens
        self._max_model_len = max_model_len
        self._merged_generation: int | None = None
        self._overtaken: Request | None = None  # the oldest that lacked a slot when a younger one was admitted
        self._num_overtakes = 0  # how often since; a request that comes back from preemption is older

    @property
    def has_work(self) -> bool:
        return bool(self.waiting or self.running)

    def add(self, request: Request) -> None:
        self._requests[request.request_id] = request
        self.waiting.append(request)

    def compute_with(self, merged: Adapter | None) -> None:
        """From here on K and V come from the base's weights with this adapter among them; None: from the base's own.

        The sums round, so K and V serve later requests only while the same is merged. Requests that run go on with what
        they have; from here on theirs come from both and serve nobody else.
        """
        self._merged_generation = None if merged is None else merged.generation
        for request in self.running:
            request.shared_as = None

    def abort(self, request_id: int) -> None:
        """Ends a request and frees all it holds; one that is gone already is no error."""
        request = self._requests.get(request_id)
        if request is not None:
            self._finish(request)

    def abort_users(self, adapter: Adapter) -> list[int]:
        """Ends every request that runs on an adapter, alone or with others; returns their ids."""
        users = [
            request for request in self._requests.values() if any(part.adapter is adapter for part in request.adapters)
        ]
        for request in users:
            self._finish(request)
        return [request.request_id for request in users]

    def schedule(self) -> ScheduledBatch:
        batch = ScheduledBatch()
        preemptions = self.num_preemptions
        budget = self._schedule_running(batch)
        if self.num_preemptions == preemptions:
            self._admit_waiting(batch, budget)
        batch.requests.sort(key=lambda scheduled: scheduled.request.adapter_slots)
        return batch

    def update(self, batch: ScheduledBatch, sampled: dict[int, int]) -> dict[int, FinishReason]:
        """Books a finished step: `sampled` maps request ids to new tokens; returns the requests that end and why."""
        finished: dict[int, FinishReason] = {}
        for scheduled in batch.requests:
            request = scheduled.request
            self._count_computed(request, scheduled.num_tokens)
            token_id = sampled.get(request.request_id)
            if token_id is None:
                continue
            reason = request.append(token_id, self._max_model_len)
            if reason is not None:
                finished[request.request_id] = reason
                self._finish(request)
        return finished

    def _count_computed(self, request: Request, num_tokens: int) -> None:
        block_size = self.allocator.block_size
        filled_a_block = request.num_computed_tokens % block_size + num_tokens >= block_size
        request.num_computed_tokens += num_tokens
        if filled_a_block and request.shared_as is not None:
            self.allocator.publish(
                request.shared_as,
                request.token_ids,
                request.block_table,
                request.num_computed_tokens,
                request.cache_change,
            )

    def _schedule_running(self, batch: ScheduledBatch) -> int:
        """Gives decoding requests their token first, then prompts what is left; returns the budget that remains."""
        budget = self._token_budget
        pending = deque(sorted(self.running, key=lambda request: request.num_missing_tokens > 1))
        while pending and budget > 0:
            request = pending.popleft()
            num_tokens = min(request.num_missing_tokens, budget)
            while not self.allocator.grow(request.block_table, request.num_computed_tokens + num_tokens):
                victim = pending.pop() if pending else request
                self._preempt(victim)
                if victim is request:
                    return 0
            batch.requests.append(ScheduledRequest(request, num_tokens))
            budget -= num_tokens
        return budget

    def _admit_waiting(self, batch: ScheduledBatch, budget: int) -> None:
        """Admits in order of arrival; a request that lacks only an adapter slot may be passed, but not for ever."""
        blocked: list[Request] = []
        while self.waiting and budget > 0 and len(self.running) < self._max_num_seqs:
            if self._overtaken in blocked and self._num_overtakes >= self._max_num_seqs:
                break
            request = self.waiting.popleft()
            if not self._acquire_slots(request, batch):
                blocked.append(request)
                continue
            self._share_prefix(request)
            num_tokens = min(request.num_missing_tokens, budget)
            if not self.allocator.grow(request.block_table, request.num_computed_tokens + num_tokens):
                self._release(request)
                self.waiting.appendleft(request)
                break
            request.status = RequestStatus.RUNNING
            request.first_step = request.first_step or time.monotonic()
            self.running.append(request)
            batch.requests.append(ScheduledRequest(request, num_tokens))
            budget -= num_tokens
            self._count_overtakes(blocked)
        self.waiting.extendleft(reversed(blocked))

    def _count_overtakes(self, blocked: Sequence[Request]) -> None:
        """Books that a request was admitted before those in `blocked`, the oldest first."""
        if self._overtaken is None or self._overtaken.status is not RequestStatus.WAITING:
            self._overtaken, self._num_overtakes = (blocked[0] if blocked else None), 0
        if self._overtaken in blocked:
            self._num_overtakes += 1

    def _share_prefix(self, request: Request) -> None:
        request.shared_as = (self._merged_generation, request.cache_identity)
        request.block_table = self.allocator.share(request.shared_as, request.token_ids, request.cache_change)
        request.num_computed_tokens = len(request.block_table) * self.allocator.block_size
        if not request.num_preemptions:
            request.num_cached_tokens = request.num_computed_tokens

    def _acquire_slots(self, request: Request, batch: ScheduledBatch) -> bool:
        adapters = [part.adapter for part in request.adapters]
        acquired = self.slots.acquire(adapters)
        if acquired is None:
            return False
        request.adapter_slots = tuple(slot for slot, _ in acquired)
        if not request.tiers:  # else it has had slots before
            request.tiers = tuple(
                AdapterTier.DEVICE if part.tier is AdapterTier.HOST and not is_new else part.tier
                for part, (_, is_new) in zip(request.adapters, acquired, strict=True)
            )
        batch.slot_writes += [
            (slot, adapter) for (slot, is_new), adapter in zip(acquired, adapters, strict=True) if is_new
        ]
        return True

    def _release(self, request: Request) -> None:
        """Gives back the KV blocks and the adapter slots."""
        self.allocator.release(request.block_table)
        request.num_computed_tokens = 0
        if request.adapter_slots:
            self.slots.release([part.adapter for part in request.adapters])
            request.adapter_slots = ()

    def _preempt(self, request: Request) -> None:
        self.running.remove(request)
        self._release(request)
        request.num_preemptions += 1
        self.num_preemptions += 1
        request.status = RequestStatus.WAITING
        self.waiting.appendleft(request)

    def _finish(self, request: Request) -> None:
        if request.status is RequestStatus.RUNNING:
            self.running.remove(request)
        else:
            self.waiting.remove(request)
        self._release(request)
        request.adapters = ()  # whoever still tells of the request must not keep their weights
        request.status = RequestStatus.FINISHED
        del self._requests[request.request_id]

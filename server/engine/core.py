"""The engine: one thread that schedules, runs and books steps. Other threads only put commands into its inbox."""

import logging
import queue
import time
import uuid
from collections.abc import Callable
from itertools import chain

from server.engine.commands import Abort, Command, Evict, Merge, MergeDone, Revoke, Stop, Submit
from server.engine.merge_policy import MergePolicy
from server.engine.model_runner import ModelRunner
from server.engine.request import TokenOutput
from server.engine.resident_adapters import ResidentAdapters
from server.engine.scheduler import ScheduledBatch, Scheduler
from server.errors import InternalFailure, MergeRefused, Overloaded, ServingError
from server.lora.adapter import Adapter
from server.lora.host_copy import FreedBytes
from server.lora.layers import bytes_on_device
from server.metrics import Metrics

log = logging.getLogger(__name__)

Emit = Callable[[list[TokenOutput]], None]
Switched = Callable[[Adapter | None, Adapter | None], None]


class EngineCore:
    """Owns the model runner and the scheduler. `put` may be called from any thread, all else from the engine thread."""

    def __init__(
        self, runner: ModelRunner, scheduler: Scheduler, metrics: Metrics, merge_policy: MergePolicy | None = None
    ) -> None:
        """`merge_policy`: merges adapters unasked; None: only `Merge` does."""
        self.runner = runner
        self._merge_policy = merge_policy
        self.scheduler = scheduler
        self._metrics = metrics
        scheduler.compute_with(self.merged)
        metrics.watch(scheduler)
        metrics.merged_bytes.set_function(lambda: self.merged_bytes)
        self._residents = ResidentAdapters(runner, scheduler.slots, metrics.adapters)
        self._emit: Emit = lambda outputs: None
        self._switched: Switched = lambda merged, before: None
        self._outgoing: list[TokenOutput] = []  # made, not yet given out
        self._inbox: queue.SimpleQueue[Command] = queue.SimpleQueue()
        self._stopping = False
        self._revoked: dict[Adapter, ServingError] = {}

    @property
    def merged(self) -> Adapter | None:
        """The adapter that is part of the base's weights now. Any thread."""
        return self.runner.lora.merged

    @property
    def merged_bytes(self) -> int:
        """Memory of its sums with them, and of what takes them away again for others. Any thread."""
        return self.runner.lora.merged_bytes

    @property
    def resident(self) -> frozenset[Adapter]:
        """The adapters in device slots. Any thread."""
        return self._residents.snapshot

    def connect(self, emit: Emit) -> None:
        """Says who gets the outputs of each step; called before the first one."""
        self._emit = emit

    def on_switch(self, switched: Switched) -> None:
        """Says who hears when another adapter is merged than before, or none: of both. Called before the first step."""
        self._switched = switched

    def put(self, command: Command) -> None:
        self._inbox.put(command)

    def run(self) -> None:
        """Steps until `Stop`; sleeps while there is nothing to do."""
        while not self._stopping:
            if self.scheduler.has_work:
                self.step()
            else:
                self._obey(self._inbox.get())
        self._give_out()

    def step(self) -> None:
        """One turn: take what came in, schedule, run, book.

        What it made is given out when the next turn begins to compute, or at once if there is none: the event loop
        then works beside the native calls, and not against the engine for the interpreter.
        """
        self._drain_inbox()
        batch = self.scheduler.schedule()
        started = time.monotonic()
        try:
            written = self._residents.write(batch.slot_writes)
            for adapter, seconds in written.items():
                if seconds is None:
                    self._refuse(adapter, batch)
            results = self.runner.run(batch, self._give_out)
        except Exception:
            self._fail(batch)
            return
        self._residents.book(written)
        if self._merge_policy is not None:
            counts = [(item.request.sole_adapter, item.num_tokens) for item in batch.requests]
            self._merge_policy.observe(counts, time.monotonic() - started, self.merged)
        not_finite = [request.request_id for request, result in results if result.token_id is None]
        produced = [(request, result) for request, result in results if result.token_id is not None]
        sampled = {request.request_id: result.token_id for request, result in produced if result.token_id is not None}
        finished = self.scheduler.update(batch, sampled)
        now = time.monotonic()
        outputs = [
            TokenOutput(
                request.request_id,
                result.token_id,
                finished.get(request.request_id),
                result.logprob,
                request.num_cached_tokens,
                time=now,
                first_step=request.first_step,
                tiers=request.tiers,
            )
            for request, result in produced
        ]
        for request_id in not_finite:
            self.scheduler.abort(request_id)
            outputs.append(self._incident(request_id, "NON_FINITE_LOGITS"))
        self._metrics.step(batch, self.scheduler, now - started)
        self._outgoing += outputs
        if not (results and self.scheduler.has_work):
            self._give_out()
        if self._merge_policy is not None:
            self._follow(self._merge_policy)

    def _give_out(self, *more: TokenOutput) -> None:
        """All that is made so far, in the order in which it was made."""
        outputs, self._outgoing = [*self._outgoing, *more], []
        if outputs:
            self._emit(outputs)

    def _drain_inbox(self) -> None:
        while True:
            try:
                self._obey(self._inbox.get_nowait())
            except queue.Empty:
                return

    def _obey(self, command: Command) -> None:
        match command:
            case Submit(request):
                revoked = next((part.adapter for part in request.adapters if part.adapter in self._revoked), None)
                if revoked is None:
                    self.scheduler.add(request)
                else:
                    self._give_out(TokenOutput(request.request_id, None, error=self._revoked[revoked]))
            case Abort(request_id):
                self.scheduler.abort(request_id)
            case Revoke(adapter, error):
                self._revoked[adapter] = error
                ended = self.scheduler.abort_users(adapter)
                self._give_out(*(TokenOutput(request_id, None, error=error) for request_id in ended))
            case Evict(adapter, freed, makes_room):
                self._revoked.pop(adapter, None)
                freed.set_result(self._evict(adapter, makes_room))
            case Merge(adapter, done):
                num_bytes = self.merged_bytes
                try:
                    seconds = self._merge(adapter)
                    done.set_result(MergeDone(seconds, num_bytes if adapter is None else self.merged_bytes))
                except Exception as error:
                    done.set_exception(error)
            case Stop():
                self._stopping = True

    def _evict(self, adapter: Adapter, makes_room: bool) -> FreedBytes:
        device = self.runner.base.device
        sums = on_device = 0
        if adapter is self.merged:
            sums = self.merged_bytes
            self._merge(None)
        if self._merge_policy is not None:
            self._merge_policy.forget(adapter)
        if self._residents.empty(adapter):
            on_device = bytes_on_device(adapter, device)
            if makes_room:
                self._metrics.adapters.evicted(adapter.name, "device")
        return FreedBytes(0, sums) if device.type == "cpu" else FreedBytes(on_device + sums, 0)

    def _fail(self, batch: ScheduledBatch) -> None:
        """A step crashed: its requests end with an incident each, and no slot counts as written."""
        log.exception("a step with %d requests failed", len(batch.requests))
        outputs = []
        for request_id in [scheduled.request.request_id for scheduled in batch.requests]:
            self.scheduler.abort(request_id)
            outputs.append(self._incident(request_id, "STEP_FAILED"))
        self._residents.empty(*(adapter for _, adapter in batch.slot_writes))
        self._give_out(*outputs)

    def _refuse(self, adapter: Adapter, batch: ScheduledBatch) -> None:
        """The device has no memory for an adapter: all its requests end, and the step goes on without them."""
        error = Overloaded(
            f"adapter {adapter.name!r} takes {adapter.num_bytes:,} bytes on the device, which has no more: start with "
            "fewer --adapter-slots or less --kv-cache-bytes",
            reason="DEVICE_MEMORY",
        )
        ended = self.scheduler.abort_users(adapter)
        batch.requests = [item for item in batch.requests if item.request.request_id not in ended]
        self._residents.empty(adapter)
        self._give_out(*(TokenOutput(request_id, None, error=error) for request_id in ended))

    def _follow(self, policy: MergePolicy) -> None:
        """Merges, or takes the merged adapter out, when the policy says so."""
        wanted = policy.decide(chain(self.scheduler.running, self.scheduler.waiting), self.merged)
        if wanted is self.merged:
            return
        try:
            self._merge(wanted)
        except MergeRefused as refusal:
            assert wanted is not None
            log.info("%s", refusal)
            policy.refused(wanted)
        except Exception:  # no memory for the sums, say: nothing is merged, and requests run on
            log.exception("merging failed; from here on nothing is merged unasked")
            self._merge_policy = None

    def _merge(self, adapter: Adapter | None) -> float:
        before = self.merged
        try:
            seconds = self.runner.merge(adapter)
        finally:
            if self.merged is not before:
                self.scheduler.compute_with(self.merged)
                self._metrics.adapters.merged(self.merged, before)
                self._switched(self.merged, before)
        if self._merge_policy is not None:
            self._merge_policy.switched(adapter, seconds)
        log.info("%s in %.0f ms", f"adapter {adapter.name} merged" if adapter else "unmerged", 1000 * seconds)
        return seconds

    def _incident(self, request_id: int, reason: str) -> TokenOutput:
        incident = uuid.uuid4().hex[:12]
        log.error("request %d failed: %s, incident %s", request_id, reason, incident)
        self._metrics.failed_requests.labels(reason=reason).inc()
        return TokenOutput(
            request_id, None, error=InternalFailure(f"internal error, incident {incident}", reason=reason)
        )

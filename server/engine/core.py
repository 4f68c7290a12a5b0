"""The engine: one thread that schedules, runs and books steps. Other threads only put commands into its inbox."""

import logging
import queue
import time
import uuid
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass

import torch

from server.engine.model_runner import ModelRunner
from server.engine.request import Request, TokenOutput
from server.engine.scheduler import ScheduledBatch, Scheduler
from server.errors import InternalFailure, ServingError
from server.lora.adapter import Adapter
from server.lora.layers import bytes_on_device
from server.metrics import Metrics

log = logging.getLogger(__name__)

Emit = Callable[[list[TokenOutput]], None]


@dataclass(frozen=True, slots=True)
class Submit:
    request: Request


@dataclass(frozen=True, slots=True)
class Abort:
    request_id: int


@dataclass(frozen=True, slots=True)
class Evict:
    """Free the device slot of an adapter that no request uses any more; answers with the bytes that were freed."""

    adapter: Adapter
    freed: Future[int]


@dataclass(frozen=True, slots=True)
class Revoke:
    """End every request on an adapter with an error, and those that still come; until its `Evict`."""

    adapter: Adapter
    error: ServingError


@dataclass(frozen=True, slots=True)
class Stop:
    pass


Command = Submit | Abort | Evict | Revoke | Stop


class EngineCore:
    """Owns the model runner and the scheduler. `put` may be called from any thread, all else from the engine thread."""

    def __init__(self, runner: ModelRunner, scheduler: Scheduler, metrics: Metrics) -> None:
        self.runner = runner
        self.scheduler = scheduler
        self._metrics = metrics
        self._emit: Emit = _drop
        self._inbox: queue.SimpleQueue[Command] = queue.SimpleQueue()
        self._stopping = False
        self._revoked: dict[Adapter, ServingError] = {}
        # Adapters in device slots: a snapshot for other threads to read, replaced whole and never changed.
        self.resident: frozenset[Adapter] = frozenset()

    def connect(self, emit: Emit) -> None:
        """Says who gets the outputs of each step; called before the first one."""
        self._emit = emit

    def put(self, command: Command) -> None:
        self._inbox.put(command)

    def run(self) -> None:
        """Steps until `Stop`; sleeps while there is nothing to do."""
        torch.set_num_threads(torch.get_num_threads())  # OpenMP's count belongs to the thread that opens a region
        while not self._stopping:
            if self.scheduler.has_work:
                self.step()
            else:
                self._metrics.idle()
                self._obey(self._inbox.get())

    def step(self) -> None:
        """One turn: take what came in, schedule, run, book, give out."""
        self._drain_inbox()
        batch = self.scheduler.schedule()
        started = time.monotonic()
        try:
            results = self.runner.run(batch)
        except Exception:
            self._fail(batch)
            return
        if batch.slot_writes:
            self._publish_resident()
        not_finite = []
        sampled = {}
        produced = {}
        for request, result in results:
            if result.token_id is None:
                not_finite.append(request.request_id)
            else:
                sampled[request.request_id] = result.token_id
                produced[request.request_id] = (request, result)
        finished = self.scheduler.update(batch, sampled)
        outputs = [
            TokenOutput(
                request_id, result.token_id, finished.get(request_id), result.logprob, request.num_cached_tokens
            )
            for request_id, (request, result) in produced.items()
        ]
        for request_id in not_finite:
            self.scheduler.abort(request_id)
            outputs.append(self._incident(request_id, "NON_FINITE_LOGITS"))
        self._metrics.step(batch, self.scheduler, len(sampled), time.monotonic() - started)
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
                if request.adapter in self._revoked:
                    self._emit([TokenOutput(request.request_id, None, error=self._revoked[request.adapter])])
                else:
                    self.scheduler.add(request)
            case Abort(request_id):
                self.scheduler.abort(request_id)
            case Revoke(adapter, error):
                self._revoked[adapter] = error
                revoked = self.scheduler.abort_users(adapter)
                self._emit([TokenOutput(request_id, None, error=error) for request_id in revoked])
            case Evict(adapter, freed):
                self._revoked.pop(adapter, None)
                slot = self.scheduler.slots.remove(adapter)
                if slot is not None:
                    self.runner.lora.write(slot, None)
                self._publish_resident()
                freed.set_result(0 if slot is None else bytes_on_device(adapter, self.runner.base.device))
            case Stop():
                self._stopping = True

    def _fail(self, batch: ScheduledBatch) -> None:
        """A step crashed: its requests end with an incident each, and no slot counts as written."""
        log.exception("a step with %d requests failed", len(batch.requests))
        outputs = []
        for scheduled in batch.requests:
            self.scheduler.abort(scheduled.request.request_id)
            outputs.append(self._incident(scheduled.request.request_id, "STEP_FAILED"))
        for _, adapter in batch.slot_writes:
            self.scheduler.slots.remove(adapter)
        self._publish_resident()
        self._emit(outputs)

    def _publish_resident(self) -> None:
        self.resident = frozenset(self.scheduler.slots.adapters())

    def _incident(self, request_id: int, reason: str) -> TokenOutput:
        incident = uuid.uuid4().hex[:12]
        log.error("request %d failed: %s, incident %s", request_id, reason, incident)
        self._metrics.failed_requests.labels(reason=reason).inc()
        return TokenOutput(
            request_id, None, error=InternalFailure(f"internal error, incident {incident}", reason=reason)
        )


def _drop(outputs: list[TokenOutput]) -> None:
    pass

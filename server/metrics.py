"""Every metric of the engine, in one list. Both threads write here: prometheus-client locks.

What is counted per adapter is in `server.adapter_metrics`, what is counted per gRPC call in `server.rpc.call_metrics`.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from server.adapter_metrics import AdapterMetrics
from server.errors import ServingError
from server.gateway_metrics import GatewayMetrics

if TYPE_CHECKING:
    from server.engine.request import TokenOutput
    from server.engine.scheduler import ScheduledBatch, Scheduler

LATENCY = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 60, 120)  # seconds
# Those of `FinishReason`; the client went away; it failed in the engine; it never got there (no room, no such adapter).
FINISH_REASONS = ("stop", "length", "abort", "error", "refused")
FAILURES = ("STEP_FAILED", "NON_FINITE_LOGITS")
_TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096)

# The timers of all requests that a task makes from when it has put a list here, in tasks that it starts too.
request_timers: ContextVar[list[RequestTimer]] = ContextVar("request_timers")


class Metrics:
    """Owns the collectors. vLLM's words, Prometheus' units; times in seconds."""

    def __init__(self, registry: CollectorRegistry, max_adapters: int = 20) -> None:
        self.registry = registry

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(f"loraplex_{name}", text, labels, registry=registry)

        def gauge(name: str, text: str) -> Gauge:
            return Gauge(f"loraplex_{name}", text, registry=registry)

        def histogram(name: str, text: str, buckets: tuple[float, ...] = LATENCY, *labels: str) -> Histogram:
            return Histogram(f"loraplex_{name}", text, labels, registry=registry, buckets=buckets)

        self._running = gauge("num_requests_running", "Requests in the batch")
        self._waiting = gauge("num_requests_waiting", "Requests in the queue, or waiting for their adapter")
        self._kv_usage = gauge("kv_cache_usage_ratio", "Share of KV blocks in use")
        self._preemptions = counter("num_preemptions", "Requests that gave their KV blocks back")
        self.query_tokens = counter("prefix_cache_query_tokens", "Tokens of prompts looked up in the prefix cache")
        self.hit_tokens = counter("prefix_cache_hit_tokens", "Tokens of prompts taken from the prefix cache")
        self.requests = counter("requests", "Requests that ended, and how", "finish_reason")
        self.failed_requests = counter("failed_requests", "Requests ended by an internal error", "reason")
        self.adapter_load_failures = counter("adapter_load_failures", "Adapters refused at load")
        self.first_token = histogram("time_to_first_token_seconds", "From arrival to the first token")
        self.inter_token = histogram("inter_token_latency_seconds", "Between a request's tokens")
        self.end_to_end = histogram("e2e_request_latency_seconds", "From arrival to the last token")
        self.queue_time = histogram(
            "request_queue_time_seconds", "From arrival to the first step, loading the adapter included"
        )
        self.prefill_time = histogram("request_prefill_time_seconds", "From the first step to the first token")
        self.decode_time = histogram("request_decode_time_seconds", "From the first token to the last")
        self.adapter_load_seconds = histogram("adapter_load_seconds", "Disk to host memory")
        self.step_seconds = histogram("step_seconds", "One forward with sampling")
        self.step_tokens = histogram("iteration_tokens", "Tokens computed in a step", _TOKENS)
        self.merged_bytes = gauge("adapter_merged_bytes", "Memory of the merged adapter's sums with the base's weights")
        self.adapters = AdapterMetrics(max_adapters)
        registry.register(self.adapters)
        self._awaiting: dict[object, Collection[str]] = {}  # requests that wait for adapters, with their names
        self._seen_preemptions = 0
        # From the start, at zero: a series that begins at one shows no increase.
        for reason in FINISH_REASONS:
            self.requests.labels(finish_reason=reason)
        for reason in FAILURES:
            self.failed_requests.labels(reason=reason)

    def watch(self, scheduler: Scheduler) -> None:
        """Gauges read the scheduler at a scrape, so that a step does not have to set them."""
        self._running.set_function(lambda: len(scheduler.running))
        self._waiting.set_function(lambda: self.num_waiting(scheduler))
        self._kv_usage.set_function(lambda: scheduler.allocator.usage)
        self.registry.register(GatewayMetrics(scheduler, self))

    def num_waiting(self, scheduler: Scheduler) -> int:
        """Requests in the queue and requests whose adapters are on their way to host memory. Any thread."""
        return len(scheduler.waiting) + len(self._awaiting)

    def awaited(self) -> set[str]:
        """The adapters that requests wait for before they queue. Any thread."""
        return set[str]().union(*self._awaiting.copy().values())

    @contextmanager
    def awaiting(self, references: Collection[str]) -> Iterator[None]:
        """Within, a request waits for these adapters to be in host memory. Event loop."""
        ticket = object()
        self._awaiting[ticket] = [reference.partition("@")[0] for reference in references]
        try:
            yield
        finally:
            del self._awaiting[ticket]

    def step(self, batch: ScheduledBatch, scheduler: Scheduler, seconds: float) -> None:
        """Books one step. Engine thread."""
        self.step_seconds.observe(seconds)
        self.step_tokens.observe(batch.num_tokens)
        if scheduler.num_preemptions > self._seen_preemptions:
            self._preemptions.inc(scheduler.num_preemptions - self._seen_preemptions)
            self._seen_preemptions = scheduler.num_preemptions
        self.adapters.step({item.request.metrics_name for item in batch.requests})

    def adapter_loaded(self, name: str, seconds: float) -> None:
        """An adapter came from disk to host memory."""
        self.adapters.loaded(name, "host", seconds)
        self.adapter_load_seconds.observe(seconds)


class RequestTimer:
    """When things happened to one request, from its arrival. Event loop; times are of `time.monotonic`."""

    def __init__(self, metrics: Metrics, num_prompt_tokens: int) -> None:
        self._metrics = metrics
        self._num_prompt_tokens = num_prompt_tokens
        self.arrival = time.monotonic()
        self.first_step = self.first_token = self.last_token = 0.0  # 0: not yet
        self.num_tokens = 0  # generated
        self.num_cached_tokens = 0  # of the prompt
        self.outcome = "abort"  # one of FINISH_REASONS; this one unless something else is known to have ended it
        if (timers := request_timers.get(None)) is not None:
            timers.append(self)

    def token(self, output: TokenOutput) -> None:
        """A new token came; its time is the engine's, so a slow reader does not change it."""
        if self.first_token:
            self._metrics.inter_token.observe(output.time - self.last_token)
        else:
            self.first_step, self.first_token = output.first_step, output.time
            self._metrics.queue_time.observe(self.first_step - self.arrival)
            self._metrics.prefill_time.observe(self.first_token - self.first_step)
            self._metrics.first_token.observe(self.first_token - self.arrival)
            self._metrics.query_tokens.inc(self._num_prompt_tokens)
            self.num_cached_tokens = output.num_cached_tokens
            self._metrics.hit_tokens.inc(output.num_cached_tokens)
        self.last_token = output.time
        self.num_tokens += 1

    @contextmanager
    def booked(self) -> Iterator[None]:
        """Within, the request is with us; it ends in exactly one way."""
        try:
            yield
        except Exception as error:
            if self.outcome == "abort":
                self.outcome = "refused" if isinstance(error, ServingError) else "error"
            raise
        finally:
            self._metrics.requests.labels(finish_reason=self.outcome).inc()
            if self.last_token:
                self._metrics.decode_time.observe(self.last_token - self.first_token)
                self._metrics.end_to_end.observe(self.last_token - self.arrival)

"""Every metric of the server, in one list. prometheus-client is thread-safe, so both threads write here."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

if TYPE_CHECKING:
    from server.engine.request import FinishReason
    from server.engine.scheduler import ScheduledBatch, Scheduler

MAX_ADAPTER_LABELS = 100  # adapters beyond these share the label "other": a name must not cost memory for ever
_LATENCY = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 60, 120)
_TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096)


class Metrics:
    """Owns the collectors. vLLM's words, Prometheus' units; times in seconds."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.registry = registry

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(f"loraplex_{name}", text, labels, registry=registry)

        def gauge(name: str, text: str, *labels: str) -> Gauge:
            return Gauge(f"loraplex_{name}", text, labels, registry=registry)

        def histogram(name: str, text: str, buckets: tuple[float, ...], *labels: str) -> Histogram:
            return Histogram(f"loraplex_{name}", text, labels, registry=registry, buckets=buckets)

        self.running = gauge("num_requests_running", "Requests in the batch")
        self.waiting = gauge("num_requests_waiting", "Requests in the queue")
        self.kv_usage = gauge("kv_cache_usage_ratio", "Share of KV blocks in use")
        self.adapters_resident = gauge("adapters_resident", "Adapters in memory", "tier")
        self.preemptions = counter("num_preemptions", "Requests that gave their KV blocks back")
        self.prompt_tokens = counter("prompt_tokens", "Tokens of prompts", "adapter")
        self.generation_tokens = counter("generation_tokens", "Tokens generated", "adapter")
        self.cached_tokens = counter("prefix_cache_hit_tokens", "Tokens of prompts taken from the prefix cache")
        self.requests = counter("requests", "Finished requests", "finish_reason")
        self.failed_requests = counter("failed_requests", "Requests ended by an internal error", "reason")
        self.adapter_loads = counter("adapter_loads", "Adapters brought to a tier", "tier")
        self.adapter_evictions = counter("adapter_evictions", "Adapters dropped from a tier", "tier")
        self.adapter_load_failures = counter("adapter_load_failures", "Adapters refused at load")
        self.adapter_steps = counter("adapter_steps", "Steps in which an adapter had tokens", "adapter")
        self.adapter_shared_steps = counter(
            "adapter_shared_steps", "Steps in which an adapter's tokens ran with those of others", "adapter"
        )
        self.first_token = histogram("time_to_first_token_seconds", "From arrival to the first token", _LATENCY)
        self.inter_token = histogram("inter_token_latency_seconds", "Between a request's tokens", _LATENCY)
        self.end_to_end = histogram("e2e_request_latency_seconds", "From arrival to the last token", _LATENCY)
        self.adapter_load_seconds = histogram("adapter_load_seconds", "Disk to host memory", _LATENCY)
        self.step_seconds = histogram("step_seconds", "One forward with sampling", _LATENCY)
        self.step_tokens = histogram("iteration_tokens", "Tokens computed in a step", _TOKENS)
        self._adapter_labels: set[str] = set()
        self._seen_preemptions = 0

    def adapter_label(self, name: str) -> str:
        """The label value for an adapter: its name, `base`, or `other` beyond the first hundred."""
        if not name:
            return "base"
        if name not in self._adapter_labels:
            if len(self._adapter_labels) >= MAX_ADAPTER_LABELS:
                return "other"
            self._adapter_labels.add(name)
        return name

    def step(self, batch: ScheduledBatch, scheduler: Scheduler, num_sampled: int, seconds: float) -> None:
        """Books one step. Engine thread."""
        self.step_seconds.observe(seconds)
        self.step_tokens.observe(batch.num_tokens)
        self.running.set(len(scheduler.running))
        self.waiting.set(len(scheduler.waiting))
        self.kv_usage.set(scheduler.allocator.usage)
        self.preemptions.inc(scheduler.num_preemptions - self._seen_preemptions)
        self._seen_preemptions = scheduler.num_preemptions
        self.adapter_loads.labels(tier="device").inc(len(batch.slot_writes))
        self.adapters_resident.labels(tier="device").set(len(scheduler.slots.adapters()))
        labels = {self.adapter_label(item.request.adapter_name) for item in batch.requests}
        for label in labels:
            self.adapter_steps.labels(adapter=label).inc()
            if len(labels) > 1:
                self.adapter_shared_steps.labels(adapter=label).inc()

    def idle(self) -> None:
        """Nothing runs. Engine thread."""
        self.running.set(0)
        self.waiting.set(0)


class RequestTimer:
    """Times of one request, from its arrival. Event loop."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        self._arrival = self._last = time.monotonic()
        self._has_first = False

    def tokens(self) -> None:
        """New tokens came."""
        now = time.monotonic()
        if self._has_first:
            self._metrics.inter_token.observe(now - self._last)
        else:
            self._metrics.first_token.observe(now - self._arrival)
            self._has_first = True
        self._last = now

    def finished(self, reason: FinishReason) -> None:
        self._metrics.end_to_end.observe(time.monotonic() - self._arrival)
        self._metrics.requests.labels(finish_reason=reason.value).inc()

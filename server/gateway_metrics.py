"""The gauges by which the Gateway API inference extension routes, under the names that it reads by default.

Its endpoint picker knows vLLM's names, colon included; nothing else of Loraplex carries them.
"""

import time
from collections.abc import Iterable
from typing import TYPE_CHECKING

from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

if TYPE_CHECKING:
    from server.engine.scheduler import Scheduler
    from server.metrics import Metrics


class GatewayMetrics(Collector):
    """Reads the scheduler at a scrape, from the scrape's thread: lengths, and copies that are made in one go."""

    def __init__(self, scheduler: "Scheduler", metrics: "Metrics") -> None:
        self._scheduler = scheduler
        self._metrics = metrics

    def collect(self) -> Iterable[Metric]:
        scheduler = self._scheduler
        yield GaugeMetricFamily("vllm:num_requests_running", "Requests in the batch", len(scheduler.running))
        num_waiting = self._metrics.num_waiting(scheduler)
        yield GaugeMetricFamily("vllm:num_requests_waiting", "Requests in the queue", num_waiting)
        yield GaugeMetricFamily(
            "vllm:kv_cache_usage_perc", "Share of KV blocks in use, 0 to 1", scheduler.allocator.usage
        )
        ready = {adapter.name for adapter in self._metrics.adapters.residents("device")}
        waiting = {part.adapter.name for request in tuple(scheduler.waiting) for part in request.adapters}
        waiting |= self._metrics.awaited()
        info = GaugeMetricFamily(
            "vllm:lora_requests_info",
            "Adapters in device slots and adapters that are waited for; the value is the time",
            labels=["max_lora", "running_lora_adapters", "waiting_lora_adapters"],
        )
        labels = [str(scheduler.slots.num_slots), ",".join(sorted(ready)), ",".join(sorted(waiting - ready))]
        info.add_metric(labels, time.time())
        yield info

"""A line every ten seconds that says how much the server does, and none while it does nothing. Event loop."""

import asyncio
import logging
from typing import NamedTuple

from server.engine.scheduler import Scheduler
from server.metrics import Metrics

log = logging.getLogger(__name__)

INTERVAL = 10.0  # seconds


class _Totals(NamedTuple):
    prompt: float
    generation: float
    prefix_queries: float
    prefix_hits: float


class ThroughputLog:
    """Reads the same counts that a scrape does."""

    def __init__(self, metrics: Metrics, scheduler: Scheduler) -> None:
        self._metrics = metrics
        self._scheduler = scheduler
        self._last = self._totals()

    async def run(self) -> None:
        """Logs until it is cancelled."""
        while True:
            await asyncio.sleep(INTERVAL)
            if line := self.line(INTERVAL):
                log.info("%s", line)

    def line(self, seconds: float) -> str:
        """What was done since the last line, `seconds` ago; empty if nothing was."""
        totals = self._totals()
        done = _Totals(*(now - before for now, before in zip(totals, self._last, strict=True)))
        self._last = totals
        running, waiting = len(self._scheduler.running), self._metrics.num_waiting(self._scheduler)
        if not (running or waiting or done.prompt or done.generation):
            return ""
        parts = [
            f"{running} running, {waiting} waiting",
            f"prompt {done.prompt / seconds:.1f} and generation {done.generation / seconds:.1f} tokens/s",
            f"KV cache {self._scheduler.allocator.usage:.1%}",
        ]
        if done.prefix_queries:
            parts.append(f"prefix cache hits {done.prefix_hits / done.prefix_queries:.1%}")
        return ", ".join(parts)

    def _totals(self) -> _Totals:
        value = self._metrics.registry.get_sample_value
        return _Totals(
            self._metrics.adapters.total("prompt_tokens"),
            self._metrics.adapters.total("generation_tokens"),
            value("loraplex_prefix_cache_query_tokens_total") or 0.0,
            value("loraplex_prefix_cache_hit_tokens_total") or 0.0,
        )

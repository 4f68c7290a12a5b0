"""What is counted per adapter, under a bounded number of names. Both threads count; a scrape reads."""

import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from server.lora.adapter import Adapter

BASE = "base"  # the label of requests without an adapter
MIXTURE = "mixture"  # the label of requests with several adapters
OTHER = "other"  # the label that adapters without a name of their own share
_SHARED = (BASE, MIXTURE, OTHER)
RERANK_SECONDS = 600.0

_COUNTERS = {  # name: (help, whether it also has the label `tier`)
    "adapter_requests": ("Requests that were given their adapter", False),
    "prompt_tokens": ("Tokens of prompts", False),
    "generation_tokens": ("Tokens generated", False),
    "adapter_steps": ("Steps in which an adapter had tokens", False),
    "adapter_shared_steps": ("Steps in which an adapter's tokens ran with those of others", False),
    "adapter_hits": ("Requests that found their adapter in the tier", True),
    "adapter_loads": ("Adapters brought to a tier", True),
    "adapter_load_time_seconds": ("Time spent on bringing adapters to a tier", True),
    "adapter_evictions": ("Adapters dropped from a tier to make room", True),
    "adapter_merges": ("Times that an adapter was merged into the base's weights", False),
    "adapter_unmerges": ("Times that it was taken out again, or another took its place", False),
}

_Row = defaultdict[tuple[str, str], float]  # (counter, tier) → value


class AdapterMetrics(Collector):
    """Owns the counts of every adapter that has a label of its own, and those of the rest together.

    The first `max_names` adapters get their own label. An event counts once, under the label that its adapter has then,
    and never moves to another: every series only grows, and rates summed over the labels are exact. Every
    `rerank_seconds` an adapter of `other` with more than twice the requests of a named one takes that one's place. The
    series of the loser ends; if it is named again it starts from zero, which `rate()` takes for a restart. So a scrape
    holds at most `max_names` + 3 labels, and a ranking adds at most `max_names` to what a database has to keep.
    """

    def __init__(self, max_names: int, rerank_seconds: float = RERANK_SECONDS) -> None:
        self._max_names = max_names
        self._rerank_seconds = rerank_seconds
        self._next_rerank = time.monotonic() + rerank_seconds
        self._lock = threading.Lock()
        self._counts = {label: _Row(float) for label in _SHARED}
        self._totals = _Row(float)
        self._traffic: Counter[str] = Counter()  # requests of every adapter since the last ranking
        self._residents: dict[str, Callable[[], Iterable[Adapter]]] = {}  # by tier

    def watch(self, tier: str, residents: Callable[[], Iterable[Adapter]]) -> None:
        """Says how to see which adapters are in a tier; called at every scrape, from the scrape's thread."""
        self._residents[tier] = residents

    def residents(self, tier: str) -> list[Adapter]:
        return list(self._residents[tier]()) if tier in self._residents else []

    def request(self, name: str, num_prompt_tokens: int) -> None:
        """A request got its adapter; the empty name is the base model, several adapters are a `MIXTURE`."""
        with self._lock:
            if time.monotonic() >= self._next_rerank:
                self._rerank()
                self._next_rerank = time.monotonic() + self._rerank_seconds
            self._add("adapter_requests", name)
            self._add("prompt_tokens", name, num_prompt_tokens)
            if name not in ("", MIXTURE):
                self._traffic[name] += 1

    def tokens(self, num_tokens: Mapping[str, int]) -> None:
        """So many tokens were generated on each adapter."""
        with self._lock:
            for name, count in num_tokens.items():
                self._add("generation_tokens", name, count)

    def step(self, names: Collection[str]) -> None:
        """A step had tokens of these. Engine thread."""
        with self._lock:
            for name in names:
                self._add("adapter_steps", name)
                if len(names) > 1:
                    self._add("adapter_shared_steps", name)

    def found(self, name: str, tier: str) -> None:
        """A request found its adapter in a tier."""
        with self._lock:
            self._add("adapter_hits", name, tier=tier)

    def loaded(self, name: str, tier: str, seconds: float) -> None:
        with self._lock:
            self._add("adapter_loads", name, tier=tier)
            self._add("adapter_load_time_seconds", name, seconds, tier)

    def evicted(self, name: str, tier: str) -> None:
        with self._lock:
            self._add("adapter_evictions", name, tier=tier)

    def merged(self, adapter: Adapter | None, before: Adapter | None) -> None:
        """What the base's weights hold now, and what they held. Engine thread."""
        with self._lock:
            if before is not None:
                self._add("adapter_unmerges", before.name)
            if adapter is not None:
                self._add("adapter_merges", adapter.name)

    def total(self, counter: str, tier: str = "") -> int:
        """A counter over all adapters, also those that lost their label."""
        return int(self._totals[counter, tier])

    def collect(self) -> Iterable[Metric]:
        residents = {tier: self.residents(tier) for tier in self._residents}
        with self._lock:
            counts = {label: dict(row) for label, row in self._counts.items()}
        for counter, (text, has_tier) in _COUNTERS.items():
            labels = ["adapter", "tier"] if has_tier else ["adapter"]
            family = CounterMetricFamily(f"loraplex_{counter}", text, labels=labels)
            for label, row in counts.items():
                for (name, tier), value in row.items():
                    if name == counter:
                        family.add_metric([label, tier][: len(labels)], value)
            yield family
        yield from _residency(residents, [label for label in counts if label not in _SHARED])

    def _add(self, counter: str, name: str, amount: float = 1.0, tier: str = "") -> None:
        label = name or BASE
        if label not in self._counts:
            if len(self._counts) < self._max_names + len(_SHARED):
                self._counts[label] = _Row(float)
            else:
                label = OTHER
        self._counts[label][counter, tier] += amount
        self._totals[counter, tier] += amount

    def _rerank(self) -> None:
        named = sorted(self._counts.keys() - {*_SHARED}, key=self._traffic.__getitem__)
        unnamed = [name for name, _ in self._traffic.most_common() if name not in self._counts]
        for quiet, busy in zip(named, unnamed, strict=False):
            if self._traffic[busy] > 2 * self._traffic[quiet]:
                del self._counts[quiet]
                self._counts[busy] = _Row(float)
        self._traffic.clear()


def _residency(residents: dict[str, list[Adapter]], named: list[str]) -> Iterable[Metric]:
    total = GaugeMetricFamily("loraplex_adapters_resident", "Adapters in memory", labels=["tier"])
    single = GaugeMetricFamily(
        "loraplex_adapter_resident", "Versions of a named adapter in a tier", labels=["adapter", "tier"]
    )
    for tier, adapters in residents.items():
        total.add_metric([tier], len(adapters))
        names = Counter(adapter.name for adapter in adapters)
        for name in named:
            single.add_metric([name, tier], names[name])
    host_bytes = GaugeMetricFamily("loraplex_adapter_host_bytes", "Host memory of adapters")
    host_bytes.add_metric([], sum(adapter.num_bytes for adapter in residents.get("host", ())))
    yield from (total, single, host_bytes)

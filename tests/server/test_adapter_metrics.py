"""Counts per adapter: exact, bounded, and never falling."""

import threading
from collections import Counter
from dataclasses import dataclass
from typing import Any

from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry

from server.adapter_metrics import MIXTURE, AdapterMetrics

Series = dict[tuple[str, ...], float]


@dataclass(frozen=True)
class SomeAdapter:
    """As much of an adapter as is counted."""

    name: str
    num_bytes: int = 10


def adapter(name: str) -> Any:
    return SomeAdapter(name)


def ask(metrics: AdapterMetrics, name: str, times: int = 1) -> None:
    for _ in range(times):
        metrics.request(name, 3)


def rank(metrics: AdapterMetrics) -> None:
    """As if the time of the next ranking had come."""
    metrics._next_rerank = 0
    ask(metrics, "")


def series(metrics: AdapterMetrics, counter: str = "adapter_requests") -> Series:
    return {
        tuple(sample.labels.values()): sample.value
        for family in metrics.collect()
        for sample in family.samples
        if sample.name in (f"loraplex_{counter}_total", f"loraplex_{counter}")
    }


def test_the_first_names_get_labels_and_the_others_share_one() -> None:
    metrics = AdapterMetrics(2)
    for name in ("a", "b", "c", "d", "", "a"):
        ask(metrics, name)
    assert series(metrics) == {("a",): 2, ("b",): 1, ("other",): 2, ("base",): 1}
    assert series(metrics, "prompt_tokens") == {("a",): 6, ("b",): 3, ("other",): 6, ("base",): 3}


def test_without_names_all_adapters_are_other() -> None:
    metrics = AdapterMetrics(0)
    ask(metrics, "a")
    assert series(metrics) == {("other",): 1}


def test_mixtures_have_one_label_and_take_nobody_elses() -> None:
    metrics = AdapterMetrics(1)
    ask(metrics, MIXTURE, 9)
    ask(metrics, "a")
    rank(metrics)
    ask(metrics, "a")
    metrics.tokens({MIXTURE: 4})
    assert series(metrics) == {("mixture",): 9, ("a",): 2, ("base",): 1}
    assert series(metrics, "generation_tokens") == {("mixture",): 4}


def test_a_busy_adapter_takes_the_place_of_a_quiet_one() -> None:
    metrics = AdapterMetrics(2)
    for name, times in (("quiet", 2), ("busy", 9), ("rising", 5), ("rare", 1)):
        ask(metrics, name, times)
    rank(metrics)
    ask(metrics, "rising")
    ask(metrics, "quiet")
    # What it did under `other` stays there.
    assert series(metrics) == {("busy",): 9, ("rising",): 1, ("other",): 7, ("base",): 1}


def test_equal_traffic_changes_no_label() -> None:
    metrics = AdapterMetrics(3)
    for _ in range(5):
        for index in range(10):
            ask(metrics, f"adapter-{index}", 4)
        rank(metrics)
    assert {label for (label,) in series(metrics)} == {"adapter-0", "adapter-1", "adapter-2", "other", "base"}


@given(st.lists(st.integers(0, 9), max_size=200), st.integers(0, 4))
def test_increases_add_up_whatever_the_order(names: list[int], max_names: int) -> None:
    """What `increase()` makes of a scrape after every request: a fall is a restart from zero."""
    metrics = AdapterMetrics(max_names, rerank_seconds=0)
    before: Series = {}
    increase: Counter[tuple[str, ...]] = Counter()
    for index in names:
        ask(metrics, f"adapter-{index}")
        now = series(metrics)
        for labels, value in now.items():
            last = before.get(labels, 0)
            assert value >= last
            increase[labels] += int(value - last)
        assert len(now) <= max_names + 1
        before = now
    assert increase.total() == len(names) == metrics.total("adapter_requests")


def test_tiers() -> None:
    metrics = AdapterMetrics(1)
    metrics.watch("host", lambda: [adapter("a"), adapter("a"), adapter("b")])
    metrics.watch("device", lambda: [adapter("a")])
    metrics.loaded("a", "host", 0.5)
    metrics.loaded("a", "host", 0.25)
    metrics.loaded("a", "device", 0.125)
    metrics.loaded("b", "device", 0.0625)
    metrics.found("a", "host")
    metrics.found("a", "device")
    metrics.evicted("b", "device")
    assert series(metrics, "adapters_resident") == {("host",): 3, ("device",): 1}
    assert series(metrics, "adapter_resident") == {("a", "host"): 2, ("a", "device"): 1}
    assert series(metrics, "adapter_host_bytes") == {(): 30}
    assert series(metrics, "adapter_loads") == {("a", "host"): 2, ("a", "device"): 1, ("other", "device"): 1}
    assert series(metrics, "adapter_load_time_seconds") == {
        ("a", "host"): 0.75,
        ("a", "device"): 0.125,
        ("other", "device"): 0.0625,
    }
    assert series(metrics, "adapter_hits") == {("a", "host"): 1, ("a", "device"): 1}
    assert series(metrics, "adapter_evictions") == {("other", "device"): 1}


def test_two_threads_and_a_scrape_lose_nothing() -> None:
    metrics = AdapterMetrics(2, rerank_seconds=0)
    registry = CollectorRegistry()
    registry.register(metrics)

    def steps() -> None:
        for index in range(3000):
            metrics.step({f"adapter-{index % 5}", ""})

    threads = [threading.Thread(target=steps) for _ in range(2)]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        ask(metrics, "adapter-1")
        assert list(registry.collect())
    for thread in threads:
        thread.join()
    assert metrics.total("adapter_steps") == metrics.total("adapter_shared_steps") == 12000


def test_a_merge_takes_the_place_of_another() -> None:
    metrics = AdapterMetrics(2)
    metrics.merged(adapter("a"), None)
    metrics.merged(adapter("b"), adapter("a"))
    metrics.merged(None, adapter("b"))
    assert (metrics.total("adapter_merges"), metrics.total("adapter_unmerges")) == (2, 2)

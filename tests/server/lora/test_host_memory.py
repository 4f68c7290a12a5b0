"""Room in host memory: who gets it, who waits for it, who stays."""

import asyncio
import errno
import os
import threading
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from adapters.format import AdapterFiles, read_adapter
from server.errors import Overloaded
from server.lora.adapter import Adapter
from server.lora.cache import AdapterCache
from server.lora.store import AdapterRef
from tests.server.lora.conftest import ADAPTER_BYTES, MakeAdapter, make_cache


async def test_room_is_made_by_the_least_recently_used(tmp_path: Path, make_adapter: MakeAdapter) -> None:
    for name in "abc":
        make_adapter(name)
    cache, evicted = make_cache(tmp_path, max_bytes=2 * ADAPTER_BYTES + 5000)
    for name in "aba":
        async with cache.acquire(name):
            pass
    async with cache.acquire("c"):
        assert [adapter.name for adapter in evicted] == ["b"]
        async with cache.acquire("a"):
            with pytest.raises(Overloaded, match="--adapter-host-bytes"):
                await cache.load("b")
    async with cache.acquire("b"):
        pass


async def test_room_is_what_the_weights_take(
    tmp_path: Path, make_adapter: MakeAdapter, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_adapter("a")
    with pytest.raises(Overloaded, match=f"{ADAPTER_BYTES:,} bytes do not fit"):
        await make_cache(tmp_path, max_bytes=ADAPTER_BYTES - 1)[0].load("a")
    cache, _ = make_cache(tmp_path, max_bytes=ADAPTER_BYTES)
    await cache.load("a")

    def none_left(*args: object) -> None:
        raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))

    monkeypatch.setattr("server.lora.adapter.lazy_zeros", none_left)
    await cache.unload("a")
    with pytest.raises(Overloaded, match="no memory for adapter 'a'"):
        await cache.load("a")


async def test_requests_wait_for_room_in_order_of_arrival(tmp_path: Path, make_adapter: MakeAdapter) -> None:
    for name in "abcd":
        make_adapter(name)
    cache, _ = make_cache(tmp_path, max_bytes=2 * ADAPTER_BYTES + 5000)
    served: list[str] = []

    async def use(name: str) -> None:
        async with cache.acquire(name):
            served.append(name)
            await asyncio.sleep(0)

    async with cache.acquire("a"):
        async with cache.acquire("b"):
            waiting = [asyncio.create_task(use("c"))]
            while cache.memory.has_room(0):  # until somebody waits for it
                await asyncio.sleep(0.005)
            waiting += [asyncio.create_task(use(name)) for name in "dc"]
            given_up = asyncio.create_task(use("d"))
            await asyncio.sleep(0.02)
            given_up.cancel()
            assert served == []
            assert (await cache.get("c")).num_waiting == 2
            assert cache.num_bytes == 2 * ADAPTER_BYTES
        await asyncio.gather(*waiting)
    assert served == ["c", "c", "d"]


def _use(cache: AdapterCache, name: str) -> "asyncio.Task[None]":
    async def use() -> None:
        async with cache.acquire(name):
            pass

    return asyncio.create_task(use())


async def _until_waiting(cache: AdapterCache, *names: str) -> None:
    """Until the loads of these adapters wait for room."""
    async with asyncio.timeout(10):
        while [ref.name for ref in cache.memory._waiting] != list(names):
            await asyncio.sleep(0.005)


async def test_an_operator_loads_what_waits_behind_another(tmp_path: Path, make_adapter: MakeAdapter) -> None:
    """Its requests go on, and its copy does not keep out the one that is first."""
    for name, rank in (("used", 4), ("first", 7), ("behind", 2)):
        make_adapter(name, r=rank)
    cache, _ = make_cache(tmp_path, max_bytes=2 * ADAPTER_BYTES)
    async with cache.acquire("used"):
        first = _use(cache, "first")
        await _until_waiting(cache, "first")
        behind = _use(cache, "behind")
        await _until_waiting(cache, "first", "behind")
        await cache.load("behind")
        await asyncio.wait_for(behind, 10)
    await asyncio.wait_for(first, 10)


async def test_a_load_that_nobody_awaits_any_more_lets_others_pass(tmp_path: Path, make_adapter: MakeAdapter) -> None:
    for name, rank in (("used", 4), ("large", 7), ("small", 2)):
        make_adapter(name, r=rank)
    cache, _ = make_cache(tmp_path, max_bytes=2 * ADAPTER_BYTES)
    async with cache.acquire("used"):
        large = _use(cache, "large")
        await _until_waiting(cache, "large")
        small = _use(cache, "small")
        await _until_waiting(cache, "large", "small")
        large.cancel()
        await asyncio.wait_for(small, 10)
        again = _use(cache, "large")
        await _until_waiting(cache, "large")
    await asyncio.wait_for(again, 10)


async def test_the_parts_of_a_mixture_wait_for_room_together(tmp_path: Path, make_adapter: MakeAdapter) -> None:
    """However many mixtures want the room at once, none holds what another waits for."""
    for name in "abcd":
        make_adapter(name)
    cache, _ = make_cache(tmp_path, max_bytes=2 * ADAPTER_BYTES + 5000)

    async def use(*names: str) -> None:
        with ExitStack() as held:
            adapters = await cache.hold(names, held)
            assert [adapter.name for adapter, _ in adapters] == list(names)
            await asyncio.sleep(0)

    work = [use(*names) for names in ("ab", "cd", "ac", "bd", "da", "cb", "a", "d") * 3]
    await asyncio.wait_for(asyncio.gather(*work), 20)
    assert all(not status.num_users and not status.num_waiting for status in cache.statuses())


async def test_a_mixture_that_is_read_holds_up_no_other(
    tmp_path: Path, make_adapter: MakeAdapter, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in "abcd":
        make_adapter(name)
    cache, _ = make_cache(tmp_path)
    slow = threading.Event()

    def read_slowly(folder: Path, *args: Any) -> AdapterFiles:
        if folder.name == "a":
            slow.wait(10)
        return read_adapter(folder, *args)

    monkeypatch.setattr("server.lora.loader.read_adapter", read_slowly)
    with ExitStack() as held:
        waiting = asyncio.create_task(cache.hold("ab", held))
        await asyncio.sleep(0)
        await asyncio.wait_for(cache.hold("cd", held), 5)
        assert not waiting.done()
        slow.set()
        await waiting


async def test_loads_share_no_thread_with_what_else_waits_for_the_disk(
    tmp_path: Path, make_adapter: MakeAdapter
) -> None:
    make_adapter("a")
    cache, _ = make_cache(tmp_path)
    done = threading.Event()
    others = [asyncio.create_task(workers.run(done.wait, 10)) for workers in (cache.disk, cache.changes) * 3]
    await asyncio.sleep(0)
    async with asyncio.timeout(5), cache.acquire("a"):
        assert not any(other.done() for other in others)
    done.set()
    await asyncio.gather(*others)


async def test_the_seconds_of_a_load_are_without_the_wait_for_room(tmp_path: Path, make_adapter: MakeAdapter) -> None:
    for name in "ab":
        make_adapter(name)
    cache, _ = make_cache(tmp_path, max_bytes=ADAPTER_BYTES)
    async with cache.acquire("a"):
        waiting = _use(cache, "b")
        await _until_waiting(cache, "b")
        await asyncio.sleep(0.5)
    await waiting
    copy = cache.memory.get(AdapterRef("b", "1"))
    assert copy is not None
    assert 0 < copy.load_seconds < 0.5


async def test_a_mixture_that_can_never_fit_is_refused(tmp_path: Path, make_adapter: MakeAdapter) -> None:
    for name in "abc":
        make_adapter(name)
    cache, _ = make_cache(tmp_path, max_bytes=2 * ADAPTER_BYTES + 5000)
    with ExitStack() as held:
        with pytest.raises(Overloaded, match="--adapter-host-bytes"):
            await cache.hold("abc", held)
        await cache.pin("a")
        with pytest.raises(Overloaded, match="pinned"):
            await cache.hold("bc", held)
        await cache.hold("ab", held)


async def test_concurrent_loads_keep_the_limit(tmp_path: Path, make_adapter: MakeAdapter) -> None:
    for name in "abcd":
        make_adapter(name)
    cache, _ = make_cache(tmp_path, max_bytes=2 * ADAPTER_BYTES + 5000)
    results = await asyncio.gather(*[cache.load(name) for name in "abcd"], return_exceptions=True)
    assert cache.num_bytes <= 2 * ADAPTER_BYTES + 5000
    assert any(isinstance(result, Adapter) for result in results)


async def test_what_was_evicted_comes_back_as_the_same_generation(tmp_path: Path, make_adapter: MakeAdapter) -> None:
    for name in "ab":
        make_adapter(name)
    cache, _ = make_cache(tmp_path, max_bytes=ADAPTER_BYTES + 5000)
    generations = []
    for name in "abab":
        async with cache.acquire(name) as adapter:
            assert adapter is not None
            generations.append(adapter.generation)
    assert generations == [1, 2, 1, 2]
    assert cache.statuses()[0].generation == 1


async def test_pinned_adapters_stay(tmp_path: Path, make_adapter: MakeAdapter) -> None:
    for name in "abc":
        make_adapter(name)
    cache, evicted = make_cache(tmp_path, max_bytes=2 * ADAPTER_BYTES + 5000)
    await cache.load("a", pin=True)
    for name in "bcb":
        async with cache.acquire(name):
            pass
    assert [adapter.name for adapter in evicted] == ["b", "c"]
    assert (await cache.pin("b")).pinned
    assert cache.memory.num_pinned_bytes == 2 * ADAPTER_BYTES
    with pytest.raises(Overloaded, match="are pinned"):
        await cache.load("c")
    assert not (await cache.unpin("b")).pinned
    await cache.load("c")
    await cache.unload("a")
    await cache.load("a")
    assert not (await cache.get("a")).pinned


async def test_a_pinned_name_stays_pinned_whatever_it_means(tmp_path: Path, make_adapter: MakeAdapter) -> None:
    make_adapter("a")
    cache, _ = make_cache(tmp_path)
    await cache.load("a", pin=True)
    replaced = await cache.load("a", replace=True)
    status = await cache.get("a")
    assert status.pinned
    assert status.adapter is replaced

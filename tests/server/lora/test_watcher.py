"""Changes on disk count without a restart, once they are complete."""

import asyncio
import errno
import shutil
import threading
from collections import Counter
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from server.errors import AdapterNotFound, Overloaded, Unavailable
from server.lora import events
from server.lora.cache import AdapterCache
from server.lora.events import AdapterEvent, EventKind
from server.lora.router import AdapterRouter
from server.lora.stored_name import StoredName
from server.lora.watcher import StoreWatcher
from tests.server.lora.conftest import ADAPTER_BYTES, MakeAdapter, fail_disk, make_cache


@asynccontextmanager
async def watched(root: Path, max_bytes: int = 1 << 30) -> AsyncIterator[AdapterCache]:
    cache, _ = make_cache(root, max_bytes)
    watching = asyncio.create_task(StoreWatcher(cache, interval=0.01).run())
    try:
        yield cache
    finally:
        watching.cancel()
        await asyncio.wait([watching])
        assert watching.cancelled()


async def eventually(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0.005)


def names(cache: AdapterCache) -> list[str]:
    return [str(status.ref) for status in cache.statuses()]


async def _read_to_the_end(stream: AsyncIterator[AdapterEvent]) -> None:
    async for _ in stream:
        pass


async def test_adapters_appear_and_vanish(tmp_path: Path, make_adapter: MakeAdapter) -> None:
    store = tmp_path / "store"
    async with watched(store) as cache:
        assert names(cache) == []
        make_adapter("a", root=store)
        make_adapter("2", root=store / "a")
        await eventually(lambda: names(cache) == ["a@1", "a@2"])
        async with cache.acquire("a@1") as adapter:
            assert adapter is not None
            shutil.rmtree(store / "a")
            await eventually(lambda: names(cache) == [])
            assert cache.num_bytes == ADAPTER_BYTES, "a running request keeps its weights"
        with pytest.raises(AdapterNotFound):
            async with cache.acquire("a@1"):
                pass
        await eventually(lambda: cache.num_bytes == 0)


async def test_a_change_becomes_a_new_generation(tmp_path: Path, make_adapter: MakeAdapter) -> None:
    make_adapter("a", seed=1)
    make_adapter("fresh", seed=2, root=tmp_path / "elsewhere")
    async with watched(tmp_path) as cache:
        async with cache.acquire("a") as old:
            assert old is not None
            shutil.copytree(tmp_path / "elsewhere" / "fresh", tmp_path / "a", dirs_exist_ok=True)
            await eventually(lambda: cache.statuses()[0].generation > old.generation)
            async with cache.acquire("a") as new:
                assert new is not None
                assert new.digest != old.digest
            assert cache.num_bytes == 2 * ADAPTER_BYTES
        await eventually(lambda: cache.num_bytes == ADAPTER_BYTES)


async def test_a_change_that_is_not_complete_leaves_the_old_one(tmp_path: Path, make_adapter: MakeAdapter) -> None:
    weights = make_adapter("a") / "adapter_model.safetensors"
    whole = weights.read_bytes()
    async with watched(tmp_path) as cache:
        good = await cache.load("a", pin=True)
        weights.write_bytes(whole[: len(whole) // 2])
        await eventually(lambda: bool(cache.statuses()[0].error))
        assert cache.statuses()[0].adapter is good
        weights.write_bytes(whole)
        await eventually(lambda: not cache.statuses()[0].error)
        assert cache.statuses()[0].adapter is good, "the content is what it was, and so is the generation"


async def test_promotion_by_another_server(tmp_path: Path, make_adapter: MakeAdapter) -> None:
    for version in "12":
        make_adapter(version, root=tmp_path / "a")
    async with watched(tmp_path) as cache:
        (tmp_path / "a" / "routing.json").write_text('{"promoted": "1", "percent_by_version": {}}')
        await eventually(lambda: cache.catalog.current("a") == "1")


async def test_a_look_does_not_undo_what_happened_meanwhile(
    tmp_path: Path, make_adapter: MakeAdapter, monkeypatch: pytest.MonkeyPatch
) -> None:
    for version in "12":
        make_adapter(version, root=tmp_path / "a")
    cache, _ = make_cache(tmp_path)
    watcher = StoreWatcher(cache, interval=1)
    (tmp_path / "a" / "routing.json").write_text('{"promoted": "2", "percent_by_version": {}}')
    await watcher.look()
    scan = cache.store.scan
    scanned, promoted = threading.Event(), threading.Event()

    def slow_scan(known: Mapping[str, StoredName]) -> dict[str, StoredName]:
        found = scan(known)
        scanned.set()
        promoted.wait(10)
        return found

    monkeypatch.setattr(cache.store, "scan", slow_scan)
    looking = asyncio.create_task(watcher.look())
    await asyncio.to_thread(scanned.wait, 10)
    await AdapterRouter(cache).promote("a", "1")
    promoted.set()
    await looking
    assert cache.catalog.current("a") == "1"


async def test_a_bug_does_not_end_the_watch(
    tmp_path: Path, make_adapter: MakeAdapter, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with watched(tmp_path) as cache:
        with monkeypatch.context() as broken:
            broken.setattr(cache.store, "scan", lambda known: 1 / 0)
            await eventually(lambda: "was not taken" in caplog.text)
        make_adapter("a")
        await eventually(lambda: names(cache) == ["a@1"])


async def test_a_store_that_is_away_takes_nothing_with_it(
    tmp_path: Path, make_adapter: MakeAdapter, caplog: pytest.LogCaptureFixture
) -> None:
    store = tmp_path / "store"
    make_adapter("a", root=store)
    async with watched(store) as cache:
        good = await cache.load("a")
        store.rename(tmp_path / "away")
        await eventually(lambda: "cannot be read" in caplog.text)
        async with cache.acquire("a") as adapter:
            assert adapter is good
        (tmp_path / "away").rename(store)
        make_adapter("b", root=store)
        await eventually(lambda: names(cache) == ["a@1", "b@1"])
    assert caplog.text.count("cannot be read") == 1


async def test_what_was_unloaded_comes_back_only_when_it_is_another(tmp_path: Path, make_adapter: MakeAdapter) -> None:
    make_adapter("a")
    async with watched(tmp_path) as cache:
        await cache.unload("a")
        (tmp_path / "a" / "adapter_config.json").touch()
        await asyncio.sleep(0.1)
        assert names(cache) == []
        shutil.rmtree(tmp_path / "a")
        await eventually(lambda: cache.catalog.stored() == {})
        make_adapter("a")
        await eventually(lambda: names(cache) == ["a@1"])


async def test_events_tell_a_life(tmp_path: Path, make_adapter: MakeAdapter) -> None:
    for name in "ab":
        make_adapter(name)
    cache, _ = make_cache(tmp_path, max_bytes=ADAPTER_BYTES + 5000)
    stream = cache.board.watch()
    seen = [await anext(stream) for _ in range(3)]
    assert [event.kind for event in seen] == [EventKind.SNAPSHOT, EventKind.SNAPSHOT, EventKind.SYNCED]
    await cache.load("a")
    await cache.load("b")
    await cache.pin("b")
    await cache.unpin("b")
    (tmp_path / "b" / "adapter_config.json").write_text("{")
    with pytest.raises(Exception, match="JSON"):
        await cache.load("b", replace=True)
    await cache.unload("b")
    await cache.load("a")
    await cache.load("a", replace=True)
    expected = [("LOADED", "a"), ("EVICTED", "a"), ("LOADED", "b"), ("UPDATED", "b"), ("UPDATED", "b"),
                ("FAILED", "b"), ("UNLOADED", "b"), ("LOADED", "a"), ("EVICTED", "a"), ("REPLACED", "a")]  # fmt: skip
    for kind, name in expected:
        event = await anext(stream)
        assert event.ref is not None
        assert (event.kind.name, event.ref.name) == (kind, name)
    cache.board.events.close()
    with pytest.raises(Unavailable):
        await anext(stream)
    with pytest.raises(Unavailable):
        await anext(cache.board.watch())


async def test_a_slow_watcher_is_sent_away(
    tmp_path: Path, make_adapter: MakeAdapter, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(events, "MAX_BEHIND", 5)
    monkeypatch.setattr(events, "MAX_WATCHERS", 1)
    make_adapter("a")
    cache, _ = make_cache(tmp_path)
    stream = cache.board.watch()
    await anext(stream)
    with pytest.raises(Overloaded, match="watching already"):
        await anext(cache.board.watch())
    await cache.load("a")
    for _ in range(20):
        await cache.pin("a")
    with pytest.raises(Overloaded, match="fresh snapshot"):
        await _read_to_the_end(stream)
    assert (await anext(cache.board.watch())).kind is EventKind.SNAPSHOT


async def test_many_adapters_at_once_send_no_watcher_away(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(events, "MAX_BEHIND", 5)
    cache, _ = make_cache(tmp_path)
    watcher = StoreWatcher(cache, interval=1)
    stream = cache.board.watch()
    assert (await anext(stream)).kind is EventKind.SYNCED
    for index in range(20):
        (tmp_path / f"a{index}").mkdir()
        (tmp_path / f"a{index}" / "adapter_config.json").write_text("{}")
    await watcher.apply(cache.store.scan())
    await watcher.apply(dict.fromkeys(cache.catalog.stored()))
    kinds = Counter([(await anext(stream)).kind for _ in range(40)])
    assert kinds == {EventKind.ADDED: 20, EventKind.REMOVED: 20}


async def test_what_was_evicted_is_seen_without_its_weights(
    tmp_path: Path, make_adapter: MakeAdapter, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in "ab":
        make_adapter(name)
    cache, _ = make_cache(tmp_path, max_bytes=ADAPTER_BYTES + 5000)
    seen = []
    monkeypatch.setattr(cache.memory, "_evicted", lambda ref: seen.append(cache.board.status(ref).adapter))
    await cache.load("a")
    await cache.load("b")
    assert seen == [None]


async def test_a_change_waits_for_room(tmp_path: Path, make_adapter: MakeAdapter) -> None:
    make_adapter("a", seed=1)
    make_adapter("fresh", seed=2, root=tmp_path / "elsewhere")
    async with watched(tmp_path, max_bytes=ADAPTER_BYTES + 5000) as cache:
        async with cache.acquire("a") as old:
            shutil.copytree(tmp_path / "elsewhere" / "fresh", tmp_path / "a", dirs_exist_ok=True)
            await eventually(lambda: "--adapter-host-bytes" in cache.statuses()[0].error)
            assert cache.statuses()[0].adapter is old
        await eventually(lambda: not cache.statuses()[0].error)
        async with cache.acquire("a") as new:
            assert old is not None
            assert new is not None
            assert new.digest != old.digest


async def test_a_folder_that_cannot_be_read_has_not_vanished(
    tmp_path: Path, make_adapter: MakeAdapter, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    folder = make_adapter("a")
    make_adapter("b")
    cache, _ = make_cache(tmp_path)
    good = await cache.load("a", pin=True)
    watcher = StoreWatcher(cache, interval=1)
    with monkeypatch.context() as failing:
        fail_disk(failing, folder, errno.ESTALE)
        for _ in range(3):
            await watcher.look()
        assert names(cache) == ["a@1", "b@1"]
        assert (await cache.get("a")).pinned
        async with cache.acquire("a") as adapter:
            assert adapter is good
        with pytest.raises(Unavailable, match="cannot be read now"):
            await make_cache(tmp_path)[0].get("a")
    assert caplog.text.count("cannot be read and is what it was") == 2, "once by each server"
    assert names(make_cache(tmp_path)[0]) == ["a@1", "b@1"]


async def test_a_change_waits_for_a_disk_that_fails(
    tmp_path: Path, make_adapter: MakeAdapter, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_adapter("a", seed=1)
    cache, _ = make_cache(tmp_path)
    old = await cache.load("a")
    watcher = StoreWatcher(cache, interval=1)
    make_adapter("a", seed=2)
    with monkeypatch.context() as failing:
        fail_disk(failing, folder / "SHA256SUMS", errno.EIO)
        await watcher.look()
        await watcher.look()
    assert cache.statuses()[0].adapter is old
    await watcher.look()
    now = cache.statuses()[0].adapter
    assert now is not None
    assert now.digest != old.digest

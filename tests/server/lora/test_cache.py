"""Host memory of adapters: loading once, using, replacing, unloading, making room."""

import asyncio
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry

from adapters.format import LinearShape
from server.errors import AdapterExists, AdapterNotFound, IncompatibleAdapter, InvalidAdapter, Overloaded
from server.lora.adapter import Adapter
from server.lora.cache import AdapterCache
from server.lora.store import AdapterStore
from server.metrics import Metrics

LAYERS = {f"model.layers.{layer}.self_attn.{name}": LinearShape(64, 64 if name == "q_proj" else 32)
          for layer in range(2) for name in ("q_proj", "v_proj")}  # fmt: skip
ADAPTER_BYTES = 2 * 4 * (64 + 64 + 64 + 32) * 4  # layers · rank · (A and B of q, A and B of v) · float32

MakeAdapter = Callable[..., Path]


def make_cache(root: Path, max_bytes: int = 1 << 30) -> tuple[AdapterCache, list[Adapter]]:
    cache = AdapterCache(
        AdapterStore(root), LAYERS, max_rank=8, max_bytes=max_bytes, metrics=Metrics(CollectorRegistry())
    )
    evicted: list[Adapter] = []

    async def evict(adapter: Adapter) -> int:
        evicted.append(adapter)
        return 5

    cache.connect(evict, lambda adapter: None)
    return cache, evicted


async def test_an_adapter_is_loaded_by_its_first_request_and_once(tmp_path: Path, make_adapter: MakeAdapter) -> None:
    make_adapter("a")
    cache, _ = make_cache(tmp_path)
    assert cache.statuses()[0].adapter is None

    async def use() -> Adapter | None:
        async with cache.acquire("a") as adapter:
            await asyncio.sleep(0)
            return adapter

    first, second = await asyncio.gather(use(), use())
    assert first is not None
    assert first is second
    assert (first.name, first.version, first.generation, first.rank) == ("a", "1", 1, 4)
    assert first.num_bytes == ADAPTER_BYTES == cache.num_bytes
    async with cache.acquire("") as base:
        assert base is None


async def test_a_waiting_request_that_gives_up_does_not_end_the_load(tmp_path: Path, make_adapter: MakeAdapter) -> None:
    make_adapter("a")
    cache, _ = make_cache(tmp_path)

    async def use() -> None:
        async with cache.acquire("a"):
            pass

    first, second = asyncio.create_task(use()), asyncio.create_task(use())
    await asyncio.sleep(0)
    first.cancel()
    await second
    assert first.cancelled()


async def test_replacing_leaves_running_requests_alone(tmp_path: Path, make_adapter: MakeAdapter) -> None:
    make_adapter("a", seed=1)
    cache, evicted = make_cache(tmp_path)
    async with cache.acquire("a") as old:
        shutil.rmtree(tmp_path / "a")
        make_adapter("a", seed=2)
        with pytest.raises(AdapterExists):
            await cache.load("a", "", replace=False)
        new = await cache.load("a", "", replace=True)
        assert old is not None
        assert new.digest != old.digest
        assert new.generation > old.generation
        async with cache.acquire("a") as current:
            assert current is new
        await asyncio.sleep(0)
        assert not evicted
        assert cache.num_bytes == 2 * ADAPTER_BYTES, "the old copy counts until its last request is done"
    await asyncio.sleep(0.01)
    assert evicted == [old]
    assert cache.num_bytes == ADAPTER_BYTES


async def test_a_bad_replacement_changes_nothing(tmp_path: Path, make_adapter: MakeAdapter) -> None:
    make_adapter("a")
    cache, _ = make_cache(tmp_path)
    good = await cache.load("a", "", replace=False)
    (tmp_path / "a" / "adapter_model.safetensors").write_bytes(b"broken")
    with pytest.raises(InvalidAdapter, match="adapter 'a'"):
        await cache.load("a", "", replace=True)
    async with cache.acquire("a") as adapter:
        assert adapter is good
    assert cache.statuses()[0].error


async def test_unload_refuses_new_requests_and_waits_for_running_ones(
    tmp_path: Path, make_adapter: MakeAdapter
) -> None:
    make_adapter("a")
    cache, evicted = make_cache(tmp_path)
    async with cache.acquire("a") as adapter:
        unloading = asyncio.create_task(cache.unload("a"))
        await asyncio.sleep(0.01)
        assert not unloading.done()
        with pytest.raises(AdapterNotFound):
            async with cache.acquire("a"):
                pass
        assert cache.statuses() == []
    freed = await unloading
    assert (freed.device, freed.host) == (5, ADAPTER_BYTES)
    assert evicted == [adapter]
    assert cache.num_bytes == 0
    with pytest.raises(AdapterNotFound):
        await cache.unload("a")
    await cache.load("a", "", replace=False)
    async with cache.acquire("a") as again:
        assert again is not adapter


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
                async with cache.acquire("b"):
                    pass
    async with cache.acquire("b"):
        pass


async def test_a_source_folder_under_another_name(tmp_path: Path, make_adapter: MakeAdapter) -> None:
    make_adapter("a")
    cache, _ = make_cache(tmp_path)
    await cache.load("alias", "a", replace=False)
    async with cache.acquire("alias") as alias, cache.acquire("a") as adapter:
        assert alias is not None
        assert adapter is not None
        assert alias.digest == adapter.digest
        assert alias is not adapter
    assert [status.ref.name for status in cache.statuses()] == ["a", "alias"]


async def test_errors_say_why_and_are_not_remembered_for_ever(tmp_path: Path, make_adapter: MakeAdapter) -> None:
    make_adapter("a", r=16)
    cache, _ = make_cache(tmp_path)
    with pytest.raises(IncompatibleAdapter, match="--max-lora-rank 16"):
        await cache.load("a", "", replace=False)
    assert "--max-lora-rank 16" in cache.statuses()[0].error
    shutil.rmtree(tmp_path / "a")
    make_adapter("a")
    async with cache.acquire("a"):
        assert cache.statuses()[0].error == ""


async def test_one_version_can_be_unloaded(tmp_path: Path, make_adapter: MakeAdapter) -> None:
    for version in "12":
        make_adapter(version, root=tmp_path / "a")
    cache, _ = make_cache(tmp_path)
    await cache.load("a@1", "", replace=False)
    await cache.unload("a@1")
    async with cache.acquire("a") as adapter:
        assert adapter is not None
        assert adapter.version == "2"
    with pytest.raises(AdapterNotFound):
        async with cache.acquire("a@1"):
            pass


async def test_unloading_catches_a_load_in_flight(tmp_path: Path, make_adapter: MakeAdapter) -> None:
    make_adapter("a")
    cache, _ = make_cache(tmp_path)

    async def use() -> None:
        async with cache.acquire("a"):
            pass

    using = asyncio.create_task(use())
    await asyncio.sleep(0)
    await cache.unload("a")
    with pytest.raises(AdapterNotFound):
        await using
    assert cache.num_bytes == 0
    await cache.load("a", "", replace=False)


async def test_concurrent_loads_keep_the_limit(tmp_path: Path, make_adapter: MakeAdapter) -> None:
    for name in "abcd":
        make_adapter(name)
    cache, _ = make_cache(tmp_path, max_bytes=2 * ADAPTER_BYTES + 5000)
    results = await asyncio.gather(*[cache.load(name, "", replace=False) for name in "abcd"], return_exceptions=True)
    assert cache.num_bytes <= 2 * ADAPTER_BYTES + 5000
    assert any(isinstance(result, Adapter) for result in results)


async def test_a_replacement_from_the_store_forgets_the_other_source(tmp_path: Path, make_adapter: MakeAdapter) -> None:
    make_adapter("a", seed=1)
    make_adapter("b", seed=2)
    cache, _ = make_cache(tmp_path, max_bytes=ADAPTER_BYTES + 5000)
    await cache.load("a", "b", replace=False)
    own = await cache.load("b", "", replace=False)
    replaced = await cache.load("a", "", replace=True)
    assert replaced.digest != own.digest
    async with cache.acquire("b"):
        pass
    async with cache.acquire("a") as again:
        assert again is not None
        assert again.digest == replaced.digest

"""Adapters by name: loading once, using, replacing, unloading."""

import asyncio
import shutil
from pathlib import Path
from typing import Any

import pytest

import adapters.format
from server.errors import (
    AdapterChanged,
    AdapterExists,
    AdapterInUse,
    AdapterNotFound,
    DamagedAdapter,
    IncompatibleAdapter,
    InvalidAdapter,
)
from server.lora.adapter import Adapter
from server.lora.host_copy import FreedBytes, HostCopy
from server.lora.unload_mode import UnloadMode
from tests.server.lora.conftest import ADAPTER_BYTES, MakeAdapter, make_cache


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
            await cache.load("a")
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
    good = await cache.load("a")
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
    await cache.load("a")
    async with cache.acquire("a") as again:
        assert again is not adapter


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
        await cache.load("a")
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


async def test_loading_one_version_brings_back_no_other(tmp_path: Path, make_adapter: MakeAdapter) -> None:
    for version in "123":
        make_adapter(version, root=tmp_path / "a")
    cache, _ = make_cache(tmp_path)
    await cache.unload("a")
    await cache.load("a@2")
    assert [str(status.ref) for status in cache.statuses()] == ["a@2"]
    async with cache.acquire("a") as adapter:
        assert adapter.version == "2"
    with pytest.raises(AdapterNotFound):
        async with cache.acquire("a@3"):
            pass
    await cache.unload("a")
    assert (await cache.load("a")).version == "3", "with all of them taken away a bare name is the newest"
    await cache.unload("a@3")
    assert (await cache.load("a@1")).version == "1"
    async with cache.acquire("a") as adapter:
        assert adapter.version == "1"


async def test_a_version_that_comes_after_an_unload_is_served(tmp_path: Path, make_adapter: MakeAdapter) -> None:
    make_adapter("1", root=tmp_path / "a")
    cache, _ = make_cache(tmp_path)
    await cache.unload("a")
    make_adapter("2", root=tmp_path / "a")
    async with cache.acquire("a") as adapter:
        assert adapter.version == "2"
    assert [str(status.ref) for status in cache.statuses()] == ["a@2"]


async def test_another_folder_does_not_take_a_name_that_has_just_appeared(
    tmp_path: Path, make_adapter: MakeAdapter
) -> None:
    make_adapter("b")
    cache, _ = make_cache(tmp_path)
    make_adapter("a")
    for expected_generation in (None, 0):
        with pytest.raises(AdapterExists):
            await cache.load("a", "b", expected_generation=expected_generation)
    await cache.load("a", "b", replace=True, expected_generation=0)


async def test_a_compare_and_swap_against_a_requests_load(
    tmp_path: Path, make_adapter: MakeAdapter, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_adapter("a")
    cache, _ = make_cache(tmp_path)
    load = cache.loader.load

    async def load_after_a_request(*args: Any, **kwargs: Any) -> HostCopy:
        copy = await load(*args, **kwargs)
        monkeypatch.undo()
        async with cache.acquire("a"):
            return copy

    monkeypatch.setattr(cache.loader, "load", load_after_a_request)
    with pytest.raises(AdapterChanged, match="somebody else"):
        await cache.load("a", expected_generation=0)


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
    await cache.load("a")


async def test_a_replacement_from_the_store_forgets_the_other_source(tmp_path: Path, make_adapter: MakeAdapter) -> None:
    make_adapter("a", seed=1)
    make_adapter("b", seed=2)
    cache, _ = make_cache(tmp_path, max_bytes=ADAPTER_BYTES + 5000)
    await cache.load("a", "b", replace=True)
    own = await cache.load("b", "", replace=False)
    replaced = await cache.load("a", "", replace=True)
    assert replaced.digest != own.digest
    async with cache.acquire("b"):
        pass
    async with cache.acquire("a") as again:
        assert again is not None
        assert again.digest == replaced.digest


async def test_a_compare_and_swap(tmp_path: Path, make_adapter: MakeAdapter) -> None:
    make_adapter("a")
    cache, _ = make_cache(tmp_path)
    first = await cache.load("a", expected_generation=0)
    for lost in (0, first.generation + 1):
        with pytest.raises(AdapterChanged, match="somebody else"):
            await cache.load("a", expected_generation=lost)
    results = await asyncio.gather(
        *[cache.load("a", expected_generation=first.generation) for _ in range(4)], return_exceptions=True
    )
    assert [type(result) for result in results] == [Adapter, AdapterChanged, AdapterChanged, AdapterChanged]


async def test_two_claims_on_a_free_name(tmp_path: Path, make_adapter: MakeAdapter) -> None:
    make_adapter("a")
    cache, _ = make_cache(tmp_path)
    results = await asyncio.gather(*[cache.load("a") for _ in range(3)], return_exceptions=True)
    assert [type(result) for result in results] == [Adapter, AdapterExists, AdapterExists]


async def test_the_base_models_name_is_taken(tmp_path: Path, make_adapter: MakeAdapter) -> None:
    make_adapter("base")
    cache, _ = make_cache(tmp_path, reserved=frozenset({"base"}))
    with pytest.raises(AdapterExists, match="base model"):
        await cache.load("base", replace=True)
    with pytest.raises(AdapterNotFound):
        async with cache.acquire("base"):
            pass
    assert cache.statuses() == []


async def test_unload_if_idle(tmp_path: Path, make_adapter: MakeAdapter) -> None:
    make_adapter("a")
    cache, _ = make_cache(tmp_path)
    async with cache.acquire("a"):
        with pytest.raises(AdapterInUse, match="used by 1"):
            await cache.unload("a", UnloadMode.IF_IDLE)
    assert (await cache.unload("a", UnloadMode.IF_IDLE)).host == ADAPTER_BYTES


async def test_unload_by_force_ends_what_is_draining_too(tmp_path: Path, make_adapter: MakeAdapter) -> None:
    make_adapter("a")
    revoked: list[Adapter] = []
    cache, _ = make_cache(tmp_path, revoke=revoked.append)
    async with cache.acquire("a") as adapter:
        draining = asyncio.create_task(cache.unload("a"))
        await asyncio.sleep(0)
        forced = asyncio.create_task(cache.unload("a", UnloadMode.FORCE))
        await asyncio.sleep(0)
        assert revoked == [adapter]
    assert (await forced).host == (await draining).host == ADAPTER_BYTES
    with pytest.raises(AdapterNotFound):
        await cache.unload("a", UnloadMode.FORCE)


async def test_a_copy_that_is_leaving_the_device_is_not_revoked(tmp_path: Path, make_adapter: MakeAdapter) -> None:
    """The engine would remember it for ever: its Evict is on the way already."""
    make_adapter("a")
    cache, _ = make_cache(tmp_path)
    leave = asyncio.Event()
    revoked: list[Adapter] = []

    async def evict(adapter: Adapter, makes_room: bool) -> FreedBytes:
        await leave.wait()
        return FreedBytes(0, 0)

    cache.connect(evict, revoked.append)
    await cache.load("a")
    unloads = [asyncio.create_task(cache.unload("a", mode)) for mode in (UnloadMode.DRAIN, UnloadMode.FORCE)]
    await asyncio.sleep(0.01)
    leave.set()
    await asyncio.gather(*unloads)
    assert revoked == []


async def test_requests_that_wait_for_a_load_are_told(tmp_path: Path, make_adapter: MakeAdapter) -> None:
    make_adapter("a")
    cache, _ = make_cache(tmp_path)

    async def use() -> None:
        async with cache.acquire("a"):
            await asyncio.sleep(0.01)

    users = [asyncio.create_task(use()) for _ in range(3)]
    for _ in range(3):  # each begins to wait
        await asyncio.sleep(0)
    assert (await cache.get("a")).num_waiting == 3
    async with cache.acquire("a"):
        status = await cache.get("a")
    assert (status.num_waiting, status.num_users) == (0, 4)
    await asyncio.gather(*users)


async def test_a_folder_that_has_gone(tmp_path: Path, make_adapter: MakeAdapter) -> None:
    for name in "ab":
        make_adapter(name)
    cache, _ = make_cache(tmp_path)
    await cache.load("a")
    for name in "ab":
        shutil.rmtree(tmp_path / name)
    async with cache.acquire("a"):  # the copy in memory serves
        pass
    with pytest.raises(AdapterNotFound):
        async with cache.acquire("b"):
            pass


async def test_files_that_change_under_the_reading(
    tmp_path: Path, make_adapter: MakeAdapter, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_adapter("a")
    cache, _ = make_cache(tmp_path)
    good = await cache.load("a")
    read_file = adapters.format._read_file

    def read_and_change(path: Path, max_bytes: int) -> bytes:
        data = read_file(path, max_bytes)
        path.write_bytes(data + b" ")
        return data

    monkeypatch.setattr(adapters.format, "_read_file", read_and_change)
    with pytest.raises(AdapterChanged, match="while they were read"):
        await cache.load("a", replace=True)
    monkeypatch.undo()
    async with cache.acquire("a") as adapter:
        assert adapter is good
    assert folder.is_dir()


async def test_a_published_adapter_that_is_damaged(tmp_path: Path, make_adapter: MakeAdapter) -> None:
    folder = make_adapter("a")
    names = ("adapter_config.json", "adapter_model.safetensors")
    (folder / "SHA256SUMS").write_text("".join(f"{'0' * 64}  {name}\n" for name in names))
    cache, _ = make_cache(tmp_path)
    with pytest.raises(DamagedAdapter, match="not what was published"):
        await cache.load("a")
    assert "SHA256SUMS" in cache.statuses()[0].error


async def test_refused_names_that_nobody_has_are_not_remembered(tmp_path: Path, make_adapter: MakeAdapter) -> None:
    make_adapter("bad", r=16)
    cache, _ = make_cache(tmp_path)
    for name in ("x", "y"):
        with pytest.raises(IncompatibleAdapter):
            await cache.load(name, "bad")
    assert [status.ref.name for status in cache.statuses()] == ["bad"]

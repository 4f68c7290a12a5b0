"""Which version a bare name means."""

import asyncio
import contextlib
from collections import Counter
from pathlib import Path

import pytest

from server.errors import AdapterNotFound, DamagedAdapter, IncompatibleAdapter, InvalidRequest
from server.lora.catalog import AdapterCatalog
from server.lora.router import AdapterRouter
from server.lora.routing import Routing
from server.lora.store import AdapterRef, AdapterStore
from server.lora.watcher import StoreWatcher
from tests.server.lora.conftest import ADAPTER_BYTES, MakeAdapter, make_cache


def test_shares_are_kept_and_labels_stick() -> None:
    labels = [f"request-{index}" for index in range(4000)]
    small, large = Routing("1", {"2": 10, "3": 5}), Routing("1", {"2": 30, "3": 5})
    drawn = {label: small.draw("a", label) for label in labels}
    assert drawn == {label: small.draw("a", label) for label in labels}
    counts = Counter(drawn.values())
    assert counts["2"] / len(labels) == pytest.approx(0.10, abs=0.02)
    assert counts["3"] / len(labels) == pytest.approx(0.05, abs=0.02)
    assert all(large.draw("a", label) == "2" for label in labels if drawn[label] == "2")
    assert drawn != {label: small.draw("b", label) for label in labels}, "names draw apart"


def test_without_a_label_chance_draws() -> None:
    drawn = Counter(Routing("1", {"2": 50}).draw("a", "") for _ in range(2000))
    assert drawn["2"] / 2000 == pytest.approx(0.5, abs=0.06)
    assert Routing("1").draw("a", "") is None
    assert {Routing("1", {"2": 100}).draw("a", str(index)) for index in range(200)} == {"2"}


async def test_promote_and_roll_back(tmp_path: Path, make_adapter: MakeAdapter) -> None:
    for version in "12":
        make_adapter(version, seed=int(version), root=tmp_path / "a")
    cache, _ = make_cache(tmp_path)
    router = AdapterRouter(cache)

    async def served() -> str:
        async with cache.acquire("a") as adapter:
            assert adapter is not None
            return adapter.version

    assert await served() == "2"
    status = await router.promote("a", "1")
    assert (status.ref.version, status.current) == ("1", True)
    assert await served() == "1"
    make_adapter("3", root=tmp_path / "a")
    await cache.look("a")
    assert await served() == "1", "a promoted version stays until another is promoted"
    assert AdapterCatalog(AdapterStore(tmp_path)).current("a") == "1", "and outlives the server"
    assert (await router.promote("a", "")).ref.version == "3"


async def test_what_cannot_be_served_is_not_promoted(tmp_path: Path, make_adapter: MakeAdapter) -> None:
    make_adapter("1", root=tmp_path / "a")
    make_adapter("2", root=tmp_path / "a", r=16)
    cache, _ = make_cache(tmp_path)
    router = AdapterRouter(cache)
    await router.promote("a", "1")
    with pytest.raises(IncompatibleAdapter):
        await router.promote("a", "2")
    assert (await cache.get("a")).ref.version == "1"
    for name, version, kind in (("a", "9", AdapterNotFound), ("b", "1", AdapterNotFound), ("b", "", AdapterNotFound),
                                ("a@1", "1", InvalidRequest), ("a", "x", InvalidRequest)):  # fmt: skip
        with pytest.raises(kind):
            await router.promote(name, version)


async def test_shares_keep_the_promotion_of_another_server(tmp_path: Path, make_adapter: MakeAdapter) -> None:
    for version in "12":
        make_adapter(version, root=tmp_path / "a")
    here, there = (AdapterRouter(make_cache(tmp_path)[0]) for _ in range(2))
    await there.promote("a", "1")
    statuses = await here.set_traffic("a", {"2": 10})
    assert [status.current for status in statuses] == [True, False]
    (tmp_path / "a" / "routing.json").write_text("{")
    with pytest.raises(DamagedAdapter):
        await here.set_traffic("a", {"2": 20})
    assert (await there.promote("a", "2")).current


async def test_a_promotion_that_waits_for_room_locks_no_name(tmp_path: Path, make_adapter: MakeAdapter) -> None:
    make_adapter("1", root=tmp_path / "a")
    make_adapter("used")
    cache, _ = make_cache(tmp_path, max_bytes=ADAPTER_BYTES)
    async with cache.acquire("used"):
        promoting = asyncio.create_task(AdapterRouter(cache).promote("a", "1"))
        while not (await cache.get("a")).num_waiting:
            await asyncio.sleep(0.005)
        assert not cache.claims.changing("a").locked()
    assert (await promoting).current


async def test_a_share_of_the_traffic(tmp_path: Path, make_adapter: MakeAdapter) -> None:
    for version in "12":
        make_adapter(version, seed=int(version), root=tmp_path / "a")
    cache, _ = make_cache(tmp_path)
    router = AdapterRouter(cache)
    await router.promote("a", "1")
    statuses = await router.set_traffic("a", {"2": 40, "1": 0})
    assert [(status.ref.version, status.traffic_percent) for status in statuses] == [("1", 0), ("2", 40)]
    drawn = {}
    for index in range(100):
        async with cache.acquire("a", label=str(index)) as adapter:
            assert adapter is not None
            drawn[str(index)] = adapter.version
    assert 20 < Counter(drawn.values())["2"] < 60
    restarted = AdapterCatalog(AdapterStore(tmp_path))
    assert all(restarted.resolve("a", label).version == version for label, version in drawn.items())
    async with cache.acquire("a@1", label=next(label for label in drawn if drawn[label] == "2")) as adapter:
        assert adapter is not None
        assert adapter.version == "1", "who names a version gets it"
    await cache.unload("a@2")
    assert {cache.catalog.resolve("a", label).version for label in drawn} == {"1"}, "a share without a version ends"
    for percents in ({"2": 101}, {"1": 60, "2": 41}):
        with pytest.raises(InvalidRequest, match="100 per cent"):
            await router.set_traffic("a", percents)
    with pytest.raises(AdapterNotFound):
        await router.set_traffic("a", {"7": 1})


async def test_a_broken_newest_version_takes_no_name_down(tmp_path: Path, make_adapter: MakeAdapter) -> None:
    """It is refused, and told as that; the name means the version before, until the files are others."""
    make_adapter("1", root=tmp_path / "a")
    cache, _ = make_cache(tmp_path)
    good = await cache.load("a")
    make_adapter("2", root=tmp_path / "a", r=16)
    await cache.look("a")
    assert cache.catalog.current("a") == "2"
    stream = cache.board.watch()
    while (await anext(stream)).ref is not None:
        pass
    for _ in range(2):
        async with cache.acquire("a") as adapter:
            assert adapter is good
    told = [await anext(stream) for _ in range(2)]
    assert [(event.kind.name, str(event.ref)) for event in told] == [("FAILED", "a@2"), ("UPDATED", "a@1")]
    first, second = cache.statuses()
    assert (first.current, first.error, second.current, "--max-lora-rank" in second.error) == (True, "", False, True)
    with pytest.raises(IncompatibleAdapter):
        async with cache.acquire("a@2"):
            pass
    make_adapter("2", root=tmp_path / "a")
    await StoreWatcher(cache, interval=1).apply(cache.store.scan())
    async with cache.acquire("a") as adapter:
        assert adapter.version == "2"


async def test_with_all_versions_broken_the_newest_says_why(tmp_path: Path, make_adapter: MakeAdapter) -> None:
    for version, rank in (("1", 9), ("2", 16)):
        make_adapter(version, root=tmp_path / "a", r=rank)
    cache, _ = make_cache(tmp_path)
    for _ in range(2):
        with pytest.raises(IncompatibleAdapter, match="--max-lora-rank 16"):
            async with cache.acquire("a"):
                pass


async def test_files_that_were_refused_are_not_read_again(
    tmp_path: Path, make_adapter: MakeAdapter, opened: list[str]
) -> None:
    folder = make_adapter("a", r=16)
    cache, _ = make_cache(tmp_path)

    async def is_read(refused: bool = True) -> bool:
        opened.clear()
        with pytest.raises(IncompatibleAdapter) if refused else contextlib.nullcontext():
            async with cache.acquire("a"):
                pass
        return str(folder / "adapter_config.json") in opened

    assert await is_read()
    assert not await is_read()
    (folder / "adapter_config.json").touch()
    assert await is_read()
    make_adapter("a")
    assert await is_read(refused=False)


async def test_a_share_goes_only_to_versions_that_are_served(tmp_path: Path, make_adapter: MakeAdapter) -> None:
    for version, rank in (("1", 4), ("2", 16), ("3", 4)):
        make_adapter(version, root=tmp_path / "a", r=rank)
    cache, _ = make_cache(tmp_path, max_bytes=ADAPTER_BYTES + 5000)
    router = AdapterRouter(cache)
    await router.promote("a", "1")
    with pytest.raises(IncompatibleAdapter, match="--max-lora-rank"):
        await router.set_traffic("a", {"3": 10, "2": 10})
    assert cache.catalog.routing("a").percent_by_version == {}
    await router.set_traffic("a", {"3": 100})
    async with cache.acquire("a", label="x") as adapter:
        assert adapter.version == "3"
    await cache.loads.copy(AdapterRef("a", "1"))
    (tmp_path / "a" / "3" / "adapter_config.json").write_text("{")
    async with cache.acquire("a", label="x") as adapter:
        assert adapter.version == "1", "a share whose version broke since is the rest's"

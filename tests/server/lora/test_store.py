"""Names on disk: what is found, which version is meant, and what never becomes a path."""

import os
import shutil
from itertools import pairwise
from pathlib import Path

import pytest

from server.errors import AdapterNotFound, DamagedAdapter, InvalidRequest
from server.lora.catalog import AdapterCatalog
from server.lora.fingerprint import fingerprint
from server.lora.routing import Routing
from server.lora.store import AdapterRef, AdapterStore, parse_reference
from server.lora.stored_name import StoredName, list_name

MANY = 10_000


def put(folder: Path) -> None:
    folder.mkdir(parents=True)
    (folder / "adapter_config.json").write_text("{}")


@pytest.fixture
def store(tmp_path: Path) -> AdapterStore:
    root = tmp_path / "store"
    put(root / "flat")
    put(root / "many" / "2")
    put(root / "many" / "10")
    (root / "many" / "11").mkdir()  # no adapter in it yet
    (root / "empty").mkdir()
    put(root / ".hidden")
    put(tmp_path / "outside")
    (root / "link").symlink_to(tmp_path / "outside")
    return AdapterStore(root)


def test_scan_finds_every_version(store: AdapterStore) -> None:
    found = store.scan()
    assert {name: sorted(stored.versions) for name, stored in found.items()} == {"flat": ["1"], "many": ["10", "2"]}
    assert found["many"].newest == "10"


def test_a_missing_folder_is_an_empty_store_until_it_is_there(tmp_path: Path) -> None:
    assert AdapterCatalog(AdapterStore(tmp_path / "nowhere")).refs() == []
    with pytest.raises(FileNotFoundError):
        AdapterStore(tmp_path / "nowhere").scan()


def test_where_versions_lie(store: AdapterStore) -> None:
    put(store.root / "flat" / "2")
    catalog = AdapterCatalog(store)
    assert catalog.path(catalog.resolve("flat@1")) == store.root / "flat"
    assert catalog.path(catalog.resolve("flat")) == store.root / "flat" / "2"
    assert catalog.path(catalog.resolve("many")) == store.root / "many" / "10"
    assert catalog.path(catalog.resolve("many@2")) == store.root / "many" / "2"


@pytest.mark.parametrize("reference", ["nobody", "many@3", "many@11", "flat@2", "link", "empty"])
def test_what_is_not_there_is_not_found(store: AdapterStore, reference: str) -> None:
    with pytest.raises(AdapterNotFound):
        AdapterCatalog(store).resolve(reference)


def test_a_reserved_name_is_nobodys(store: AdapterStore) -> None:
    assert set(AdapterStore(store.root, reserved=frozenset({"flat"})).scan()) == {"many"}


@pytest.mark.parametrize(
    "name",
    ["", " ", "..", ".", "a/../b", "/etc/passwd", "a/", " ..", "%2e%2e", "-a", "a" * 129, "naïve", "а", "a\nb", "a\0",
     "a@", "CON", "nul", "aux.1", "a@" + "1" * 300, "a@x", "a@1@2", "a@²", "a b", "\x1b[31m"],
)  # fmt: skip
def test_names_that_are_none(name: str) -> None:
    with pytest.raises(InvalidRequest, match="is no adapter name"):
        parse_reference(name)


def test_names_that_are() -> None:
    assert parse_reference("tenant-7.support_v2") == ("tenant-7.support_v2", None)
    assert parse_reference("a@12") == ("a", "12")


@pytest.mark.parametrize(
    "source",
    ["../outside", "/etc", "/dev/zero", "link", "flat/../../outside", "a\0b", "loop", "pipe", "nowhere", ".hidden",
     "x" * 300, "file:///etc", "http://169.254.169.254/x", "flat/adapter_config.json"],
)  # fmt: skip
def test_sources_that_are_no_folder_inside(store: AdapterStore, source: str) -> None:
    (store.root / "loop").symlink_to(store.root / "loop")
    os.mkfifo(store.root / "pipe")
    with pytest.raises(InvalidRequest, match="--adapters-dir"):
        store.source(source)


def test_a_source_is_where_its_links_lead(store: AdapterStore) -> None:
    (store.root / "alias").symlink_to(store.root / "flat")
    assert store.source("alias") == store.root / "flat"


def test_files_that_change_change_the_fingerprint(store: AdapterStore) -> None:
    folder = store.root / "flat"
    seen = {fingerprint(folder)}
    (folder / "adapter_model.safetensors").write_bytes(b"1")
    seen.add(fingerprint(folder))
    (folder / "adapter_model.safetensors").write_bytes(b"12")
    seen.add(fingerprint(folder))
    (folder / "new").write_text("{}")
    (folder / "new").rename(folder / "adapter_config.json")
    seen.add(fingerprint(folder))
    assert len(seen) == 4
    assert fingerprint(store.root / "empty") is None


@pytest.fixture
def listed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Folders of names, each time one is listed by a store."""
    folders: list[str] = []

    def listing(folder: str) -> StoredName | None:
        folders.append(folder)
        return list_name(folder)

    monkeypatch.setattr("server.lora.store.list_name", listing)
    return folders


def test_an_unchanged_folder_is_not_listed_again_and_no_change_is_missed(
    store: AdapterStore, listed: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = store.root / "flat"
    monkeypatch.setattr("server.lora.store._CLOCK_TICK_NS", 0)

    def look() -> StoredName | None:
        found = store.look("flat")
        assert found == list_name(str(folder))
        return found

    seen = [look()]
    assert look() == seen[0]
    assert len(listed) == 1
    (folder / "adapter_model.safetensors").write_bytes(b"1")
    seen.append(look())
    (folder / "adapter_model.safetensors").write_bytes(b"12")
    seen.append(look())
    assert len(listed) == 2, "once more, since a file was added"
    (folder / "2").mkdir()
    assert look() == seen[-1], "a version that is not there yet"
    (folder / "2" / "adapter_config.json").write_text("{}")
    seen.append(look())
    shutil.rmtree(folder / "2")
    store.change_routing("flat", lambda _: Routing("1"))
    seen.append(look())
    (folder / "routing.json").unlink()
    (folder / "adapter_config.json").unlink()
    seen.append(look())
    assert seen[-1] is None
    assert all(before != after for before, after in pairwise(seen))


def test_a_folder_that_changed_a_moment_ago_is_listed_again(store: AdapterStore, listed: list[str]) -> None:
    """A file system's clock may have too few ticks to tell another change from that one."""
    assert store.look("flat") == store.look("flat")
    assert len(listed) == 2


def test_routing_is_kept_and_a_broken_one_means_nothing(store: AdapterStore, caplog: pytest.LogCaptureFixture) -> None:
    routing = Routing("2", {"10": 25})
    store.change_routing("many", lambda _: routing)
    assert store.scan()["many"].routing == routing
    assert AdapterCatalog(store).current("many") == "2"
    assert list((store.root / ".publish").iterdir()) == []
    known = AdapterCatalog(store)
    for text in ("{", "[]", "[" * 60_000, '{"promoted": "%s", "percent_by_version": {}}' % ("9" * 5000),
                 '{"promoted": "", "percent_by_version": {"%s": 1}}' % ("9" * 5000),
                 '{"promoted": "2"}', '{"promoted": "x", "percent_by_version": {}}',
                 '{"promoted": "", "percent_by_version": {"2": 101}}',
                 '{"promoted": "", "percent_by_version": {"2": "1"}}',
                 '{"promoted": "", "percent_by_version": {"2": 60, "3": 60}}'):  # fmt: skip
        (store.root / "many" / "routing.json").write_text(text)
        caplog.clear()
        assert store.scan()["many"].routing is None
        assert "routing.json cannot be read" in caplog.text
        assert len(caplog.text) < 1000
        with pytest.raises(DamagedAdapter, match="name one, or promote one"):
            AdapterCatalog(store).resolve("many")
        assert AdapterCatalog(store).resolve("many@10").version == "10"
        known.update(store.scan())
        assert known.current("many") == "2", "a server that knew it goes on"


def test_many_adapters_are_an_index(tmp_path: Path, opened: list[str]) -> None:
    """One look into each folder and no file opened; once read, names and pages of the listing need the disk no more."""
    root = tmp_path / "store"
    for index in range(MANY):
        put(root / f"adapter-{index}")
    opened.clear()
    catalog = AdapterCatalog(AdapterStore(root))
    assert len(opened) == len(set(opened)) == MANY + 1
    assert {os.path.basename(path).partition("-")[0] for path in opened} == {"store", "adapter"}
    root.rename(tmp_path / "away")
    page = catalog.refs(limit=100)
    assert len(page) == 100
    assert catalog.refs(after=page[-1], limit=100)[0] not in page
    assert len(catalog.refs()) == MANY
    assert catalog.resolve("adapter-999") == AdapterRef("adapter-999", "1")

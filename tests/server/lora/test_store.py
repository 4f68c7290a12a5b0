"""Names on disk: what is found, which version is meant, and what never becomes a path."""

from pathlib import Path

import pytest

from server.errors import AdapterNotFound, InvalidRequest
from server.lora.store import AdapterRef, AdapterStore, parse_reference


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


def test_scan_finds_the_newest_version_of_each(store: AdapterStore) -> None:
    assert store.scan() == [AdapterRef("flat", "1"), AdapterRef("many", "10")]


def test_a_missing_folder_is_an_empty_store(tmp_path: Path) -> None:
    assert AdapterStore(tmp_path / "nowhere").scan() == []


def test_find(store: AdapterStore) -> None:
    assert store.path(store.find("flat", None)) == store.root / "flat"
    assert store.path(store.find("flat", "1")) == store.root / "flat"
    assert store.path(store.find("many", None)) == store.root / "many" / "10"
    assert store.path(store.find("many", "2")) == store.root / "many" / "2"


@pytest.mark.parametrize(
    ("name", "version"),
    [("nobody", None), ("many", "3"), ("many", "11"), ("flat", "2"), ("link", None), ("empty", None)],
)
def test_what_is_not_there_is_not_found(store: AdapterStore, name: str, version: str | None) -> None:
    with pytest.raises(AdapterNotFound):
        store.find(name, version)


@pytest.mark.parametrize(
    "name",
    ["", " ", "..", ".", "a/../b", "/etc/passwd", "a/", " ..", "%2e%2e", "-a", "a" * 129, "naïve", "а", "a\nb", "a\0",
     "a@", "a@" + "1" * 300, "a@x", "a@1@2", "a@²", "a b", "\x1b[31m"],
)  # fmt: skip
def test_names_that_are_none(name: str) -> None:
    with pytest.raises(InvalidRequest, match="is no adapter name"):
        parse_reference(name)


def test_names_that_are() -> None:
    assert parse_reference("tenant-7.support_v2") == ("tenant-7.support_v2", None)
    assert parse_reference("a@12") == ("a", "12")


@pytest.mark.parametrize("source", ["../outside", "/etc", "link", "flat/../../outside", "a\0b"])
def test_sources_outside_the_folder_are_refused(store: AdapterStore, source: str) -> None:
    with pytest.raises(InvalidRequest, match="--adapters-dir"):
        store.source(source)

"""Publication into the store: whole or not at all, whatever is killed, full, or wrong on the way."""

import contextlib
import hashlib
import os
import resource
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from server.errors import AdapterExists, DamagedAdapter, InvalidRequest, Overloaded, StoreNotWritable
from server.lora.digests import SUMS_FILE, check_sums
from server.lora.publish import DeclaredFile, Publication, check_declaration, remove_leftovers
from server.lora.routing import Routing
from server.lora.store import AdapterRef, AdapterStore
from tests.killed import roots_of_killed

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
CONTENT = {CONFIG: b'{"peft_type": "LORA"}', WEIGHTS: bytes(range(256)) * 8}


def declared(content: dict[str, bytes]) -> list[DeclaredFile]:
    return [DeclaredFile(name, len(data), hashlib.sha256(data).hexdigest()) for name, data in content.items()]


def publish(store: AdapterStore, name: str, version: str | None = None) -> AdapterRef:
    publication = Publication(store, declared(CONTENT))
    try:
        publication.open()
        for file, data in CONTENT.items():
            publication.write(file, 0, data[:10])
            publication.write(file, 10, data[10:])
        publication.complete()
        return publication.publish(name, version)
    finally:
        publication.close()


def assert_whole(folder: Path) -> None:
    check_sums(folder, {})
    assert {path.name for path in folder.iterdir()} == {CONFIG, WEIGHTS, SUMS_FILE}
    assert all((folder / name).read_bytes() == data for name, data in CONTENT.items())


def scratch(store: AdapterStore) -> list[Path]:
    return list((store.root / ".publish").iterdir())


def test_versions_follow_one_another(tmp_path: Path) -> None:
    store = AdapterStore(tmp_path / "store")
    assert [publish(store, "a").version for _ in range(3)] == ["1", "2", "3"]
    assert publish(store, "a", "7").version == "7"
    assert publish(store, "a").version == "8"
    for version in "12378":
        assert_whole(store.root / "a" / version)
    with pytest.raises(AdapterExists, match="never changes"):
        publish(store, "a", "7")
    assert scratch(store) == []


def test_the_last_version_has_no_successor(tmp_path: Path) -> None:
    store = AdapterStore(tmp_path)
    publish(store, "a", "999999999")
    with pytest.raises(StoreNotWritable, match="name a version"):
        publish(store, "a")
    assert publish(store, "a", "5").version == "5"


def test_a_folder_in_the_way_is_named(tmp_path: Path) -> None:
    (tmp_path / "a" / "1" / "notes").mkdir(parents=True)
    with pytest.raises(StoreNotWritable, match=f"{tmp_path}/a/1 cannot be written: Directory not empty"):
        publish(AdapterStore(tmp_path), "a")


def test_a_flat_adapter_gets_its_second_version(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / CONFIG).write_bytes(b"{}")
    store = AdapterStore(tmp_path)
    assert publish(store, "a").version == "2"
    assert set(store.scan()["a"].versions) == {"1", "2"}


def test_the_digests_are_those_of_sha256sum(tmp_path: Path) -> None:
    publish(AdapterStore(tmp_path), "a")
    subprocess.run(["sha256sum", "--check", "--strict", SUMS_FILE], cwd=tmp_path / "a" / "1", check=True)


@pytest.mark.parametrize(
    "damage",
    [
        lambda folder: (folder / WEIGHTS).write_bytes(CONTENT[WEIGHTS][:-1] + b"\0"),
        lambda folder: (folder / WEIGHTS).write_bytes(CONTENT[WEIGHTS][:-1]),
        lambda folder: (folder / WEIGHTS).unlink(),
        lambda folder: (folder / CONFIG).write_bytes(b"{}"),
        lambda folder: (folder / SUMS_FILE).write_bytes(b"nonsense"),
        lambda folder: (folder / SUMS_FILE).write_bytes(b"\xff"),
        lambda folder: (folder / SUMS_FILE).symlink_to((folder / SUMS_FILE).rename(folder / "elsewhere")),
        lambda folder: (folder / SUMS_FILE).write_text(f"{'0' * 64}  ../../secret\n"),
    ],
)
def test_damage_is_found(tmp_path: Path, damage: Callable[[Path], object]) -> None:
    publish(AdapterStore(tmp_path), "a")
    damage(tmp_path / "a" / "1")
    with pytest.raises(DamagedAdapter, match=SUMS_FILE):
        check_sums(tmp_path / "a" / "1", {})


def test_a_record_that_leaves_a_file_out_is_damage(tmp_path: Path) -> None:
    publish(AdapterStore(tmp_path), "a")
    folder = tmp_path / "a" / "1"
    (folder / SUMS_FILE).write_text((folder / SUMS_FILE).read_text().splitlines(keepends=True)[0])
    with pytest.raises(DamagedAdapter, match="has no line for"):
        check_sums(folder, {CONFIG: "", WEIGHTS: ""})


def _send(publication: Publication, chunks: list[tuple[str, int, bytes]]) -> None:
    for chunk in chunks:
        publication.write(*chunk)
    publication.complete()


@pytest.mark.parametrize(
    ("chunks", "reason"),
    [
        ([(CONFIG, 1, b"x")], "0 bytes have come"),
        ([(CONFIG, 0, b"{}"), (CONFIG, 0, b"{}")], "2 bytes have come"),
        ([(CONFIG, 0, b"{}"), (CONFIG, 3, b"x")], "2 bytes have come"),
        ([("../evil", 0, b"x")], "does not name"),
        ([(CONFIG, 0, b"x" * 100)], "21 were declared"),
        ([(CONFIG, 0, CONTENT[CONFIG])], "ends after 0 of 2,048 bytes"),
        ([(CONFIG, 0, CONTENT[CONFIG][::-1]), (WEIGHTS, 0, CONTENT[WEIGHTS])], "arrived with sha256"),
    ],
)
def test_chunks_that_are_wrong(tmp_path: Path, chunks: list[tuple[str, int, bytes]], reason: str) -> None:
    store = AdapterStore(tmp_path)
    publication = Publication(store, declared(CONTENT))
    publication.open()
    with contextlib.closing(publication), pytest.raises(InvalidRequest, match=reason):
        _send(publication, chunks)
    assert scratch(store) == []
    assert store.scan() == {}


@pytest.mark.parametrize(
    ("files", "reason"),
    [
        ([], "not nothing"),
        (declared({CONFIG: b""}), "each once"),
        (declared({**CONTENT, "tokenizer.json": b""}), "each once"),
        (declared({CONFIG: b"", "../" + WEIGHTS: b""}), "each once"),
        ([DeclaredFile(CONFIG, 1, "0" * 64)] * 2, "each once"),
        ([DeclaredFile(CONFIG, 1, "0" * 63), DeclaredFile(WEIGHTS, 1, "0" * 64)], "64 digits"),
        ([DeclaredFile(CONFIG, (1 << 20) + 1, "0" * 64), DeclaredFile(WEIGHTS, 1, "0" * 64)], "1,048,577 bytes"),
    ],
)
def test_declarations_that_are_wrong(files: list[DeclaredFile], reason: str) -> None:
    with pytest.raises(InvalidRequest, match=reason):
        check_declaration(files, 1 << 20)


def test_a_declaration_over_the_limit() -> None:
    with pytest.raises(Overloaded, match="--max-upload-bytes"):
        check_declaration(declared(CONTENT), 2000)


def test_a_full_disk(tmp_path: Path) -> None:
    store = AdapterStore(tmp_path)
    publication = Publication(store, declared({CONFIG: b"{}", WEIGHTS: b"x" * (1 << 20)}))
    publication.open()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))  # to write more fails, as on a disk that is full
    try:
        with pytest.raises(Overloaded, match="no room"):
            publication.write(WEIGHTS, 0, b"x" * (1 << 20))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        publication.close()
    assert scratch(store) == []
    assert publish(store, "a").version == "1"


def test_a_store_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "store").write_text("")
    with pytest.raises(StoreNotWritable):
        Publication(AdapterStore(tmp_path / "store"), declared(CONTENT)).open()


def test_a_name_that_is_a_link_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "outside").mkdir()
    store = AdapterStore(tmp_path / "store")
    store.root.mkdir()
    (store.root / "a").symlink_to(tmp_path / "outside")
    with pytest.raises(StoreNotWritable, match="link"):
        publish(store, "a")
    assert list((tmp_path / "outside").iterdir()) == []


def publish_and_route(root: Path) -> None:
    """Publishes a version, and makes the one before it what the name means."""
    store = AdapterStore(root)
    publish(store, "a")
    store.change_routing("a", lambda _: Routing("1"))


def test_killed_at_every_step(tmp_path: Path) -> None:
    """Before the first rename there is version 1, after it there are both, after the second the old one is promoted.

    All of them are whole, and what is left is removed.
    """
    publish(AdapterStore(tmp_path / "template"), "a")
    roots = roots_of_killed(f"{__name__}:publish_and_route", tmp_path / "template", tmp_path / "killed")
    outcomes = {root.name: _outcome(root) for root in roots}
    steps = [outcome for name, outcome in outcomes.items() if name.startswith("step")]
    assert len(steps) > 20
    assert steps == sorted(steps)
    assert set(steps) == {(1, ""), (2, ""), (2, "1")} == {*steps, *outcomes.values()}
    assert outcomes["write-1000"] == (1, ""), "killed in the middle of the weights"


def _outcome(root: Path) -> tuple[int, str]:
    """How many versions there are after a restart, and which one is promoted."""
    store = AdapterStore(root)
    remove_leftovers(store)
    assert not (root / ".publish").exists() or scratch(store) == []
    stored = store.scan()["a"]
    assert stored.routing is not None
    for version in stored.versions:
        assert_whole(root / "a" / version)
    assert publish(store, "a").version == str(len(stored.versions) + 1)
    return len(stored.versions), stored.routing.promoted


def test_leftovers_of_the_dead_go_and_those_of_the_living_stay(tmp_path: Path) -> None:
    store = AdapterStore(tmp_path)
    living = Publication(store, declared(CONTENT))
    living.open()
    dead = store.scratch() / "dead"
    dead.mkdir()
    (dead / WEIGHTS).write_bytes(b"half")
    (store.scratch() / "half-a-routing").write_text("{")
    remove_leftovers(store)
    assert scratch(store) == [living.folder]
    living.close()
    assert scratch(store) == []


def test_two_servers_publish_at_once(tmp_path: Path) -> None:
    """Each has its own view of the store; every publication gets a version of its own."""
    versions: list[str] = []
    threads = [
        threading.Thread(target=lambda: versions.extend(publish(AdapterStore(tmp_path), "a").version for _ in range(5)))
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(map(int, versions)) == list(range(1, 21))
    for version in versions:
        assert_whole(tmp_path / "a" / version)


def test_a_lock_that_is_never_given_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("server.lora.store._LOCK_SECONDS", 0.1)
    store = AdapterStore(tmp_path)
    with store.lock(), pytest.raises(Overloaded, match=r"/\.lock has been held by another process for 0\.1 seconds"):
        publish(store, "a")
    assert publish(store, "a").version == "1"


def test_a_publisher_waits_for_the_lock_of_another_process(tmp_path: Path) -> None:
    store = AdapterStore(tmp_path)
    publish(store, "a")
    holder = f"import fcntl, sys\nfile = open({str(tmp_path / '.lock')!r})\nfcntl.flock(file, fcntl.LOCK_EX)\n"
    holder += "print('held', flush=True)\nsys.stdin.read()"
    with subprocess.Popen(
        [sys.executable, "-c", holder], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        publishing = threading.Thread(target=publish, args=(store, "a"))
        publishing.start()
        publishing.join(0.2)
        assert publishing.is_alive()
        process.communicate("")
        publishing.join(10)
    assert set(os.listdir(tmp_path / "a")) == {"1", "2"}

"""How an adapter gets into the store: whole or not at all, whatever is killed on the way. Worker threads.

scratch folder → files, checked against their digests → fsync → rename to <name>/<version> → fsync of the parents.
"""

import contextlib
import hashlib
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from adapters.config import CONFIG_FILE, WEIGHTS_FILE
from adapters.folder import SCRATCH_PREFIX, fsync, remove_abandoned, scratch_folder
from adapters.format import MAX_CONFIG_BYTES
from server.errors import AdapterExists, InvalidRequest, Overloaded, StoreNotWritable
from server.lora.digests import write_sums
from server.lora.disk import disk_errors
from server.lora.routing import VERSION
from server.lora.store import AdapterRef, AdapterStore

FILES = (CONFIG_FILE, WEIGHTS_FILE)
_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, slots=True)
class DeclaredFile:
    """What a client says of a file that it is about to send."""

    name: str
    size: int
    sha256: str  # hex


def check_declaration(files: Sequence[DeclaredFile], max_bytes: int) -> None:
    """Refuses an upload before its first byte.

    Raises:
        InvalidRequest: other files than an adapter has, a digest that is none, or a configuration that is too large.
        Overloaded: more bytes than `max_bytes`.
    """
    if sorted(file.name for file in files) != sorted(FILES):
        names = ", ".join(repr(file.name[:80]) for file in files[:4])
        raise InvalidRequest(f"an adapter is {' and '.join(FILES)}, each once; not {names or 'nothing'}", field="files")
    for file in files:
        if not _SHA256.fullmatch(file.sha256):
            raise InvalidRequest(f"sha256 of {file.name} is not 64 digits of lower-case hex", field="files.sha256")
        if file.name == CONFIG_FILE and file.size > MAX_CONFIG_BYTES:
            raise InvalidRequest(
                f"{CONFIG_FILE} has {file.size:,} bytes; at most {MAX_CONFIG_BYTES:,} make sense", field="files.size"
            )
    total = sum(file.size for file in files)
    if total > max_bytes:
        raise Overloaded(
            f"the upload has {total:,} bytes; the limit is {max_bytes:,} (--max-upload-bytes)",
            reason="UPLOAD_TOO_LARGE",
            field="files.size",
        )


class Publication:
    """One adapter on its way into the store. Owns its scratch folder, from `open` to `close`.

    These and all between block; calls come one after the other.
    """

    folder: Path

    def __init__(self, store: AdapterStore, files: Sequence[DeclaredFile]) -> None:
        self._store = store
        self._declared = {file.name: file for file in files}
        self._digests = {file.name: hashlib.sha256() for file in files}
        self._num_bytes = dict.fromkeys(self._declared, 0)
        self._open: dict[str, BinaryIO] = {}
        self._cleanup = contextlib.ExitStack()

    def open(self) -> None:
        """Makes the scratch folder.

        Raises:
            Overloaded, StoreNotWritable.
        """
        with contextlib.ExitStack() as undo, disk_errors():
            self.folder = undo.enter_context(scratch_folder(self._store.scratch()))
            self.folder.chmod(0o755)
            undo.callback(self._close_files)
            for name in self._declared:
                self._open[name] = (self.folder / name).open("xb")
            self._cleanup = undo.pop_all()

    def write(self, name: str, offset: int, data: bytes) -> None:
        """Takes the next bytes of a file.

        Raises:
            InvalidRequest: a file that was not declared, bytes that are not the next ones, or more than declared.
            Overloaded: the disk is full.
        """
        declared = self._declared.get(name)
        if declared is None:
            raise InvalidRequest(f"chunk of {name[:80]!r}, which the header does not name", field="chunk.file")
        received = self._num_bytes[name]
        if offset != received:
            raise InvalidRequest(
                f"chunk of {name} at {offset:,}; {received:,} bytes have come, so that is where the next one starts",
                field="chunk.offset",
            )
        if received + len(data) > declared.size:
            raise InvalidRequest(
                f"{name} has {received + len(data):,} bytes and more; {declared.size:,} were declared",
                field="chunk.data",
            )
        with disk_errors():
            self._open[name].write(data)
        self._digests[name].update(data)
        self._num_bytes[name] += len(data)

    def complete(self) -> None:
        """All bytes have come: holds them against their digests and makes them last.

        Raises:
            InvalidRequest: bytes are missing, or others than were declared.
            Overloaded: the disk is full.
        """
        for name, declared in self._declared.items():
            if self._num_bytes[name] != declared.size:
                raise InvalidRequest(
                    f"{name} ends after {self._num_bytes[name]:,} of {declared.size:,} bytes", field="chunk.data"
                )
            digest = self._digests[name].hexdigest()
            if digest != declared.sha256:
                raise InvalidRequest(
                    f"{name} arrived with sha256 {digest}; {declared.sha256} was declared", field="files.sha256"
                )
        with disk_errors():
            for file in self._open.values():
                file.flush()
                os.fsync(file.fileno())
            self._close_files()
            write_sums(self.folder, {name: declared.sha256 for name, declared in self._declared.items()})
            fsync(self.folder)

    def publish(self, name: str, version: str | None) -> AdapterRef:
        """Gives the adapter its place in the store: the version, or the one after the newest.

        Raises:
            AdapterExists: the version is there already; versions never change.
            Overloaded: the disk is full.
        """
        parent = self._store.root / name
        with disk_errors(), self._store.lock():
            stored = self._store.look(name)
            if version is None:
                version = str(int(stored.newest) + 1) if stored else "1"
                if not VERSION.fullmatch(version):
                    raise StoreNotWritable(
                        f"no number of nine digits follows the newest version of {name}: name a version"
                    )
            ref = AdapterRef(name, version)
            if stored and version in stored.versions:
                raise version_exists(ref)
            if parent.is_symlink():
                raise StoreNotWritable(f"{name} is a link in the adapters folder, which is never followed")
            parent.mkdir(exist_ok=True)
            fsync(self._store.root)
            os.rename(self.folder, parent / version)
            fsync(parent)
        return ref

    def close(self) -> None:
        """Removes whatever was not published."""
        self._cleanup.close()

    def _close_files(self) -> None:
        for file in self._open.values():
            with contextlib.suppress(OSError):  # what could not be written is given up
                file.close()


def version_exists(ref: AdapterRef) -> AdapterExists:
    return AdapterExists(f"{ref} is in the store; a version never changes: upload another", field="name")


def remove_leftovers(store: AdapterStore) -> None:
    """Removes what publishers and trainings left in the store that were killed; those that live keep their scratch.

    Raises:
        OSError: the store cannot be read.
        Overloaded: another process keeps its lock.
    """
    if (store.root / ".publish").is_dir():
        with store.lock():  # under which routings are written there, and carry no mark of their own
            remove_abandoned((store.root / ".publish").iterdir())
    for level in ("", "*/"):
        remove_abandoned(store.root.glob(f"{level}{SCRATCH_PREFIX}*"))

"""Adapters on disk, by name and version. Only names and file times are read here; every method blocks, any thread.

<root>/<name>/adapter_config.json …             version 1 of an adapter
<root>/<name>/<version>/adapter_config.json …   versions are numbers
<root>/<name>/routing.json                      which version the bare name means, if not the newest
<root>/.lock                                    held by whoever changes the store, of all servers that share it
<root>/.publish/                                adapters on their way into the store
"""

import contextlib
import fcntl
import logging
import os
import re
import stat
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from adapters.folder import fsync
from server.errors import InvalidRequest, Overloaded
from server.lora.disk import disk_errors
from server.lora.fingerprint import fingerprint
from server.lora.routing import VERSION, Routing
from server.lora.stored_name import FLAT_VERSION, ROUTING_FILE, StoredName, list_name, read_routing

log = logging.getLogger(__name__)

# Not the names that are devices on Windows, so that a store can be copied there.
_NAME = re.compile(r"(?!(?i:CON|PRN|AUX|NUL|COM\d|LPT\d)(?:\.|$))[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
_LOCK_SECONDS = 10  # that a change waits for others: a process that hangs must not take the disk threads with it
_LOCK_POLL_SECONDS = 0.02
_CLOCK_TICK_NS = 3 * 10**9  # two changes this far apart have different times on every file system


@dataclass(frozen=True, slots=True)
class AdapterRef:
    """A name with the version it stands for; the empty version: none yet."""

    name: str
    version: str

    @property
    def sort_key(self) -> tuple[str, int]:
        return self.name, int(self.version)

    def __str__(self) -> str:
        return f"{self.name}@{self.version}" if self.version else self.name


def parse_reference(text: str, field: str = "adapter") -> tuple[str, str | None]:
    """`name` or `name@version` → its parts.

    Raises:
        InvalidRequest: characters that a name cannot have.
    """
    name, at, version = text.partition("@")
    if not _NAME.fullmatch(name) or (at and not VERSION.fullmatch(version)):
        raise InvalidRequest(
            f"{text[:160]!r} is no adapter name: 1 to 128 letters, digits, '.', '_' or '-', the first a letter or "
            "digit, none that Windows keeps for a device, then '@' and a number for one version",
            field=field,
        )
    return name, version if at else None


class AdapterStore:
    """Owns the adapters folder. Names are checked before they become paths, and links are not followed."""

    def __init__(self, root: Path, reserved: frozenset[str] = frozenset()) -> None:
        """Names in `reserved`, such as the base model's, are nobody's."""
        self.root = root
        self.reserved = reserved
        self._unreadable: set[str] = set()  # names, at the last scan
        self._simple: dict[str, tuple[int, int]] = {}  # `is_simple` names, with the state of their folder

    def scan(self, known: Mapping[str, StoredName] = MappingProxyType({})) -> dict[str, StoredName]:
        """Everything in the folder.

        Args:
            known: what is told of names that are there and cannot be read at the moment.

        Raises:
            OSError: the folder is not there or cannot be read.
        """
        with os.scandir(self.root) as entries:
            names = [entry.name for entry in entries if _NAME.fullmatch(entry.name)]
        found, unreadable = {}, set()
        for name in names:
            try:
                stored = self.look(name)
            except OSError as error:
                unreadable.add(name)
                if name not in self._unreadable:
                    log.error("%s/%s cannot be read and is what it was: %s", self.root, name, error.strerror)
                stored = known.get(name)
            if stored is not None:
                found[name] = stored
        self._unreadable = unreadable
        for name in list(self._simple):
            if name not in found:
                self._simple.pop(name, None)
        return found

    def look(self, name: str) -> StoredName | None:
        """What is on disk under a name now.

        A folder that did not change is not listed again: to look at its two files takes a fifth of the time, and
        everything is looked at every few seconds.

        Raises:
            OSError: it cannot be read, and nobody knows.
        """
        folder = f"{self.root}/{name}"
        try:
            if name in self.reserved or not stat.S_ISDIR((status := os.lstat(folder)).st_mode):
                return None
            state, age = (status.st_ino, status.st_ctime_ns), time.time_ns() - status.st_ctime_ns
            if self._simple.get(name) == state:
                flat = fingerprint(folder)
                return StoredName.simple(flat) if flat is not None else None
            stored = list_name(folder)
        except (FileNotFoundError, NotADirectoryError):
            return None
        if stored is not None and stored.is_simple and age > _CLOCK_TICK_NS:
            self._simple[name] = state
        return stored

    def path(self, ref: AdapterRef, is_flat: bool) -> Path:
        """Where a version lies, in a name whose own folder holds version 1 or does not."""
        folder = self.root / ref.name
        return folder if is_flat and ref.version == FLAT_VERSION else folder / ref.version

    def source(self, text: str) -> Path:
        """A folder that a client names, relative to the adapters folder and inside it.

        Raises:
            InvalidRequest: there is none, or it leads out of the adapters folder.
        """
        try:
            root = self.root.resolve()
            path = (root / text).resolve()
            hidden = any(part.startswith(".") for part in path.relative_to(root).parts)
            if not hidden and path.is_dir():
                return path
        except (ValueError, OSError, RuntimeError):  # outside, unreadable, or a loop of links
            pass
        raise InvalidRequest(
            f"source {text!r} is no folder inside the adapters folder (--adapters-dir)", field="source"
        )

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Keeps all others from changing the store, other servers included. Held for moments.

        Raises:
            Overloaded: another one holds it for longer.
        """
        path = self.root / ".lock"
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            deadline = time.monotonic() + _LOCK_SECONDS
            while not _is_locked(handle):
                if time.monotonic() > deadline:
                    raise Overloaded(
                        f"{path} has been held by another process for {_LOCK_SECONDS} seconds", reason="STORE_LOCKED"
                    )
                time.sleep(_LOCK_POLL_SECONDS)
            yield
        finally:
            os.close(handle)

    def scratch(self) -> Path:
        """The folder for what is not published yet, on the same file system as the store."""
        path = self.root / ".publish"
        path.mkdir(parents=True, exist_ok=True)
        return path

    def change_routing(self, name: str, change: Callable[[Routing | None], Routing]) -> None:
        """Changes what a bare name means, for all servers on this store and for good.

        Args:
            change: makes the new routing from the one that is there, which is None if it cannot be read.

        Raises:
            Overloaded, StoreNotWritable; whatever `change` raises.
        """
        with disk_errors(), contextlib.ExitStack() as undo:
            scratch = self.scratch()
            undo.enter_context(self.lock())
            routing = change(read_routing(os.path.join(self.root, name, ROUTING_FILE)))
            handle, temporary = tempfile.mkstemp(dir=scratch)
            undo.callback(_unlink_if_there, temporary)
            with open(handle, "w") as file:
                os.fchmod(handle, 0o644)
                file.write(routing.to_json())
                file.flush()
                os.fsync(handle)
            os.rename(temporary, self.root / name / ROUTING_FILE)
            fsync(self.root / name)


def _is_locked(handle: int) -> bool:
    """Takes the lock if nobody has it."""
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _unlink_if_there(path: str) -> None:
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)

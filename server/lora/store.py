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

from adapters.config import CONFIG_FILE
from adapters.folder import fsync
from adapters.format import open_plain
from server.errors import InvalidRequest, Overloaded
from server.lora.disk import disk_errors
from server.lora.fingerprint import Fingerprint, fingerprint
from server.lora.routing import VERSION, Routing

log = logging.getLogger(__name__)

# Not the names that are devices on Windows, so that a store can be copied there.
_NAME = re.compile(r"(?!(?i:CON|PRN|AUX|NUL|COM\d|LPT\d)(?:\.|$))[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
FLAT_VERSION = "1"
ROUTING_FILE = "routing.json"
_MAX_ROUTING_BYTES = 1 << 16
_LOCK_SECONDS = 10  # that a change waits for others: a process that hangs must not take the disk threads with it
_LOCK_POLL_SECONDS = 0.02


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


@dataclass(frozen=True, slots=True)
class StoredName:
    """What the store has under one name."""

    versions: Mapping[str, Fingerprint]  # never empty
    is_flat: bool  # version 1 lies in the name's own folder
    routing: Routing | None  # None: there is one, and it cannot be read

    @property
    def newest(self) -> str:
        return max(self.versions, key=int)


class AdapterStore:
    """Owns the adapters folder. Names are checked before they become paths, and links are not followed."""

    def __init__(self, root: Path, reserved: frozenset[str] = frozenset()) -> None:
        """Names in `reserved`, such as the base model's, are nobody's."""
        self.root = root
        self.reserved = reserved
        self._unreadable: set[str] = set()  # names, at the last scan

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
        return found

    def look(self, name: str) -> StoredName | None:
        """What is on disk under a name now.

        Raises:
            OSError: it cannot be read, and nobody knows.
        """
        folder = os.path.join(self.root, name)
        versions = {}
        routing: Routing | None = Routing()
        flat = None
        try:
            if name in self.reserved or not stat.S_ISDIR(os.lstat(folder).st_mode):
                return None
            with os.scandir(folder) as entries:
                for entry in entries:
                    if entry.name == CONFIG_FILE:
                        flat = fingerprint(folder)
                    elif entry.name == ROUTING_FILE:
                        routing = _read_routing(entry.path)
                    elif VERSION.fullmatch(entry.name) and entry.is_dir(follow_symlinks=False):
                        found = fingerprint(entry.path)
                        if found is not None:
                            versions[entry.name] = found
        except (FileNotFoundError, NotADirectoryError):
            return None
        if flat is not None:
            versions[FLAT_VERSION] = flat
        return StoredName(versions, flat is not None, routing) if versions else None

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
            routing = change(_read_routing(os.path.join(self.root, name, ROUTING_FILE)))
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


def _read_routing(path: str) -> Routing | None:
    try:
        with open_plain(path) as file:
            return Routing.from_json(file.read(_MAX_ROUTING_BYTES).decode())
    except FileNotFoundError:
        return Routing()
    except (OSError, ValueError) as error:
        log.error("%s cannot be read, the name means what it did before: %s", path, error)
        return None

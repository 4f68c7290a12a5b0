"""Disk → checked adapter → host copy, with its generation. Event loop; the disk is read in worker threads."""

import contextlib
import logging
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from adapters.config import CONFIG_FILE, WEIGHTS_FILE
from adapters.errors import AdapterFormatError, AdapterIncompatibleError, memory_errors
from adapters.format import read_adapter
from server.errors import AdapterChanged, AdapterNotFound, IncompatibleAdapter, InvalidAdapter, Overloaded, ServingError
from server.lora.adapter import Adapter, CheckedAdapter
from server.lora.digests import SUMS_FILE, check_sums
from server.lora.disk import read_errors
from server.lora.disk_workers import DiskWorkers
from server.lora.fingerprint import Fingerprint, fingerprint
from server.lora.host_copy import HostCopy
from server.lora.host_memory import HostMemory
from server.lora.served_base import ServedBase
from server.lora.store import AdapterRef

log = logging.getLogger(__name__)

_MAX_NAMES = 10  # files that one line of the log tells of


class LastLoad(NamedTuple):
    """What a name means, with or without its weights in memory."""

    digest: str
    generation: int
    num_bytes: int
    rank: int
    target_modules: tuple[str, ...]
    num_layers: int


class AdapterLoader:
    """Reads and checks adapters for one base, and owns the count of generations.

    A generation is one content under one name: what was evicted and comes back unchanged is the same generation.
    """

    def __init__(self, served: ServedBase, memory: HostMemory) -> None:
        self._served = served
        self._disk = DiskWorkers("load")  # of its own, so that nothing else that waits for the disk holds up a load
        self._memory = memory
        self._num_generations = 0
        self._loaded: dict[AdapterRef, LastLoad] = {}
        self._refused: dict[AdapterRef, _Refused] = {}  # as long as the files stay as they are

    async def load(self, ref: AdapterRef, folder: Path, *, same_if_unchanged: bool, wait: bool) -> HostCopy:
        """A copy of what is in the folder: a new generation, or the name's last one if the content is still the same.

        It is checked before anything makes room for it. One that has to wait is read again afterwards: what waits
        takes no memory.

        Args:
            same_if_unchanged: and files that were refused are not read again as long as they are the same.
            wait: until there is room.

        Raises:
            AdapterNotFound, InvalidAdapter, IncompatibleAdapter, DamagedAdapter, AdapterChanged, Overloaded,
            Unavailable.
            NotAwaited: while it waited.
        """
        checked, source, seconds = await self._checked(ref, folder, same_if_unchanged)
        size = checked.num_bytes
        if must_wait := wait and not self._memory.has_room(size):
            del checked
        async with self._memory.reserve(size, ref if wait else None):
            if must_wait:
                checked, source, seconds = await self._checked(ref, folder, same_if_unchanged)
                if checked.num_bytes > size:
                    raise AdapterChanged(f"adapter {ref.name!r} grew while it waited for room; try again")
            last = self._loaded.get(ref)
            if same_if_unchanged and last is not None and last.digest == checked.files.digest:
                generation = last.generation
            else:
                self._num_generations += 1
                generation = self._num_generations
            started = time.monotonic()
            adapter = await self._disk.run(self._copied, checked, ref, generation)
            return HostCopy(adapter, source, seconds + time.monotonic() - started)

    def remember(self, ref: AdapterRef, adapter: Adapter) -> None:
        """This is what the name means now."""
        self._loaded[ref] = LastLoad(
            adapter.digest,
            adapter.generation,
            adapter.num_bytes,
            adapter.rank,
            adapter.target_modules,
            len(adapter.weights),
        )
        self._refused.pop(ref, None)

    def forget(self, ref: AdapterRef) -> None:
        self._loaded.pop(ref, None)
        self._refused.pop(ref, None)

    def last(self, ref: AdapterRef) -> "LastLoad | None":
        """What the name means, in memory or evicted from it; None: it was never loaded."""
        return self._loaded.get(ref)

    def generation(self, ref: AdapterRef) -> int:
        """Of `last`; 0: it was never loaded."""
        last = self._loaded.get(ref)
        return last.generation if last else 0

    def num_bytes(self, ref: AdapterRef) -> int:
        """Memory that it took when it was last loaded; 0: it never was."""
        last = self._loaded.get(ref)
        return last.num_bytes if last else 0

    async def _checked(
        self, ref: AdapterRef, folder: Path, same_if_unchanged: bool
    ) -> tuple[CheckedAdapter, Fingerprint | None, float]:
        """What `_read` returns, and how many seconds it took."""
        started = time.monotonic()
        known = self._refused.get(ref) if same_if_unchanged else None
        read = await self._disk.run(self._read, ref.name, folder, known)
        if isinstance(read, _Refused):
            if same_if_unchanged:
                self._refused[ref] = read
            raise read.error()
        return *read, time.monotonic() - started

    def _read(
        self, name: str, folder: Path, known: "_Refused | None"
    ) -> "tuple[CheckedAdapter, Fingerprint | None] | _Refused":
        """The checked files, and the state of the folder in which they were read; or why they are refused.

        What is known of a folder that is still in that state is not read again.

        A folder that changes under the reading is not believed; and if the files of a published adapter fail their
        digests, that is the fault to report, whatever else it led to. Worker thread.
        """
        with read_errors(f"adapter {name!r}"):
            before = fingerprint(folder)
            if known is not None and known.source == before:
                return known
            return self._read_as(before, name, folder)

    def _read_as(
        self, before: Fingerprint | None, name: str, folder: Path
    ) -> "tuple[CheckedAdapter, Fingerprint | None] | _Refused":
        if before is None and not folder.is_dir():
            raise AdapterNotFound(name)
        fault: AdapterFormatError | None = None
        digests: Mapping[str, str] = {}
        try:
            files = read_adapter(folder, self._served.weights.shapes, self._served.max_rank, self._served.name)
            digests = files.file_digests
            self._served.check(files)
            with memory_errors():
                checked = CheckedAdapter.from_files(files, self._served.weights, self._served.lora_dtype)
        except AdapterFormatError as error:
            fault = error
        except MemoryError as error:
            raise _no_memory(name) from error
        if fingerprint(folder) != before:
            raise AdapterChanged(f"the files of adapter {name!r} changed while they were read; try again")
        check_sums(folder, digests)
        if fault is not None:
            return _refused(before, name, fault)
        _report(name, folder, checked)
        if other := self._served.other_base(files):
            log.warning("adapter %s: trained on %s, served is %s", name, other, self._served.name)
        return checked, before

    def _copied(self, checked: CheckedAdapter, ref: AdapterRef, generation: int) -> Adapter:
        """Worker thread."""
        try:
            other_base = self._served.other_base(checked.files)
            return Adapter.copied(checked, ref.name, ref.version, generation, other_base)
        except (MemoryError, OSError) as error:
            raise _no_memory(ref.name) from error


class _Refused(NamedTuple):
    """Files that are wrong, or not for this server, and the state in which they were read."""

    source: Fingerprint | None
    kind: type[ServingError]
    message: str
    reason: str

    def error(self) -> ServingError:
        return self.kind(self.message, reason=self.reason)


def _report(name: str, folder: Path, checked: CheckedAdapter) -> None:
    """Logs what an adapter does, and what of it does nothing here. Worker thread."""
    log.info("adapter %s: LoRA on %d layers of the base", name, len(checked.layers))
    if checked.unmatched_targets:
        log.warning("adapter %s: target_modules that match no layer: %s", name, _some(checked.unmatched_targets))
    if checked.adds_nothing:
        log.warning("adapter %s: every B is zero, so it answers as the base does", name)
    with contextlib.suppress(OSError):
        if ignored := sorted(set(os.listdir(folder)) - {CONFIG_FILE, WEIGHTS_FILE, SUMS_FILE}):
            log.info("adapter %s: never opened: %s", name, _some(ignored))


def _some(names: Sequence[str]) -> str:
    return ", ".join(map(repr, names[:_MAX_NAMES]))


def _no_memory(name: str) -> Overloaded:
    return Overloaded(f"the system has no memory for adapter {name!r}", reason="ADAPTER_MEMORY")


def _refused(source: Fingerprint | None, name: str, fault: AdapterFormatError) -> _Refused:
    kind = IncompatibleAdapter if isinstance(fault, AdapterIncompatibleError) else InvalidAdapter
    return _Refused(source, kind, f"adapter {name!r}: {fault}", fault.reason)

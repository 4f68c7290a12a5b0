"""Adapters in host memory: who is there, who is in use, who goes first. Event loop; worker threads read the files."""

import asyncio
import logging
import time
from collections import OrderedDict
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from adapters.errors import AdapterFormatError, AdapterIncompatibleError
from adapters.format import AdapterFiles, read_adapter
from server.errors import AdapterExists, AdapterNotFound, IncompatibleAdapter, InvalidAdapter, Overloaded
from server.lora.adapter import Adapter
from server.lora.base_weights import BaseWeights
from server.lora.store import FLAT_VERSION, AdapterRef, AdapterStore, parse_reference
from server.metrics import Metrics

log = logging.getLogger(__name__)

EvictFromDevice = Callable[[Adapter], Awaitable[int]]


class _Resident:
    """An adapter in memory and how many requests use it."""

    def __init__(self, adapter: Adapter) -> None:
        self.adapter = adapter
        self.num_users = 0
        self.unused = asyncio.Event()
        self.unused.set()

    def acquire(self) -> None:
        self.num_users += 1
        self.unused.clear()

    def release(self) -> None:
        self.num_users -= 1
        if not self.num_users:
            self.unused.set()


@dataclass(frozen=True, slots=True)
class FreedBytes:
    """Memory that an unload gave back."""

    device: int
    host: int


@dataclass(frozen=True, slots=True)
class AdapterStatus:
    """What `ListAdapters` tells of one adapter."""

    ref: AdapterRef
    adapter: Adapter | None  # None: on disk only
    num_users: int = 0
    error: str = ""


class AdapterCache:
    """Owns the host copies of adapters and the meaning of their names.

    A copy stays until room is needed and nobody uses it; the least recently used one goes first. Taking a name away, or
    giving it to a new generation, never disturbs the requests that still use the old one.
    """

    def __init__(
        self,
        store: AdapterStore,
        base: BaseWeights,
        *,
        max_rank: int,
        max_bytes: int,
        metrics: Metrics,
    ) -> None:
        self.store = store
        self._base = base
        self._max_rank = max_rank
        self._max_bytes = max_bytes
        self._metrics = metrics
        self._resident: OrderedDict[AdapterRef, _Resident] = OrderedDict()  # least recently used first
        self._loading: dict[AdapterRef, asyncio.Task[None]] = {}
        self._retiring: dict[asyncio.Task[FreedBytes], int] = {}  # bytes still held by copies without a name
        self._sources: dict[AdapterRef, Path] = {}  # of adapters that were loaded from a folder of another name
        self._errors: dict[AdapterRef, str] = {}  # why the last load was refused
        # Names, whole or one version of them, that were taken away: only LoadAdapter brings them back.
        self._unloaded: set[tuple[str, str | None]] = set()
        self._reserved = 0  # bytes of adapters that are being read
        self._generation = 0
        self._evict_from_device: EvictFromDevice | None = None
        metrics.adapters.watch("host", lambda: [resident.adapter for resident in tuple(self._resident.values())])

    def connect(self, evict_from_device: EvictFromDevice) -> None:
        """Tells the cache how to take an adapter off the device; until then there is none."""
        self._evict_from_device = evict_from_device

    @property
    def num_bytes(self) -> int:
        """Host memory of all adapters, those included that have lost their name but are still in use."""
        return sum(resident.adapter.num_bytes for resident in self._resident.values()) + sum(self._retiring.values())

    @asynccontextmanager
    async def acquire(self, reference: str) -> AsyncIterator[Adapter]:
        """Holds an adapter in host memory while a request uses it.

        Raises:
            InvalidRequest, AdapterNotFound, InvalidAdapter, IncompatibleAdapter, Overloaded.
        """
        resident = await self._get(reference)
        resident.acquire()
        try:
            yield resident.adapter
        finally:
            resident.release()

    async def load(self, name: str, source: str, *, replace: bool) -> Adapter:
        """Loads an adapter under a name, from the folder `source` or from the store's own folder of that name.

        Everything is checked before the name changes hands; requests that run on the old weights finish on them.

        Raises:
            InvalidRequest, AdapterNotFound, AdapterExists, InvalidAdapter, IncompatibleAdapter, Overloaded.
        """
        bare_name, version = parse_reference(name)
        if source:
            ref, path = AdapterRef(bare_name, version or FLAT_VERSION), self.store.source(source)
        else:
            ref = self.store.find(bare_name, version)
            path = self.store.path(ref)
        if ref in self._resident and not replace:
            raise AdapterExists(f"adapter {name!r} is loaded already; set replace to load it anew", field="name")
        adapter = await self._read(ref, path)
        self._retire(ref)
        self._resident[ref] = _Resident(adapter)
        self._unloaded -= {(ref.name, None), (ref.name, ref.version)}
        self._sources.pop(ref, None)
        if source:
            self._sources[ref] = path
        return adapter

    async def unload(self, name: str) -> FreedBytes:
        """Takes a name away at once, waits for the requests that use it, and frees its memory.

        Raises:
            InvalidRequest, AdapterNotFound.
        """
        bare_name, version = parse_reference(name)
        known = {*(status.ref for status in self.statuses()), *self._resident}
        refs = [ref for ref in known if ref.name == bare_name and version in (None, ref.version)]
        refs = [ref for ref in refs if not self._is_unloaded(ref)]
        if not refs:
            raise AdapterNotFound(name)
        self._unloaded.add((bare_name, version))
        for ref in refs:
            self._sources.pop(ref, None)
        # Shielded: a client that stops waiting does not stop the unloading.
        freed = await asyncio.shield(asyncio.gather(*[self._retire(ref) for ref in refs]))
        return FreedBytes(sum(part.device for part in freed), sum(part.host for part in freed))

    def statuses(self) -> list[AdapterStatus]:
        """The newest version of every adapter, and whatever else is loaded or was refused, in name order."""
        refs = {*self.store.scan(), *self._resident, *self._sources, *self._errors}
        return [self._status(ref) for ref in sorted(ref for ref in refs if not self._is_unloaded(ref))]

    def status(self, reference: str) -> AdapterStatus:
        """What is known of the adapter that a request for `reference` would get.

        Raises:
            InvalidRequest, AdapterNotFound.
        """
        return self._status(self._lookup(reference))

    def _status(self, ref: AdapterRef) -> AdapterStatus:
        resident = self._resident.get(ref)
        adapter, num_users = (resident.adapter, resident.num_users) if resident else (None, 0)
        return AdapterStatus(ref, adapter, num_users, self._errors.get(ref, ""))

    async def _get(self, reference: str) -> _Resident:
        """The resident copy, loaded now if it is only on disk."""
        waited = False
        while True:
            ref = self._lookup(reference)
            resident = self._resident.get(ref)
            if resident is not None:
                self._resident.move_to_end(ref)
                if not waited:
                    self._metrics.adapters.found(ref.name, "host")
                return resident
            if ref not in self._loading:
                self._loading[ref] = asyncio.create_task(self._load_missing(ref))
            # Shielded: a request that stops waiting does not stop the load that others wait for too.
            await asyncio.shield(self._loading[ref])
            waited = True

    def _lookup(self, reference: str) -> AdapterRef:
        name, version = parse_reference(reference)
        loaded_from_elsewhere = [ref for ref in self._sources if ref.name == name and version in (None, ref.version)]
        if loaded_from_elsewhere:
            return max(loaded_from_elsewhere, key=lambda ref: int(ref.version))
        ref = self.store.find(name, version)
        if self._is_unloaded(ref):
            raise AdapterNotFound(reference)
        return ref

    def _is_unloaded(self, ref: AdapterRef) -> bool:
        return bool(self._unloaded & {(ref.name, None), (ref.name, ref.version)})

    async def _load_missing(self, ref: AdapterRef) -> None:
        try:
            adapter = await self._read(ref, self._sources.get(ref) or self.store.path(ref))
            if self._is_unloaded(ref):
                raise AdapterNotFound(ref.name)
            self._resident.setdefault(ref, _Resident(adapter))
        finally:
            del self._loading[ref]

    async def _read(self, ref: AdapterRef, path: Path) -> Adapter:
        """Disk → host memory, in a worker thread; nothing of the cache changes but the room that is made."""
        started = time.monotonic()
        try:
            files = await asyncio.to_thread(read_adapter, path, self._base.shapes, self._max_rank)
            adapter = await self._copy(files, ref)
        except AdapterFormatError as error:
            self._errors[ref] = str(error)
            self._metrics.adapter_load_failures.inc()
            log.warning("adapter %s@%s refused: %s", ref.name, ref.version, error)
            kind = IncompatibleAdapter if isinstance(error, AdapterIncompatibleError) else InvalidAdapter
            raise kind(f"adapter {ref.name!r}: {error}", reason=error.reason) from error
        self._errors.pop(ref, None)
        self._metrics.adapter_loaded(ref.name, time.monotonic() - started)
        log.info(
            "adapter %s@%s loaded: rank %d on %d of %d layers (%s), %d bytes",
            ref.name,
            ref.version,
            adapter.rank,
            len(adapter.weights),
            len(self._base.shapes),
            ", ".join(adapter.target_modules),
            adapter.num_bytes,
        )
        return adapter

    async def _copy(self, files: AdapterFiles, ref: AdapterRef) -> Adapter:
        """Into memory that is reserved while the copy is made."""
        self._generation += 1
        generation = self._generation
        await self._make_room(files.num_bytes)
        self._reserved += files.num_bytes
        try:
            return await asyncio.to_thread(Adapter.from_files, files, ref.name, ref.version, generation, self._base)
        finally:
            self._reserved -= files.num_bytes

    async def _make_room(self, num_bytes: int) -> None:
        while self.num_bytes + self._reserved + num_bytes > self._max_bytes:
            idle = None
            if num_bytes <= self._max_bytes:  # one that can never fit sends nobody away
                idle = next((ref for ref, resident in self._resident.items() if not resident.num_users), None)
            if idle is None:
                raise Overloaded(
                    f"{num_bytes:,} bytes for the adapter do not fit beside {self.num_bytes + self._reserved:,}; "
                    f"the limit is {self._max_bytes:,} (--adapter-host-bytes)",
                    reason="ADAPTER_MEMORY",
                )
            self._metrics.adapters.evicted(idle.name, "host")
            await self._retire(idle)

    def _retire(self, ref: AdapterRef) -> "asyncio.Task[FreedBytes]":
        """Takes the name from a copy; the task frees the copy once its last request is done."""
        resident = self._resident.pop(ref, None)
        task = asyncio.create_task(self._free(resident))
        if resident is not None:
            self._retiring[task] = resident.adapter.num_bytes
            task.add_done_callback(self._retiring.pop)
        return task

    async def _free(self, resident: _Resident | None) -> FreedBytes:
        if resident is None:
            return FreedBytes(0, 0)
        await resident.unused.wait()
        on_device = await self._evict_from_device(resident.adapter) if self._evict_from_device else 0
        return FreedBytes(on_device, resident.adapter.num_bytes)

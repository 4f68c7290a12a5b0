"""Adapters on their way from disk to host memory. Event loop."""

import asyncio
import contextlib
import logging
from pathlib import Path

from server.errors import AdapterNotFound, DamagedAdapter, IncompatibleAdapter, InvalidAdapter, ServingError
from server.lora.catalog import AdapterCatalog
from server.lora.events import EventKind
from server.lora.host_copy import HostCopy
from server.lora.host_memory import HostMemory, NotAwaited
from server.lora.loader import AdapterLoader
from server.lora.status_board import StatusBoard
from server.lora.store import AdapterRef
from server.metrics import Metrics

log = logging.getLogger(__name__)

# What a load says of the files, and so of the loads to come; other refusals are of the moment.
_OF_THE_FILES = (AdapterNotFound, InvalidAdapter, IncompatibleAdapter, DamagedAdapter)


class AdapterLoads:
    """Owns the loads that requests wait for, one for each adapter, and counts and reports all loads."""

    def __init__(
        self,
        catalog: AdapterCatalog,
        memory: HostMemory,
        loader: AdapterLoader,
        board: StatusBoard,
        metrics: Metrics,
    ) -> None:
        self._catalog = catalog
        self._memory = memory
        self._loader = loader
        self._board = board
        self._metrics = metrics
        self._loading: dict[AdapterRef, asyncio.Task[None]] = {}

    async def copy(self, ref: AdapterRef) -> HostCopy:
        """The copy in memory, loaded as soon as there is room if it is only on disk.

        Raises:
            Those of `AdapterCache.hold`.
        """
        while (copy := self._memory.get(ref)) is None:
            if not self._catalog.has(ref):
                raise AdapterNotFound(str(ref))
            if ref not in self._loading:
                self._loading[ref] = asyncio.create_task(self._load_missing(ref))
                self._loading[ref].add_done_callback(lambda task: task.cancelled() or task.exception())
            with self._memory.awaiting(ref):
                # Shielded: a request that stops waiting does not stop the load that others wait for too.
                await asyncio.shield(self._loading[ref])
        return copy

    async def read(self, ref: AdapterRef, folder: Path, *, same_if_unchanged: bool, wait: bool = False) -> HostCopy:
        """`AdapterLoader.load`, counted; a refusal is told, and shown in listings if it is of the version's own files.

        Raises:
            Those of `AdapterLoader.load`.
        """
        try:
            with self._board.loading(ref):
                copy = await self._loader.load(ref, folder, same_if_unchanged=same_if_unchanged, wait=wait)
        except ServingError as error:
            log.warning("adapter %s refused: %s", ref, error.message)
            self._metrics.adapter_load_failures.inc()
            lasting = isinstance(error, _OF_THE_FILES) and folder == self._catalog.path(ref)
            self._board.refused(ref, error.message, lasting=lasting)
            raise
        self._metrics.adapter_loaded(ref.name, copy.load_seconds)
        return copy

    def put(self, ref: AdapterRef, copy: HostCopy, kind: EventKind, *, pin: bool = False) -> None:
        """Gives the name to a copy."""
        self._memory.put(ref, copy)
        if pin:
            self._memory.pin(ref)
        self._loader.remember(ref, copy.adapter)
        self._board.clear(ref)
        adapter = copy.adapter
        log.info(
            "adapter %s loaded: generation %d, rank %d, %d bytes",
            ref,
            adapter.generation,
            adapter.rank,
            adapter.num_bytes,
        )
        self._board.publish(kind, ref)

    async def _load_missing(self, ref: AdapterRef) -> None:
        try:
            with contextlib.suppress(NotAwaited):
                copy = await self.read(ref, self._catalog.path(ref), same_if_unchanged=True, wait=True)
                if not self._catalog.has(ref):
                    raise AdapterNotFound(str(ref))
                if self._memory.get(ref) is None:
                    self.put(ref, copy, EventKind.LOADED)
        finally:
            del self._loading[ref]

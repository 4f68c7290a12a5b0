"""Adapters that come over the wire: caps, checks, publication. Event loop; files are written in worker threads."""

import contextlib
from collections.abc import AsyncIterator, Sequence
from dataclasses import replace as replaced
from functools import partial

from server.errors import Overloaded
from server.lora.cache import AdapterCache
from server.lora.events import AdapterStatus, EventKind
from server.lora.publish import DeclaredFile, Publication, check_declaration
from server.lora.store import AdapterRef

MAX_UPLOADS = 8  # at a time


class Upload:
    """One adapter that is being sent."""

    def __init__(self, adapters: AdapterCache, publication: Publication, name: str) -> None:
        self._adapters = adapters
        self._publication = publication
        self._name = name

    async def write(self, file: str, offset: int, data: bytes) -> None:
        """Raises InvalidRequest for bytes that are not the next ones, Overloaded when the disk is full."""
        await self._adapters.disk.run(self._publication.write, file, offset, data)

    async def publish(self, *, replace: bool, expected_generation: int | None, pin: bool) -> AdapterStatus:
        """Checks what came, gives it its place in the store, and loads it: all of it or nothing.

        Raises:
            Those of `AdapterCache.load`; StoreNotWritable.
        """
        adapters, publication = self._adapters, self._publication
        name, version = adapters.claims.parse(self._name)
        async with adapters.claims.changing(name):
            await adapters.look(name)
            current = adapters.catalog.current(name)
            claim = partial(
                adapters.claims.check,
                AdapterRef(name, current or ""),
                taken=bool(adapters.catalog.versions(name)),
                replace=replace,
                expected_generation=expected_generation,
            )
            claim()
            await adapters.disk.run(publication.complete)
            copy = await adapters.loads.read(AdapterRef(name, ""), publication.folder, same_if_unchanged=False)
            claim()  # again: a request may have loaded the current one meanwhile
            async with adapters.memory.reserve(copy.adapter.num_bytes):
                ref = await adapters.disk.run(publication.publish, name, version)
                await adapters.look(name)
            copy.adapter = replaced(copy.adapter, version=ref.version)
            adapters.catalog.restore(ref, None)
            adapters.loads.put(ref, copy, EventKind.LOADED, pin=pin)
        return adapters.board.status(ref)


class AdapterUploads:
    """Owns the uploads that are on their way."""

    def __init__(self, adapters: AdapterCache, max_bytes: int) -> None:
        self._adapters = adapters
        self._max_bytes = max_bytes
        self._num_uploads = 0

    @contextlib.asynccontextmanager
    async def receive(self, name: str, files: Sequence[DeclaredFile]) -> AsyncIterator[Upload]:
        """Takes an adapter's files, within; whatever is not published at the end leaves nothing behind.

        Raises:
            InvalidRequest, AdapterExists, Overloaded, StoreNotWritable.
        """
        self._adapters.claims.parse(name)
        check_declaration(files, self._max_bytes)
        if self._num_uploads >= MAX_UPLOADS:
            raise Overloaded(f"{MAX_UPLOADS} uploads are on their way already", reason="TOO_MANY_UPLOADS")
        self._num_uploads += 1
        publication = Publication(self._adapters.store, files)
        try:
            await self._adapters.disk.run(publication.open)
            yield Upload(self._adapters, publication, name)
        finally:
            self._num_uploads -= 1
            await self._adapters.disk.run(publication.close)

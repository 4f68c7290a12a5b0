"""Adapters that come over the wire: caps, checks, publication. Event loop; files are written in worker threads."""

import asyncio
import contextlib
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from dataclasses import dataclass
from dataclasses import replace as replaced
from typing import TypeVar

from server.errors import Overloaded, UploadTooSlow
from server.lora.cache import AdapterCache
from server.lora.events import AdapterStatus, EventKind
from server.lora.publish import DeclaredFile, Publication, check_declaration, version_exists
from server.lora.store import AdapterRef

MAX_UPLOADS = 8  # at a time

Message = TypeVar("Message")


@dataclass(frozen=True, slots=True)
class UploadLimits:
    """What one upload may take: none holds one of the few places for ever."""

    max_bytes: int
    idle_seconds: float  # between two messages
    seconds: float  # until the last byte

    async def in_time(self, messages: AsyncIterator[Message]) -> AsyncGenerator[Message, None]:
        """Hands messages on, as long as they come in time.

        Raises:
            UploadTooSlow: they do not.
        """
        loop = asyncio.get_running_loop()
        end = loop.time() + self.seconds
        while True:
            try:
                async with asyncio.timeout_at(min(loop.time() + self.idle_seconds, end)):
                    message = await anext(messages)
            except StopAsyncIteration:
                return
            except TimeoutError as error:
                raise self._too_slow(took_all=loop.time() >= end) from error
            yield message

    def _too_slow(self, *, took_all: bool) -> UploadTooSlow:
        if took_all:
            return UploadTooSlow(f"the upload was not complete after {self.seconds:g} seconds (--upload-seconds)")
        return UploadTooSlow(f"nothing came for {self.idle_seconds:g} seconds (--upload-idle-seconds)")


@dataclass(frozen=True, slots=True, kw_only=True)
class UploadClaim:
    """The name that an upload is to get, and which of its states the client counts on."""

    name: str  # without a version: one after the newest
    replace: bool = False
    expected_generation: int | None = None


class Upload:
    """One adapter that is being sent."""

    def __init__(self, adapters: AdapterCache, publication: Publication, claim: UploadClaim) -> None:
        self._adapters = adapters
        self._publication = publication
        self._claim = claim

    async def write(self, file: str, offset: int, data: bytes) -> None:
        """Raises InvalidRequest for bytes that are not the next ones, Overloaded when the disk is full."""
        await self._adapters.changes.run(self._publication.write, file, offset, data)

    async def publish(self, *, pin: bool) -> AdapterStatus:
        """Checks what came, gives it its place in the store, and loads it: all of it or nothing.

        Raises:
            Those of `AdapterCache.load`; StoreNotWritable.
        """
        adapters, publication = self._adapters, self._publication
        name, version = adapters.claims.parse(self._claim.name)
        async with adapters.claims.changing(name):
            await self.check_claim()
            await adapters.changes.run(publication.complete)
            copy = await adapters.loads.read(AdapterRef(name, ""), publication.folder, same_if_unchanged=False)
            await self.check_claim()  # again: a request may have loaded the current one meanwhile
            async with adapters.memory.reserve(copy.adapter.num_bytes):
                ref = await adapters.changes.run(publication.publish, name, version)
                await adapters.look(name)
            copy.adapter = replaced(copy.adapter, version=ref.version)
            adapters.catalog.restore(ref, None)
            adapters.loads.put(ref, copy, EventKind.LOADED, pin=pin)
        return adapters.board.status(ref)

    async def check_claim(self) -> None:
        """Whether the name may be had as things stand.

        Raises:
            InvalidRequest, AdapterExists, AdapterChanged.
        """
        adapters, claim = self._adapters, self._claim
        name, version = adapters.claims.parse(claim.name)
        await adapters.look(name)
        if version is not None and adapters.catalog.is_stored(AdapterRef(name, version)):
            raise version_exists(AdapterRef(name, version))
        adapters.claims.check(
            AdapterRef(name, adapters.catalog.current(name) or ""),
            taken=bool(adapters.catalog.versions(name)),
            replace=claim.replace,
            expected_generation=claim.expected_generation,
        )


class AdapterUploads:
    """Owns the uploads that are on their way."""

    def __init__(self, adapters: AdapterCache, limits: UploadLimits) -> None:
        self.limits = limits
        self._adapters = adapters
        self._num_uploads = 0

    @contextlib.asynccontextmanager
    async def receive(self, claim: UploadClaim, files: Sequence[DeclaredFile]) -> AsyncIterator[Upload]:
        """Takes an adapter's files, within; whatever is not published at the end leaves nothing behind.

        What cannot be published is refused before its first byte, as far as that can be known then.

        Raises:
            InvalidRequest, AdapterExists, AdapterChanged, Overloaded, StoreNotWritable.
        """
        publication = Publication(self._adapters.store, files)
        upload = Upload(self._adapters, publication, claim)
        check_declaration(files, self.limits.max_bytes)
        await upload.check_claim()
        if self._num_uploads >= MAX_UPLOADS:
            raise Overloaded(f"{MAX_UPLOADS} uploads are on their way already", reason="TOO_MANY_UPLOADS")
        self._num_uploads += 1
        try:
            await self._adapters.changes.run(publication.open)
            yield upload
        finally:
            self._num_uploads -= 1
            await self._adapters.changes.run(publication.close)

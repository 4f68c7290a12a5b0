"""Looks through the adapters folder from time to time, so that changes count without a restart. Event loop.

By polling, since notifications do not reach across network file systems and one watch per folder runs into the system's
limits at some thousands of adapters.
"""

import asyncio
import logging
import time
from collections.abc import Mapping

from server.errors import Overloaded, ServingError, Unavailable
from server.lora.cache import AdapterCache
from server.lora.events import EventKind
from server.lora.store import AdapterRef
from server.lora.stored_name import StoredName

log = logging.getLogger(__name__)

_REST_PER_SCAN = 100  # seconds of rest per second of scanning: a large or slow store is looked at more rarely

Names = Mapping[str, StoredName]


class StoreWatcher:
    """Brings what happens on disk to the cache.

    A difference counts once two looks in a row have seen it alike, so that a folder which is being copied or swapped
    is not taken half-way.
    """

    def __init__(self, adapters: AdapterCache, interval: float) -> None:
        """`interval`: seconds between two looks; 0: there are none."""
        self._adapters = adapters
        self._interval = interval
        self._last: Names = {}
        self._outdated: set[AdapterRef] = set()  # changed on disk, and the new content could not be taken yet
        self._failed = False
        self._scan_seconds = 0.0

    async def run(self) -> None:
        """Watches until it is cancelled."""
        while self._interval:
            await asyncio.sleep(max(self._interval, _REST_PER_SCAN * self._scan_seconds))
            try:
                await self.look()
            except Exception:  # a bug of ours must not end the watch
                log.exception("what changed in the adapters folder was not taken")

    async def look(self) -> None:
        """Looks once, and takes what has settled.

        A name that was uploaded or promoted here during the look is left for the next one: this one saw it before.
        """
        catalog = self._adapters.catalog
        known = catalog.stored()
        started = time.monotonic()
        try:
            settled = await self._adapters.disk.run(self._settled, known)
        except OSError as error:  # the whole store is away: better the adapters of before than none
            if not self._failed:
                log.error("the adapters folder cannot be read, nothing changes until it can: %s", error)
            self._failed = True
            return
        self._failed = False
        self._scan_seconds = time.monotonic() - started
        now = catalog.stored()
        await self.apply({name: found for name, found in settled.items() if now.get(name) == known.get(name)})

    async def apply(self, names: Mapping[str, StoredName | None]) -> None:
        """Takes what is on disk now: new names appear, vanished ones go, changed ones become a new generation.

        What changed to something that cannot be served is reported, and the copy in memory stays; so does one whose
        new content finds no room or a disk that fails, until a later call can take it.
        """
        adapters = self._adapters
        changes = adapters.catalog.update(names)
        adapters.board.publish(EventKind.ADDED, *changes.added)
        gone = [ref for ref in changes.removed if not adapters.catalog.knows(ref)]
        for ref in gone:
            adapters.forget(ref)
        adapters.board.publish(EventKind.REMOVED, *gone)
        adapters.board.publish(EventKind.UPDATED, *changes.rerouted)
        adapters.board.repaired(*changes.changed)
        for ref in {*changes.changed, *self._outdated}:
            await self._reload(ref)

    async def _reload(self, ref: AdapterRef) -> None:
        """Takes changed files as a new generation, if anybody has the old ones in memory."""
        adapters = self._adapters
        async with adapters.claims.changing(ref.name):
            waited = ref in self._outdated
            self._outdated.discard(ref)
            old = adapters.memory.get(ref)
            if old is None or adapters.catalog.fingerprint(ref) in (None, old.source):
                if waited:
                    adapters.board.repaired(ref)
                return
            try:
                fresh = await adapters.loads.read(ref, adapters.catalog.stored_path(ref), same_if_unchanged=True)
            except (Overloaded, Unavailable) as error:
                self._outdated.add(ref)
                adapters.board.note(ref, error.message)
                return
            except ServingError:  # shown in the listing; the old copy stays
                return
            now = adapters.memory.get(ref)  # None: it went to make room, maybe for its own successor
            if now not in (old, None) or not adapters.catalog.has(ref):
                return
            if now is old and fresh.adapter.generation == old.adapter.generation:
                old.source = fresh.source
                adapters.board.repaired(ref)
            else:
                adapters.loads.put(ref, fresh, EventKind.REPLACED)

    def _settled(self, known: Names) -> dict[str, StoredName | None]:
        """What has settled and is not known yet. Worker thread."""
        found = self._adapters.store.scan(known)
        last, self._last = self._last, found
        return {
            name: found.get(name)
            for name in found.keys() | known.keys()
            if found.get(name) != known.get(name) and found.get(name) == last.get(name)
        }

"""What the world may know of adapters: listings, and events for those who watch. Event loop."""

from collections.abc import AsyncGenerator

from server.lora.catalog import AdapterCatalog
from server.lora.events import AdapterEvent, AdapterEvents, AdapterStatus, EventKind
from server.lora.host_memory import HostMemory
from server.lora.loader import AdapterLoader
from server.lora.store import AdapterRef, num_bytes


class StatusBoard:
    """Owns the refusals; all else it reads from its owners."""

    def __init__(self, catalog: AdapterCatalog, memory: HostMemory, loader: AdapterLoader) -> None:
        self.events = AdapterEvents()
        self._catalog = catalog
        self._memory = memory
        self._loader = loader
        self._refusals: dict[AdapterRef, str] = {}  # why the last load was refused

    def status(self, ref: AdapterRef) -> AdapterStatus:
        copy = self._memory.get(ref)
        return AdapterStatus(
            ref,
            copy.adapter if copy else None,
            generation=self._loader.generation(ref),
            num_users=copy.num_users if copy else 0,
            num_waiting=self._memory.num_awaiting(ref),
            pinned=self._memory.is_pinned(ref),
            current=self._catalog.current(ref.name) == ref.version,
            traffic_percent=self._catalog.routing(ref.name).percent_by_version.get(ref.version, 0),
            error=self._refusals.get(ref, ""),
            num_bytes_disk=num_bytes(self._catalog.fingerprint(ref)),
        )

    def statuses(self, after: AdapterRef | None = None, limit: int | None = None) -> list[AdapterStatus]:
        """Every version of every adapter that requests may name, in order."""
        return [self.status(ref) for ref in self._catalog.refs(after, limit)]

    async def watch(self) -> AsyncGenerator[AdapterEvent, None]:
        """Every adapter, then everything that happens; what `status` says of them is to be asked as late as possible.

        Raises:
            Overloaded, Unavailable.
        """
        with self.events.watch() as watch:
            for ref in self._catalog.refs():
                yield AdapterEvent(EventKind.SNAPSHOT, ref)
            yield AdapterEvent(EventKind.SYNCED, None)
            while True:
                for event in await watch.next():
                    yield event

    def publish(self, kind: EventKind, *refs: AdapterRef) -> None:
        if refs:
            self.events.publish([AdapterEvent(kind, ref) for ref in refs])

    def refused(self, ref: AdapterRef, message: str) -> None:
        """A load failed; names that nobody has are not remembered."""
        if self._catalog.knows(ref):
            self._refusals[ref] = message
            self.publish(EventKind.FAILED, ref)

    def clear(self, ref: AdapterRef) -> None:
        """Whatever was wrong with it is of the past."""
        self._refusals.pop(ref, None)

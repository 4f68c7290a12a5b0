"""What the world may know of adapters: listings, and events for those who watch. Event loop."""

from collections import Counter
from collections.abc import AsyncGenerator, Iterator
from contextlib import contextmanager

from server.lora.catalog import AdapterCatalog
from server.lora.events import AdapterEvent, AdapterEvents, AdapterStatus, EventKind
from server.lora.fingerprint import num_bytes
from server.lora.host_memory import HostMemory
from server.lora.loader import AdapterLoader
from server.lora.store import AdapterRef


class StatusBoard:
    """Owns the refusals; all else it reads from its owners."""

    def __init__(self, catalog: AdapterCatalog, memory: HostMemory, loader: AdapterLoader) -> None:
        self.events = AdapterEvents()
        self._catalog = catalog
        self._memory = memory
        self._loader = loader
        self._refusals: dict[AdapterRef, str] = {}  # why a version's files cannot be loaded
        self._notes: dict[AdapterRef, str] = {}  # or not yet
        self._loading: Counter[AdapterRef] = Counter()

    def status(self, ref: AdapterRef) -> AdapterStatus:
        copy = self._memory.get(ref)
        return AdapterStatus(
            ref,
            copy.adapter if copy else None,
            last=self._loader.last(ref),
            num_users=copy.num_users if copy else 0,
            num_waiting=self._memory.num_awaiting(ref),
            loading=bool(self._loading[ref]),
            pinned=self._memory.is_pinned(ref),
            current=self._catalog.current(ref.name) == ref.version,
            traffic_percent=self._catalog.routing(ref.name).percent_by_version.get(ref.version, 0),
            error=self._refusals.get(ref) or self._notes.get(ref, ""),
            num_bytes_disk=num_bytes(self._catalog.fingerprint(ref)),
        )

    def statuses(self, after: AdapterRef | None = None, limit: int | None = None) -> list[AdapterStatus]:
        """Every version of every adapter that requests may name, in order."""
        return [self.status(ref) for ref in self._catalog.refs(after, limit)]

    def draining(self) -> list[AdapterStatus]:
        """The copies that have lost their name and whose requests still run, in order of names and generations."""
        statuses = [
            AdapterStatus(AdapterRef(of.name, of.version), of, num_users=copy.num_users, draining=True)
            for copy in self._memory.retired.in_use()
            for of in [copy.adapter]
        ]
        return sorted(statuses, key=lambda status: (*status.ref.sort_key, status.generation))

    @contextmanager
    def loading(self, ref: AdapterRef) -> Iterator[None]:
        """A version is on its way into memory, within."""
        self._loading[ref] += 1
        try:
            yield
        finally:
            self._loading[ref] -= 1
            if not self._loading[ref]:
                del self._loading[ref]

    def refuses(self, ref: AdapterRef) -> bool:
        """Whether requests for it are refused, as its files were and nothing of it is in memory."""
        return ref in self._refusals and self._memory.get(ref) is None

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

    def refused(self, ref: AdapterRef, message: str, *, lasting: bool) -> None:
        """A load failed; of names that nobody has nothing is told.

        Args:
            lasting: the next load will fail as well, so it is remembered until other files come or a load succeeds, and
                a bare name means another version as long as there is one.
        """
        if not self._catalog.knows(ref):
            return
        before = self._catalog.current(ref.name)
        if lasting:
            self._refusals[ref] = message
        self.events.publish([AdapterEvent(EventKind.FAILED, ref, message)])
        now = self._catalog.current(ref.name)
        if now and now != before:
            self.publish(EventKind.UPDATED, AdapterRef(ref.name, now))

    def note(self, ref: AdapterRef, message: str) -> None:
        """Why what is in memory is not what is on the disk yet; nothing is told."""
        self._notes[ref] = message

    def clear(self, ref: AdapterRef) -> None:
        """Whatever was wrong with it is of the past."""
        self._refusals.pop(ref, None)
        self._notes.pop(ref, None)

    def repaired(self, *refs: AdapterRef) -> None:
        """`clear`, when nothing else is told of them."""
        refused = [ref for ref in refs if ref in self._refusals or ref in self._notes]
        for ref in refused:
            self.clear(ref)
        self.publish(EventKind.UPDATED, *refused)

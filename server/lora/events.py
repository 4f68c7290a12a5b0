"""What happens to adapters, told to whoever watches. Event loop."""

import asyncio
import enum
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from server.errors import Overloaded, ServingError, Unavailable
from server.lora.adapter import Adapter
from server.lora.loader import LastLoad
from server.lora.store import AdapterRef

MAX_WATCHERS = 100
MAX_BEHIND = 1000  # happenings that a watcher may leave unread, each with an event for every adapter it is of


@dataclass(frozen=True, slots=True)
class AdapterStatus:
    """What is told of one version of an adapter."""

    ref: AdapterRef
    adapter: Adapter | None  # None: on disk only
    last: LastLoad | None = None  # None: it was never loaded
    num_users: int = 0
    num_waiting: int = 0  # requests that wait for its load
    loading: bool = False  # it is being read, or waits for room
    draining: bool = False  # the name means something else by now, or nothing
    pinned: bool = False
    current: bool = False  # what the bare name means
    traffic_percent: int = 0
    error: str = ""
    num_bytes_disk: int = 0  # of its files in the store

    @property
    def generation(self) -> int:
        """Of the weights in memory or of the last load; 0: there was none yet."""
        known = self.adapter or self.last
        return known.generation if known else 0

    @property
    def answers(self) -> bool:
        """Whether a request for it would be answered; one on disk is loaded by its first request."""
        return self.adapter is not None or not self.error


class EventKind(enum.Enum):
    SNAPSHOT = enum.auto()  # was there when the watch began
    SYNCED = enum.auto()  # the snapshot is complete; of no adapter
    ADDED = enum.auto()  # appeared in the store
    LOADED = enum.auto()
    REPLACED = enum.auto()  # a new generation has the name
    UNLOADED = enum.auto()  # the name was taken away
    EVICTED = enum.auto()  # left host memory to make room, and is not merged any more
    REMOVED = enum.auto()  # went from the store
    FAILED = enum.auto()  # a load was refused; what was loaded stays
    UPDATED = enum.auto()  # pinned, unpinned, promoted, another share of the traffic, merged or unmerged, repaired


@dataclass(frozen=True, slots=True)
class AdapterEvent:
    """Names an adapter and does not hold it, so that a watcher which does not read keeps no weights alive."""

    kind: EventKind
    ref: AdapterRef | None  # None: SYNCED
    error: str = ""  # of FAILED


class Watch:
    """One watcher's unread events, and at their end the reason why there are no more."""

    def __init__(self) -> None:
        self._unread: asyncio.Queue[Sequence[AdapterEvent] | ServingError] = asyncio.Queue()
        self._ended = False

    async def next(self) -> Sequence[AdapterEvent]:
        """Raises Overloaded when the watcher fell behind, Unavailable when the server stops."""
        events = await self._unread.get()
        if isinstance(events, ServingError):
            raise events
        return events

    def put(self, events: Sequence[AdapterEvent]) -> None:
        """However many they are, they count as one: what happens to all adapters at once sends nobody away."""
        if self._unread.qsize() >= MAX_BEHIND:
            text = f"the watcher left events of {MAX_BEHIND} happenings unread; watch again for a fresh snapshot"
            self.end(Overloaded(text, reason="SLOW_WATCHER"))
        elif not self._ended:
            self._unread.put_nowait(events)

    def end(self, error: ServingError) -> None:
        if not self._ended:
            self._ended = True
            self._unread.put_nowait(error)


class AdapterEvents:
    """Owns the watchers. One that reads too slowly is sent away; it never holds up anybody."""

    def __init__(self) -> None:
        self._watches: set[Watch] = set()
        self._closed = False

    @property
    def num_watchers(self) -> int:
        return len(self._watches)

    @contextmanager
    def watch(self) -> Iterator[Watch]:
        """Hears of everything from now on.

        Raises:
            Overloaded, Unavailable.
        """
        if self._closed:
            raise Unavailable("the server is draining", reason="DRAINING")
        if self.num_watchers >= MAX_WATCHERS:
            raise Overloaded(f"{MAX_WATCHERS} clients are watching already", reason="TOO_MANY_WATCHERS")
        watch = Watch()
        self._watches.add(watch)
        try:
            yield watch
        finally:
            self._watches.remove(watch)

    def publish(self, events: Sequence[AdapterEvent]) -> None:
        for watch in self._watches:
            watch.put(events)

    def close(self) -> None:
        """Sends all watchers away: the server stops."""
        self._closed = True
        for watch in self._watches:
            watch.end(Unavailable("the server is draining", reason="DRAINING"))

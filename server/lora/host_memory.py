"""Adapters in host memory: who is there, who is in use, who goes first. Event loop."""

import asyncio
from collections import Counter, OrderedDict
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass

from server.errors import Overloaded
from server.lora.adapter import Adapter
from server.lora.store import AdapterRef, Fingerprint

EvictFromDevice = Callable[[Adapter], Awaitable[int]]
RevokeFromRequests = Callable[[Adapter], None]


class NotAwaited(Exception):
    """A copy need not wait for room any more: it is here already, or nobody waits for it."""


class HostCopy:
    """An adapter in memory, the state of the files it came from, and how many requests use it."""

    def __init__(self, adapter: Adapter, source: Fingerprint | None) -> None:
        self.adapter = adapter
        self.source = source
        self.num_users = 0
        self.unused = asyncio.Event()
        self.unused.set()


@dataclass(frozen=True, slots=True)
class FreedBytes:
    """Memory that an unload gave back."""

    device: int
    host: int


class HostMemory:
    """Owns the host copies, under one limit of bytes.

    A copy stays until room is needed and nobody uses it; the least recently used one goes first, and a pinned one
    never. Who waits for room gets it in order of arrival. Taking a copy's name away never disturbs the requests that
    still use it.
    """

    def __init__(self, max_bytes: int, evicted: Callable[[AdapterRef], None]) -> None:
        """`evicted` hears of every copy that goes to make room."""
        self.max_bytes = max_bytes
        self._evicted = evicted
        self._copies: OrderedDict[AdapterRef, HostCopy] = OrderedDict()  # least recently used first
        self._pinned: set[AdapterRef] = set()
        self._retiring: dict[
            asyncio.Task[FreedBytes], tuple[AdapterRef, HostCopy]
        ] = {}  # without a name, not freed yet
        self._reserved = 0  # bytes of adapters that are being read
        self._awaited: Counter[AdapterRef] = Counter()  # requests that wait for a copy to be here
        self._waiting: list[AdapterRef] = []  # for room, in order of arrival
        self._kept: frozenset[AdapterRef] = frozenset()
        self._changed = asyncio.Event()  # there may be more room than before
        self._evict_from_device: EvictFromDevice | None = None
        self._revoke: RevokeFromRequests | None = None

    def connect(self, evict_from_device: EvictFromDevice, revoke: RevokeFromRequests) -> None:
        """Tells how to take an adapter off the device, and from the requests that run on it."""
        self._evict_from_device = evict_from_device
        self._revoke = revoke

    def __len__(self) -> int:
        return len(self._copies)

    @property
    def num_bytes(self) -> int:
        """Memory of all copies, those included that have lost their name but are still in use."""
        retiring = sum(copy.adapter.num_bytes for _, copy in self._retiring.values())
        return retiring + sum(copy.adapter.num_bytes for copy in self._copies.values())

    @property
    def num_pinned_bytes(self) -> int:
        return sum(self._copies[ref].adapter.num_bytes for ref in self._pinned)

    def adapters(self) -> list[Adapter]:
        """Those that have a name. Any thread."""
        return [copy.adapter for copy in tuple(self._copies.values())]

    def get(self, ref: AdapterRef) -> HostCopy | None:
        return self._copies.get(ref)

    @contextmanager
    def using(self, ref: AdapterRef) -> Iterator[Adapter]:
        """A request uses the copy, within."""
        copy = self._copies[ref]
        self._copies.move_to_end(ref)
        copy.num_users += 1
        copy.unused.clear()
        try:
            yield copy.adapter
        finally:
            copy.num_users -= 1
            if not copy.num_users:
                copy.unused.set()
                self._changed.set()

    def put(self, ref: AdapterRef, copy: HostCopy) -> None:
        """Gives the name to a copy; requests on the one before finish on it."""
        old = self._copies.pop(ref, None)
        self._copies[ref] = copy
        if old is not None:
            self._retire(ref, old)
        self._changed.set()  # whoever loads the same waits in vain

    def num_awaiting(self, ref: AdapterRef) -> int:
        """Requests that wait for a copy to be here."""
        return self._awaited[ref]

    @contextmanager
    def awaiting(self, ref: AdapterRef) -> Iterator[None]:
        """One request waits for a copy, within; once that is here it stays until the request has seen it."""
        self._awaited[ref] += 1
        try:
            yield
        finally:
            self._awaited[ref] -= 1
            if not self._awaited[ref]:
                del self._awaited[ref]
                self._changed.set()

    def pin(self, ref: AdapterRef) -> None:
        assert ref in self._copies
        self._pinned.add(ref)

    def unpin(self, ref: AdapterRef) -> None:
        self._pinned.discard(ref)
        self._changed.set()

    def is_pinned(self, ref: AdapterRef) -> bool:
        return ref in self._pinned

    def remove(self, ref: AdapterRef) -> "asyncio.Task[FreedBytes] | None":
        """Takes the name from a copy; the task ends when its last request is done and its memory is free."""
        self._pinned.discard(ref)
        copy = self._copies.pop(ref, None)
        return None if copy is None else self._retire(ref, copy)

    def retiring(self, name: str, version: str | None) -> "list[asyncio.Task[FreedBytes]]":
        """The copies that have lost this name, or one version of it, and are still in use."""
        return [
            task for task, (ref, _) in self._retiring.items() if ref.name == name and version in (None, ref.version)
        ]

    def revoke(self, task: "asyncio.Task[FreedBytes]") -> None:
        """Ends the requests that still use a copy which lost its name; without any it may be leaving the device."""
        if task in self._retiring and self._revoke is not None and self._retiring[task][1].num_users:
            self._revoke(self._retiring[task][1].adapter)

    def has_room(self, num_bytes: int) -> bool:
        """Whether nobody waits for room, and there is enough of it, or will be as soon as idle copies go."""
        going = sum(self._copies[ref].adapter.num_bytes for ref in self._idle())
        return not self._waiting and self.num_bytes + self._reserved - going + num_bytes <= self.max_bytes

    @contextmanager
    def keeping(self, sizes: Mapping[AdapterRef, int]) -> Iterator[None]:
        """Within, these adapters come before all others that wait, and stay once they are here.

        One set at a time: two could keep each other out.

        Args:
            sizes: bytes of each as far as they are known, or 0.

        Raises:
            Overloaded: they cannot be here together, whoever leaves.
        """
        assert not self._kept
        self._kept = frozenset(sizes)
        self._changed.set()  # some that wait are next now
        try:
            if sum(sizes.values()) + self._num_kept_bytes(besides=sizes) > self.max_bytes:
                raise self._no_room(sum(sizes.values()))
            yield
        finally:
            self._kept = frozenset()
            self._changed.set()

    @asynccontextmanager
    async def reserve(self, num_bytes: int, wait_for: AdapterRef | None = None) -> AsyncIterator[None]:
        """Makes room for a copy, and holds it until the copy counts itself.

        Args:
            wait_for: what the copy will be, if it waits until requests leave the room that they use.

        Raises:
            Overloaded: there is no room, or there can be none whoever leaves.
            NotAwaited: to wait longer would only keep others out.
        """
        if wait_for is not None:
            self._waiting.append(wait_for)
        try:
            while not await self._make_room(num_bytes, wait_for):
                if wait_for in self._copies or wait_for not in self._awaited:
                    raise NotAwaited
                self._changed.clear()
                await self._changed.wait()
        finally:
            if wait_for is not None:
                self._waiting.remove(wait_for)
                self._changed.set()  # it is the next one's turn
        self._reserved += num_bytes
        try:
            yield
        finally:
            self._reserved -= num_bytes
            self._changed.set()

    async def _make_room(self, num_bytes: int, wait_for: AdapterRef | None) -> bool:
        """Whether there is room now; False: it is to be waited for."""
        if wait_for is not None and not self._is_next(wait_for):
            return False
        while self.num_bytes + self._reserved + num_bytes > self.max_bytes:
            kept = self._num_kept_bytes(besides=[wait_for]) if wait_for in self._kept else self.num_pinned_bytes
            idle = next(self._idle(), None)
            if kept + num_bytes > self.max_bytes or (idle is None and wait_for is None):
                raise self._no_room(num_bytes)
            if idle is None:
                return False
            freeing = self._retire(idle, self._copies.pop(idle))
            self._evicted(idle)
            await asyncio.shield(freeing)  # the copy has lost its name, and must be freed whoever stops waiting
        return True

    def _is_next(self, ref: AdapterRef) -> bool:
        return ref in self._kept or (ref == self._waiting[0] and self._kept.isdisjoint(self._waiting))

    def _idle(self) -> Iterator[AdapterRef]:
        """Copies that may go, the least recently used first."""
        kept = self._pinned | self._kept | self._awaited.keys()
        return (ref for ref, copy in self._copies.items() if not copy.num_users and ref not in kept)

    def _num_kept_bytes(self, besides: Collection[AdapterRef | None]) -> int:
        kept = (self._pinned | self._kept) & self._copies.keys()
        return sum(self._copies[ref].adapter.num_bytes for ref in kept if ref not in besides)

    def _no_room(self, num_bytes: int) -> Overloaded:
        return Overloaded(
            f"{num_bytes:,} bytes do not fit beside {self.num_bytes + self._reserved:,} of other adapters, of which "
            f"{self.num_pinned_bytes:,} are pinned; the limit is {self.max_bytes:,} (--adapter-host-bytes)",
            reason="ADAPTER_MEMORY",
        )

    def _retire(self, ref: AdapterRef, copy: HostCopy) -> "asyncio.Task[FreedBytes]":
        task = asyncio.create_task(self._free(copy))
        self._retiring[task] = ref, copy
        task.add_done_callback(self._retired)
        return task

    def _retired(self, task: "asyncio.Task[FreedBytes]") -> None:
        del self._retiring[task]
        self._changed.set()
        if not task.cancelled():
            task.exception()  # whoever waits for the task hears of it; nobody has to

    async def _free(self, copy: HostCopy) -> FreedBytes:
        await copy.unused.wait()
        on_device = await self._evict_from_device(copy.adapter) if self._evict_from_device else 0
        return FreedBytes(on_device, copy.adapter.num_bytes)

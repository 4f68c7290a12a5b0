"""Adapters in host memory: who is there, who is in use, who goes first. Event loop."""

import asyncio
from collections import Counter, OrderedDict
from collections.abc import AsyncIterator, Callable, Collection, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager

from server.errors import Overloaded
from server.lora.adapter import Adapter
from server.lora.host_copy import FreedBytes, HostCopy, RetiredCopies
from server.lora.store import AdapterRef


class NotAwaited(Exception):
    """A copy need not wait for room any more: it is here already, or nobody waits for it."""


class HostMemory:
    """Owns the host copies, under one limit of bytes.

    A copy stays until room is needed and nobody uses it; the least recently used one goes first, and one that is pinned
    or that an operator merged never. Who waits for room gets it in order of arrival. Taking a copy's name away never
    disturbs the requests that still use it.
    """

    def __init__(self, max_bytes: int, evicted: Callable[[AdapterRef], None]) -> None:
        """`evicted` hears of every copy that goes to make room."""
        self.max_bytes = max_bytes
        self._evicted = evicted
        self._copies: OrderedDict[AdapterRef, HostCopy] = OrderedDict()  # least recently used first
        self._pinned: set[AdapterRef] = set()
        self._merged: Adapter | None = None
        self._reserved = 0  # bytes of adapters that are being read
        self._awaited: Counter[AdapterRef] = Counter()  # requests that wait for a copy to be here
        self._waiting: list[AdapterRef] = []  # for room, in order of arrival
        self._kept: frozenset[AdapterRef] = frozenset()
        self._changed = asyncio.Event()  # there may be more room than before
        self.retired = RetiredCopies(self._changed.set)

    def __len__(self) -> int:
        return len(self._copies)

    @property
    def num_bytes(self) -> int:
        """Memory of all copies, those included that have lost their name but are still in use."""
        return self.retired.num_bytes + sum(copy.adapter.num_bytes for copy in self._copies.values())

    @property
    def num_pinned_bytes(self) -> int:
        """Of what stays until an operator lets it go: pinned copies, and the merged one."""
        return sum(self._copies[ref].adapter.num_bytes for ref in self._staying())

    def adapters(self) -> list[Adapter]:
        """Those that have a name. Any thread."""
        return [copy.adapter for copy in tuple(self._copies.values())]

    def get(self, ref: AdapterRef) -> HostCopy | None:
        return self._copies.get(ref)

    def holds(self, adapter: Adapter) -> bool:
        """Whether its name still means this very copy."""
        copy = self._copies.get(AdapterRef(adapter.name, adapter.version))
        return copy is not None and copy.adapter is adapter

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
            self.retired.add(ref, old)
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

    def keep_merged(self, adapter: Adapter | None) -> None:
        """This one is merged now, and stays until another is, or none."""
        self._merged = adapter
        self._changed.set()

    def remove(self, ref: AdapterRef) -> "asyncio.Task[FreedBytes] | None":
        """Takes the name from a copy; the task ends when its last request is done and its memory is free."""
        self._pinned.discard(ref)
        copy = self._copies.pop(ref, None)
        return None if copy is None else self.retired.add(ref, copy)

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
            freeing = self.retired.add(idle, self._copies.pop(idle), makes_room=True)
            self._evicted(idle)
            await asyncio.shield(freeing)  # the copy has lost its name, and must be freed whoever stops waiting
        return True

    def _is_next(self, ref: AdapterRef) -> bool:
        return ref in self._kept or (ref == self._waiting[0] and self._kept.isdisjoint(self._waiting))

    def _staying(self) -> set[AdapterRef]:
        """Copies that only an operator lets go."""
        merged = self._merged
        if merged is None or not self.holds(merged):
            return self._pinned
        return self._pinned | {AdapterRef(merged.name, merged.version)}

    def _idle(self) -> Iterator[AdapterRef]:
        """Copies that may go, the least recently used first."""
        kept = self._staying() | self._kept | self._awaited.keys()
        return (ref for ref, copy in self._copies.items() if not copy.num_users and ref not in kept)

    def _num_kept_bytes(self, besides: Collection[AdapterRef | None]) -> int:
        kept = (self._staying() | self._kept) & self._copies.keys()
        return sum(self._copies[ref].adapter.num_bytes for ref in kept if ref not in besides)

    def _no_room(self, num_bytes: int) -> Overloaded:
        return Overloaded(
            f"{num_bytes:,} bytes do not fit beside {self.num_bytes + self._reserved:,} of other adapters, of which "
            f"{self.num_pinned_bytes:,} are pinned or merged; the limit is {self.max_bytes:,} (--adapter-host-bytes)",
            reason="ADAPTER_MEMORY",
        )

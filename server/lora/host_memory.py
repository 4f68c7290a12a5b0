"""Adapters in host memory: who is there, who is in use, who goes first. Event loop."""

import asyncio
from collections import OrderedDict
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager, nullcontext
from dataclasses import dataclass

from server.errors import Overloaded
from server.lora.adapter import Adapter
from server.lora.store import AdapterRef, Fingerprint

EvictFromDevice = Callable[[Adapter], Awaitable[int]]
RevokeFromRequests = Callable[[Adapter], None]


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
        self._queue = asyncio.Lock()  # held by whoever waits for room; the others wait for it
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
        """Ends the requests that still use a copy which lost its name."""
        if task in self._retiring and self._revoke is not None:
            self._revoke(self._retiring[task][1].adapter)

    def has_room(self, num_bytes: int, beside: Collection[AdapterRef] = ()) -> bool:
        """Whether nobody waits for room, and there is enough of it, or will be as soon as idle copies go."""
        going = sum(self._copies[ref].adapter.num_bytes for ref in self._idle(beside))
        return not self._queue.locked() and self.num_bytes + self._reserved - going + num_bytes <= self.max_bytes

    def check_fits(self, sizes: Mapping[AdapterRef, int]) -> None:
        """Raises Overloaded for copies that could not be here together, were nobody else served."""
        pinned = self.num_pinned_bytes - sum(
            self._copies[ref].adapter.num_bytes for ref in sizes if self.is_pinned(ref)
        )
        if sum(sizes.values()) > self.max_bytes - pinned:
            raise self._no_room(sum(sizes.values()))

    @asynccontextmanager
    async def reserve(
        self, num_bytes: int, *, wait: bool = False, beside: Collection[AdapterRef] = ()
    ) -> AsyncIterator[None]:
        """Makes room for a copy, and holds it until the copy counts itself.

        Args:
            wait: until requests leave the room that they use.
            beside: copies that do not go.

        Raises:
            Overloaded: there is none, or there can be none whoever leaves.
        """
        async with self._queue if wait else nullcontext():
            await self._make_room(num_bytes, wait, beside)
            self._reserved += num_bytes
        try:
            yield
        finally:
            self._reserved -= num_bytes
            self._changed.set()

    async def _make_room(self, num_bytes: int, wait: bool, beside: Collection[AdapterRef]) -> None:
        while self.num_bytes + self._reserved + num_bytes > self.max_bytes:
            kept = self._pinned.union(beside) & self._copies.keys()
            can_fit = num_bytes + sum(self._copies[ref].adapter.num_bytes for ref in kept) <= self.max_bytes
            idle = next(self._idle(beside), None)
            if can_fit and idle is not None:  # what cannot fit sends nobody away
                self._evicted(idle)
                # Shielded: the copy has lost its name, and must be freed whoever stops waiting.
                await asyncio.shield(self._retire(idle, self._copies.pop(idle)))
            elif can_fit and wait:
                self._changed.clear()
                await self._changed.wait()
            else:
                raise self._no_room(num_bytes)

    def _idle(self, beside: Collection[AdapterRef]) -> Iterator[AdapterRef]:
        """Copies that may go, the least recently used first."""
        kept = self._pinned.union(beside)
        return (ref for ref, copy in self._copies.items() if not copy.num_users and ref not in kept)

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

"""A copy of an adapter in host memory, and what becomes of it when its name goes. Event loop."""

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from server.lora.adapter import Adapter
from server.lora.fingerprint import Fingerprint
from server.lora.store import AdapterRef


class HostCopy:
    """An adapter in memory, the state of the files it came from, and how many requests use it."""

    def __init__(self, adapter: Adapter, source: Fingerprint | None, load_seconds: float) -> None:
        """`load_seconds`: for reading, checking and copying it, without any wait for room."""
        self.adapter = adapter
        self.source = source
        self.load_seconds = load_seconds
        self.num_users = 0
        self.unused = asyncio.Event()
        self.unused.set()


@dataclass(frozen=True, slots=True)
class FreedBytes:
    """Memory that an unload gave back."""

    device: int
    host: int


# Takes an adapter off the device, to make room in host memory or not; answers with what it had besides the host's copy.
EvictFromDevice = Callable[[Adapter, bool], Awaitable[FreedBytes]]
RevokeFromRequests = Callable[[Adapter], None]


class RetiredCopies:
    """Owns the copies that have lost their name, until their last request is done and their memory is free."""

    def __init__(self, freed: Callable[[], None]) -> None:
        """`freed` is called whenever one of them has gone."""
        self._freed = freed
        self._copies: dict[asyncio.Task[FreedBytes], tuple[AdapterRef, HostCopy]] = {}
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
        return sum(copy.adapter.num_bytes for _, copy in self._copies.values())

    def add(self, ref: AdapterRef, copy: HostCopy, *, makes_room: bool = False) -> "asyncio.Task[FreedBytes]":
        """Takes a copy over; the task ends when it is free.

        Args:
            makes_room: nobody took its name away, others need its place.
        """
        task = asyncio.create_task(self._free(copy, makes_room))
        self._copies[task] = ref, copy
        task.add_done_callback(self._gone)
        return task

    def of(self, name: str, version: str | None) -> "list[asyncio.Task[FreedBytes]]":
        """Those that had this name, or one version of it."""
        return [task for task, (ref, _) in self._copies.items() if ref.name == name and version in (None, ref.version)]

    def in_use(self, name: str | None = None, version: str | None = None) -> list[HostCopy]:
        """Those whose requests still run, all or those that had this name, or one version of it."""
        return [
            copy
            for ref, copy in self._copies.values()
            if copy.num_users and name in (None, ref.name) and version in (None, ref.version)
        ]

    def revoke(self, task: "asyncio.Task[FreedBytes]") -> None:
        """Ends the requests that still use a copy; without any it may be leaving the device."""
        if task in self._copies and self._revoke is not None and self._copies[task][1].num_users:
            self._revoke(self._copies[task][1].adapter)

    def _gone(self, task: "asyncio.Task[FreedBytes]") -> None:
        del self._copies[task]
        self._freed()
        if not task.cancelled():
            task.exception()  # whoever waits for the task hears of it; nobody has to

    async def _free(self, copy: HostCopy, makes_room: bool) -> FreedBytes:
        await copy.unused.wait()
        freed = FreedBytes(0, 0)
        if self._evict_from_device is not None:
            freed = await self._evict_from_device(copy.adapter, makes_room)
        return FreedBytes(freed.device, freed.host + copy.adapter.num_bytes)

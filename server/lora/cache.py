"""Adapters by name, in host memory when a request or an operator needs them. Event loop."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Sequence

from server.errors import AdapterInUse, AdapterNotFound, DamagedAdapter, IncompatibleAdapter, InvalidAdapter
from server.lora.adapter import Adapter
from server.lora.catalog import AdapterCatalog
from server.lora.claims import NameClaims
from server.lora.digests import recorded_digest
from server.lora.disk import read_errors
from server.lora.disk_workers import DiskWorkers
from server.lora.events import AdapterStatus, EventKind
from server.lora.host_copy import EvictFromDevice, FreedBytes, RevokeFromRequests
from server.lora.host_memory import HostMemory
from server.lora.loader import AdapterLoader
from server.lora.loads import AdapterLoads
from server.lora.served_base import ServedBase
from server.lora.status_board import StatusBoard
from server.lora.store import AdapterRef, AdapterStore, parse_reference
from server.lora.tier import AdapterTier
from server.lora.unload_mode import UnloadMode
from server.metrics import Metrics

Found = Sequence[tuple[Adapter, AdapterTier]]  # what a request holds, and where it was


class AdapterCache:
    """Brings adapters into host memory when requests or operators ask, and says what each name means.

    Changes of one name come one after the other. Whatever a name is given to, requests that run on the weights it meant
    before finish on them.
    """

    def __init__(self, store: AdapterStore, served: ServedBase, *, max_bytes: int, metrics: Metrics) -> None:
        self.store = store
        self.catalog = AdapterCatalog(store, lambda ref: self.board.refuses(ref))
        self.memory = HostMemory(max_bytes, self._evicted)
        self.disk = DiskWorkers("look")  # at what is there
        self.changes = DiskWorkers("change")  # of what is there, which wait for clients and for the store's lock
        self.loader = AdapterLoader(served, self.memory)
        self.claims = NameClaims(store.reserved, self.loader)
        self.board = StatusBoard(self.catalog, self.memory, self.loader)
        self.metrics = metrics
        self._mixing = asyncio.Lock()  # held by the mixture whose parts are kept while others of it wait for room
        self.loads = AdapterLoads(self.catalog, self.memory, self.loader, self.board, metrics)
        metrics.adapters.watch("host", self.memory.adapters)

    def connect(self, evict_from_device: EvictFromDevice, revoke: RevokeFromRequests) -> None:
        """Tells how to take an adapter off the device and from requests; until then there are none."""
        self.memory.retired.connect(evict_from_device, revoke)

    @contextlib.asynccontextmanager
    async def acquire(self, reference: str, label: str = "") -> AsyncIterator[Adapter]:
        """`hold` for one adapter, within."""
        with contextlib.ExitStack() as held:
            [(adapter, _)] = await self.hold([reference], held, label)
            yield adapter

    async def hold(self, references: Sequence[str], held: contextlib.ExitStack, label: str = "") -> Found:
        """Brings the adapters of a request into host memory, as soon as there is room, and keeps them there until
        `held` is closed.

        One that waits holds nothing, but for a mixture whose turn it is; so no two wait for each other. A bare name
        whose newest version is found to be broken means the one before.

        Args:
            label: requests with the same one are always part of the same share of a name's traffic.

        Returns:
            Each adapter, and whether it was on the host already or only on disk.

        Raises:
            InvalidRequest, AdapterNotFound, InvalidAdapter, IncompatibleAdapter, DamagedAdapter, AdapterChanged,
            Overloaded, Unavailable.
        """
        refs = await self._resolve_all(references, label)
        while True:
            try:
                return await self._hold(refs, held)
            except (InvalidAdapter, IncompatibleAdapter, DamagedAdapter):
                refused, refs = refs, await self._resolve_all(references, label)
                if refs == refused:
                    raise

    async def load(
        self,
        name: str,
        source: str = "",
        *,
        replace: bool = False,
        expected_generation: int | None = None,
        pin: bool = False,
    ) -> Adapter:
        """Loads an adapter under a name, from the folder `source` or from the store's own folder of that name.

        Everything is checked before the name changes hands. With `expected_generation` exactly that generation is
        replaced (0: none was loaded), or nothing.

        Raises:
            Those of `hold`; AdapterExists.
        """
        bare_name, version = self.claims.parse(name)
        async with self.claims.changing(bare_name):
            await self.look(bare_name)
            if source:
                folder = await self.disk.run(self.store.source, source)
                ref = self.catalog.source_ref(bare_name, version)
            else:
                ref = self.catalog.find(bare_name, version)
                folder = self.catalog.stored_path(ref) if self.catalog.is_stored(ref) else self.catalog.path(ref)
            # Another folder under a name that has files is a change of the name, in memory or not.
            taken = self.memory.get(ref) is not None or (bool(source) and self.catalog.has(ref))
            self.claims.check(ref, taken=taken, replace=replace, expected_generation=expected_generation)
            copy = await self.loads.read(ref, folder, same_if_unchanged=False)
            # Again: a request may have loaded it meanwhile.
            self.claims.check(ref, taken=taken, replace=replace, expected_generation=expected_generation)
            self.catalog.restore(ref, folder if source or not self.catalog.is_stored(ref) else None)
            self.loads.put(ref, copy, EventKind.REPLACED if taken else EventKind.LOADED, pin=pin)
        return copy.adapter

    async def unload(self, name: str, mode: UnloadMode = UnloadMode.DRAIN) -> FreedBytes:
        """Takes a name away at once, all its versions or one, and frees the memory when the last request is done.

        Raises:
            InvalidRequest, AdapterNotFound, AdapterInUse.
        """
        bare_name, version = parse_reference(name, "name")
        refs = [ref for ref in self.catalog.versions(bare_name) if version in (None, ref.version)]
        draining = self.memory.retired.of(bare_name, version) if mode is UnloadMode.FORCE else []
        if not refs and not draining:
            raise AdapterNotFound(name)
        copies = [copy for ref in refs if (copy := self.memory.get(ref)) is not None]
        num_users = sum(copy.num_users for copy in [*copies, *self.memory.retired.in_use(bare_name, version)])
        num_waiting = sum(map(self.memory.num_awaiting, refs))
        if mode is UnloadMode.IF_IDLE and (num_users or num_waiting):
            raise AdapterInUse(
                f"adapter {name} is used by {num_users} requests, those on earlier generations too, and awaited by "
                f"{num_waiting}; mode IF_IDLE unloads it only with none, DRAIN lets them finish, FORCE ends them"
            )
        self.catalog.take_away(bare_name, version)
        tasks = [task for ref in refs if (task := self.forget(ref)) is not None] + draining
        self.board.publish(EventKind.UNLOADED, *refs)
        if mode is UnloadMode.FORCE:
            for task in tasks:
                self.memory.retired.revoke(task)
        # Shielded: a client that stops waiting does not stop the unloading.
        freed = await asyncio.shield(asyncio.gather(*tasks))
        return FreedBytes(sum(part.device for part in freed), sum(part.host for part in freed))

    async def pin(self, name: str) -> AdapterStatus:
        """Loads an adapter, if it is not, and keeps it in host memory until unpinned or unloaded. Raises as `hold`."""
        ref = await self.named(name)
        await self.loads.copy(ref)
        self.memory.pin(ref)
        self.board.publish(EventKind.UPDATED, ref)
        return self.board.status(ref)

    async def unpin(self, name: str) -> AdapterStatus:
        """Raises InvalidRequest, AdapterNotFound."""
        self.memory.unpin(ref := await self.named(name))
        self.board.publish(EventKind.UPDATED, ref)
        return self.board.status(ref)

    @property
    def num_bytes(self) -> int:
        """Host memory of all adapters, those included that have lost their name but are still in use."""
        return self.memory.num_bytes

    def statuses(self, after: AdapterRef | None = None, limit: int | None = None) -> list[AdapterStatus]:
        """Every version of every adapter that requests may name, in order."""
        return self.board.statuses(after, limit)

    async def get(self, name: str) -> AdapterStatus:
        """Raises InvalidRequest, AdapterNotFound."""
        return self.board.status(await self.named(name))

    async def recorded_digest(self, ref: AdapterRef) -> str:
        """Of a published version, without loading it; empty if none is on record, or it cannot be read."""
        return await self.disk.run(recorded_digest, self.catalog.path(ref))

    # For changes of a name, by this class and by `AdapterRouter`, `AdapterUploads` and `StoreWatcher`.

    async def look(self, name: str) -> None:
        """Learns what has appeared on disk under a name.

        Raises:
            Overloaded, Unavailable: the disk cannot tell.
        """
        with read_errors(f"adapter {name!r}"):
            stored = await self.disk.run(self.store.look, name)
        added = self.catalog.learn(name, stored)
        self.board.publish(EventKind.ADDED, *added)

    async def named(self, name: str) -> AdapterRef:
        """The version that an operator means: shares of the traffic do not count.

        Raises:
            InvalidRequest, AdapterNotFound.
        """
        bare_name, version = parse_reference(name, "name")
        if version is None and (current := self.catalog.current(bare_name)) is not None:
            name = f"{bare_name}@{current}"
        return await self._resolve(name)

    def forget(self, ref: AdapterRef) -> "asyncio.Task[FreedBytes] | None":
        """Takes the name from its copy, if there is one; the task ends when that is free."""
        self.board.clear(ref)
        self.loader.forget(ref)
        return self.memory.remove(ref)

    async def _hold(self, refs: Sequence[AdapterRef], held: contextlib.ExitStack) -> Found:
        missing = [ref for ref in refs if self.memory.get(ref) is None]
        tiers = {ref: AdapterTier.DISK if ref in missing else AdapterTier.HOST for ref in refs}
        for ref in refs:
            if ref not in missing:
                self.metrics.adapters.found(ref.name, "host")
        if len(refs) > 1 and self.memory.has_room(sum(map(self.loader.num_bytes, missing))):
            for ref in missing:  # each like any other load: none need be kept for the next one
                await self.loads.copy(ref)
            missing = [ref for ref in refs if self.memory.get(ref) is None]
        if not missing or len(refs) == 1:
            return await self._hold_all(refs, tiers, held)
        async with self._mixing:
            with self.memory.keeping({ref: self.loader.num_bytes(ref) for ref in refs}):
                return await self._hold_all(refs, tiers, held)

    async def _hold_all(
        self, refs: Sequence[AdapterRef], tiers: dict[AdapterRef, AdapterTier], held: contextlib.ExitStack
    ) -> Found:
        while missing := [ref for ref in refs if self.memory.get(ref) is None]:
            tiers[missing[0]] = AdapterTier.DISK
            await self.loads.copy(missing[0])  # and with nothing in between, held
        return [(held.enter_context(self.memory.using(ref)), tiers[ref]) for ref in refs]

    async def _resolve_all(self, references: Sequence[str], label: str) -> list[AdapterRef]:
        return [await self._resolve(reference, label) for reference in references]

    async def _resolve(self, reference: str, label: str = "") -> AdapterRef:
        """The version that is meant; a name that is not known may have appeared on disk just now."""
        try:
            return self.catalog.resolve(reference, label)
        except AdapterNotFound:
            await self.look(parse_reference(reference)[0])
            return self.catalog.resolve(reference, label)

    def _evicted(self, ref: AdapterRef) -> None:
        self.metrics.adapters.evicted(ref.name, "host")
        self.board.publish(EventKind.EVICTED, ref)

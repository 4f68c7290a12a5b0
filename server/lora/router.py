"""Operators say which version a bare name means: promotion, rollback, shares of the traffic. Event loop."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial

from server.errors import AdapterNotFound, InvalidRequest
from server.lora.cache import AdapterCache
from server.lora.catalog import unreadable_routing
from server.lora.events import AdapterStatus, EventKind
from server.lora.routing import Routing
from server.lora.store import AdapterRef, parse_reference


class AdapterRouter:
    """Changes routings in the store, where they outlive the server and count for all that share it."""

    def __init__(self, adapters: AdapterCache) -> None:
        self._adapters = adapters

    async def promote(self, name: str, version: str) -> AdapterStatus:
        """Makes a version what the bare name means, and ends all shares; empty: the newest, whichever it is.

        The version is loaded first: a name never comes to mean one that cannot be served.

        Raises:
            Those of `AdapterCache.hold`; StoreNotWritable.
        """
        adapters, name = self._adapters, _bare(name)
        if version:  # before the name is locked, since it may wait for room
            await adapters.loads.copy(await self._stored(name, version))
        async with adapters.claims.changing(name):
            if version:
                await self._stored(name, version)
            await self._write(name, lambda _: Routing(version))
        return await adapters.get(name)

    async def set_traffic(self, name: str, percent_by_version: Mapping[str, int]) -> list[AdapterStatus]:
        """Sends shares of a bare name's requests to some versions; the rest goes to the promoted or newest one.

        Versions that get a share are loaded first, as `promote` does. Returns the name's versions.

        Raises:
            Those of `AdapterCache.hold`; StoreNotWritable.
        """
        adapters, name = self._adapters, _bare(name)
        if (total := sum(percent_by_version.values())) > 100:
            shares = ", ".join(f"{version}: {percent}" for version, percent in percent_by_version.items())
            raise InvalidRequest(
                f"the shares come to {total} per cent, more than 100 per cent: {shares}", field="percent_by_version"
            )
        for version, percent in percent_by_version.items():
            if percent:
                await adapters.loads.copy(await self._stored(name, version))
        async with adapters.claims.changing(name):
            for version in percent_by_version:
                await self._stored(name, version)
            await self._write(name, partial(_with_shares, name, percent_by_version))
        return [adapters.board.status(ref) for ref in adapters.catalog.versions(name)]

    async def _stored(self, name: str, version: str) -> AdapterRef:
        ref = await self._adapters.named(f"{name}@{version}")
        if not self._adapters.catalog.is_stored(ref):
            raise AdapterNotFound(str(ref))
        return ref

    async def _write(self, name: str, change: Callable[[Routing | None], Routing]) -> None:
        adapters = self._adapters
        await adapters.look(name)
        if not any(map(adapters.catalog.is_stored, adapters.catalog.versions(name))):
            raise AdapterNotFound(name)
        await adapters.changes.run(adapters.store.change_routing, name, change)
        await adapters.look(name)
        adapters.board.publish(EventKind.UPDATED, *adapters.catalog.versions(name))


def _with_shares(name: str, percent_by_version: Mapping[str, int], routing: Routing | None) -> Routing:
    """What the store has now, maybe by another server, with other shares."""
    if routing is None:
        raise unreadable_routing(name)
    shares = {version: percent for version, percent in percent_by_version.items() if percent}
    return replace(routing, percent_by_version=shares)


def _bare(name: str) -> str:
    bare_name, version = parse_reference(name, "name")
    if version is not None:
        raise InvalidRequest(f"{name!r} is one version; a bare name is needed", field="name")
    return bare_name

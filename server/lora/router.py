"""Operators say which version a bare name means: promotion, rollback, shares of the traffic. Event loop."""

from collections.abc import Mapping
from dataclasses import replace

from server.errors import AdapterNotFound, InvalidRequest
from server.lora.cache import AdapterCache
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
        async with adapters.claims.changing(name):
            if version:
                await adapters.loads.copy(await self._stored(name, version))
            await self._write(name, Routing(version))
        return await adapters.get(name)

    async def set_traffic(self, name: str, percent_by_version: Mapping[str, int]) -> list[AdapterStatus]:
        """Sends shares of a bare name's requests to some versions; the rest goes to the promoted or newest one.

        Returns the name's versions.

        Raises:
            InvalidRequest, AdapterNotFound, Overloaded, StoreNotWritable.
        """
        adapters, name = self._adapters, _bare(name)
        if sum(percent_by_version.values()) > 100:
            raise InvalidRequest("the shares come to more than 100 per cent", field="percent_by_version")
        async with adapters.claims.changing(name):
            for version in percent_by_version:
                await self._stored(name, version)
            shares = {version: percent for version, percent in percent_by_version.items() if percent}
            await self._write(name, replace(adapters.catalog.routing(name), percent_by_version=shares))
        return [adapters.board.status(ref) for ref in adapters.catalog.versions(name)]

    async def _stored(self, name: str, version: str) -> AdapterRef:
        ref = await self._adapters.named(f"{name}@{version}")
        if not self._adapters.catalog.is_stored(ref):
            raise AdapterNotFound(str(ref))
        return ref

    async def _write(self, name: str, routing: Routing) -> None:
        adapters = self._adapters
        await adapters.look(name)
        if not adapters.catalog.is_stored(AdapterRef(name, adapters.catalog.current(name) or "")):
            raise AdapterNotFound(name)
        await adapters.disk.run(adapters.store.write_routing, name, routing)
        adapters.catalog.reroute(name, routing)
        adapters.board.publish(EventKind.UPDATED, *adapters.catalog.versions(name))


def _bare(name: str) -> str:
    bare_name, version = parse_reference(name, "name")
    if version is not None:
        raise InvalidRequest(f"{name!r} is one version; a bare name is needed", field="name")
    return bare_name

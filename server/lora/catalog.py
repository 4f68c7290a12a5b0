"""The names of adapters and what they mean. Event loop.

An index of the store in memory, so that no request and no listing walks the disk: adapters loaded from other folders,
names that were taken away, and the routing of bare names beside it.
"""

import bisect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from server.errors import AdapterNotFound, ConfigError, DamagedAdapter
from server.lora.fingerprint import Fingerprint
from server.lora.routing import Routing
from server.lora.store import AdapterRef, AdapterStore, parse_reference
from server.lora.stored_name import FLAT_VERSION, ROUTING_FILE, StoredName


@dataclass(frozen=True, slots=True)
class StoreChanges:
    """How the index differs after an update."""

    added: list[AdapterRef] = field(default_factory=list)
    changed: list[AdapterRef] = field(default_factory=list)  # other files under the same name and version
    removed: list[AdapterRef] = field(default_factory=list)
    rerouted: list[AdapterRef] = field(default_factory=list)  # the versions whose name changed its routing


class AdapterCatalog:
    """Owns every name that requests may use."""

    def __init__(self, store: AdapterStore, refuses: Callable[[AdapterRef], bool] = lambda ref: False) -> None:
        """Reads the whole index once.

        Args:
            refuses: whether a version is known not to be served; a bare name means one that is, if it has any.

        Raises:
            ConfigError: the folder is there and cannot be read.
        """
        self._store = store
        self._refuses = refuses
        try:
            self._stored: dict[str, StoredName] = store.scan() if store.root.exists() else {}
        except OSError as error:
            raise ConfigError(f"--adapters-dir {store.root}: {error.strerror}") from error
        self._sources: dict[str, dict[str, Path]] = {}  # versions loaded from folders of another name
        self._unloaded: set[AdapterRef] = set()  # stored, and taken away: only LoadAdapter brings them back
        self._refs: list[AdapterRef] | None = None  # sorted; None: to be made

    def resolve(self, reference: str, label: str = "") -> AdapterRef:
        """The version that a request means: `name@version`, or for a bare name what its routing says.

        Raises:
            InvalidRequest, AdapterNotFound, DamagedAdapter.
        """
        name, version = parse_reference(reference)
        if version is None:
            if self._lacks_routing(name):
                raise unreadable_routing(name)
            share = self.routing(name).draw(name, label)
            version = share if share and self._serves(AdapterRef(name, share)) else self.current(name)
        ref = AdapterRef(name, version or "")
        if not self.has(ref):
            raise AdapterNotFound(str(ref))  # with the version that a bare name means
        return ref

    def current(self, name: str) -> str | None:
        """The version that a bare name means, shares aside: the promoted one, or else the newest that requests may
        name and that is not refused, or else just the newest. None if there is no such name, or nobody knows what it
        means.
        """
        if self._lacks_routing(name):
            return None
        if promoted := self.routing(name).promoted:
            return promoted
        named = [ref for version in self._versions(name) if self.has(ref := AdapterRef(name, version))]
        newest = max(named, key=lambda ref: (not self._refuses(ref), int(ref.version)), default=None)
        return newest.version if newest else None

    def has(self, ref: AdapterRef) -> bool:
        """Whether requests may name it."""
        return ref not in self._unloaded and self.knows(ref)

    def knows(self, ref: AdapterRef) -> bool:
        """Whether there are files for it, taken away or not."""
        return self.is_stored(ref) or ref.version in self._sources.get(ref.name, ())

    def routing(self, name: str) -> Routing:
        stored = self._stored.get(name)
        return (stored and stored.routing) or Routing()

    def path(self, ref: AdapterRef) -> Path:
        return self._sources.get(ref.name, {}).get(ref.version) or self.stored_path(ref)

    def is_stored(self, ref: AdapterRef) -> bool:
        stored = self._stored.get(ref.name)
        return stored is not None and ref.version in stored.versions

    def stored_path(self, ref: AdapterRef) -> Path:
        """Where it lies, or should, in the store's own folder of that name."""
        stored = self._stored.get(ref.name)
        return self._store.path(ref, stored is not None and stored.is_flat)

    def fingerprint(self, ref: AdapterRef) -> Fingerprint | None:
        """The state of its files when the store was last looked at; None for one from another folder."""
        stored = self._stored.get(ref.name)
        if stored is None or ref.version in self._sources.get(ref.name, ()):
            return None
        return stored.versions.get(ref.version)

    def refs(self, after: AdapterRef | None = None, limit: int | None = None) -> list[AdapterRef]:
        """Whatever requests may name, in order of names and versions."""
        if self._refs is None:
            names = {**self._sources, **self._stored}
            refs = [AdapterRef(name, version) for name in names for version in self._versions(name)]
            self._refs = sorted((ref for ref in refs if self.has(ref)), key=lambda ref: ref.sort_key)
        start = 0 if after is None else bisect.bisect_right(self._refs, after.sort_key, key=lambda ref: ref.sort_key)
        return self._refs[start : None if limit is None else start + limit]

    def versions(self, name: str) -> list[AdapterRef]:
        """The versions of one name that requests may use."""
        refs = [AdapterRef(name, version) for version in self._versions(name)]
        return sorted((ref for ref in refs if self.has(ref)), key=lambda ref: ref.sort_key)

    def stored(self) -> dict[str, StoredName]:
        """A snapshot of the store's index."""
        return dict(self._stored)

    def find(self, name: str, version: str | None) -> AdapterRef:
        """The version that a name stands for, taken away or not.

        Raises:
            AdapterNotFound.
        """
        ref = AdapterRef(name, version or self._meant(name))
        if not self.knows(ref):
            raise AdapterNotFound(name if version is None else f"{name}@{version}")
        return ref

    def source_ref(self, name: str, version: str | None) -> AdapterRef:
        """What a folder of another name is loaded as: the version, or the one that the bare name means."""
        return AdapterRef(name, version or self._meant(name) or FLAT_VERSION)

    def restore(self, ref: AdapterRef, source: Path | None) -> None:
        """Gives one version back that was taken away, or makes one: its files are in the store, or in `source`."""
        self._unloaded.discard(ref)
        if source is not None:
            self._sources.setdefault(ref.name, {})[ref.version] = source
        else:
            self._forget_source(ref)
        self._refs = None

    def take_away(self, name: str, version: str | None) -> None:
        """Requests find the versions that a name has now, or one of them, no more; one that comes later is another."""
        for ref in self.versions(name):
            if version in (None, ref.version):
                self._forget_source(ref)
                if self.is_stored(ref):
                    self._unloaded.add(ref)
        self._refs = None

    def learn(self, name: str, stored: StoredName | None) -> list[AdapterRef]:
        """Takes what is new on disk under one name, and leaves what is known to `update`; returns the new versions."""
        if stored is None:
            return []
        known = self._stored.get(name)
        versions = {**stored.versions, **(known.versions if known else {})}
        self._stored[name] = _with_routing(replace(stored, versions=versions), known)
        self._refs = None
        return [AdapterRef(name, version) for version in stored.versions if not known or version not in known.versions]

    def update(self, names: Mapping[str, StoredName | None]) -> StoreChanges:
        """Takes what the disk has now under some names; None: nothing."""
        changes = StoreChanges()
        for name, new in names.items():
            old = self._stored.get(name)
            new = _with_routing(new, old) if new else None
            before, after = (stored.versions if stored else {} for stored in (old, new))
            for version in before.keys() | after.keys():
                ref = AdapterRef(name, version)
                if version not in before:
                    changes.added.append(ref)
                elif version not in after:
                    changes.removed.append(ref)
                    self._unloaded.discard(ref)
                elif before[version] != after[version]:
                    changes.changed.append(ref)
            if new is None:
                self._stored.pop(name, None)
            else:
                self._stored[name] = new
                if old is not None and old.routing != new.routing:
                    changes.rerouted.extend(AdapterRef(name, version) for version in new.versions)
        self._refs = None
        return changes

    def _versions(self, name: str) -> set[str]:
        stored = self._stored.get(name)
        return {*(stored.versions if stored else ()), *self._sources.get(name, ())}

    def _meant(self, name: str) -> str:
        """What a bare name means to who loads it: with all versions taken away the newest. Empty: there is none."""
        return self.current(name) or max(self._versions(name), key=int, default="")

    def _serves(self, ref: AdapterRef) -> bool:
        return self.has(ref) and not self._refuses(ref)

    def _lacks_routing(self, name: str) -> bool:
        return name in self._stored and self._stored[name].routing is None

    def _forget_source(self, ref: AdapterRef) -> None:
        sources = self._sources.get(ref.name, {})
        sources.pop(ref.version, None)
        if not sources:
            self._sources.pop(ref.name, None)


def unreadable_routing(name: str) -> DamagedAdapter:
    return DamagedAdapter(
        f"{name}/{ROUTING_FILE} cannot be read, so nobody knows which version {name!r} means: name one, or promote one",
        reason="UNREADABLE_ROUTING",
    )


def _with_routing(stored: StoredName, known: StoredName | None) -> StoredName:
    """A routing that cannot be read leaves the one that was known."""
    return replace(stored, routing=known.routing) if stored.routing is None and known else stored

"""Who may change what a name means: one at a time, and only if the name is theirs to take. Event loop."""

import asyncio
from weakref import WeakValueDictionary

from server.errors import AdapterChanged, AdapterExists
from server.lora.loader import AdapterLoader
from server.lora.store import AdapterRef, parse_reference


class NameClaims:
    """Owns one lock per name that is being changed."""

    def __init__(self, reserved: frozenset[str], loader: AdapterLoader) -> None:
        self._reserved = reserved
        self._loader = loader
        self._changes: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()

    def changing(self, name: str) -> asyncio.Lock:
        """Held while a name changes."""
        return self._changes.setdefault(name, asyncio.Lock())

    def parse(self, name: str) -> tuple[str, str | None]:
        """Raises InvalidRequest for what is no name, AdapterExists for one that no adapter may have."""
        bare_name, version = parse_reference(name, "name")
        if bare_name in self._reserved:
            raise AdapterExists(f"{bare_name!r} is the base model's name", field="name")
        return bare_name, version

    def check(self, ref: AdapterRef, *, taken: bool, replace: bool, expected_generation: int | None) -> None:
        """Whether the claimant may have the name: if it is free, to be replaced, or at the generation that is expected.

        Generation 0 is none to replace.

        Raises:
            AdapterExists, AdapterChanged.
        """
        generation = self._loader.generation(ref)
        if expected_generation is not None and generation != expected_generation:
            raise AdapterChanged(
                f"adapter {ref.name!r} is at generation {generation}, not {expected_generation}: somebody else "
                "changed it",
                field="expected_generation",
                reason="GENERATION_MISMATCH",
            )
        if taken and not replace and not expected_generation:
            raise AdapterExists(f"adapter {ref.name!r} is there already; set replace to take its place", field="name")

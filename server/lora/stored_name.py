"""What the adapters folder holds under one name. Only names, file times and routing are read here; it blocks."""

import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass, field

from adapters.config import CONFIG_FILE
from adapters.format import open_plain
from server.lora.fingerprint import Fingerprint, fingerprint
from server.lora.routing import VERSION, Routing

log = logging.getLogger(__name__)

FLAT_VERSION = "1"
ROUTING_FILE = "routing.json"
_MAX_ROUTING_BYTES = 1 << 16


@dataclass(frozen=True, slots=True)
class StoredName:
    """What the store has under one name."""

    versions: Mapping[str, Fingerprint]  # never empty
    is_flat: bool  # version 1 lies in the name's own folder
    routing: Routing | None  # None: there is one, and it cannot be read
    is_simple: bool = field(
        default=False, compare=False
    )  # flat, and nothing else in its folder counts nor could, unless the folder changes

    @property
    def newest(self) -> str:
        return max(self.versions, key=int)

    @classmethod
    def simple(cls, flat: Fingerprint) -> "StoredName":
        return cls({FLAT_VERSION: flat}, is_flat=True, routing=Routing(), is_simple=True)


def list_name(folder: str) -> StoredName | None:
    """What a name's folder holds; None if it is no adapter.

    Raises:
        OSError: it is not there, or cannot be read.
    """
    versions = {}
    routing: Routing | None = Routing()
    flat = None
    is_simple = True
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name == CONFIG_FILE:
                flat = fingerprint(folder)
            elif entry.name == ROUTING_FILE:
                is_simple = False
                routing = read_routing(entry.path)
            elif VERSION.fullmatch(entry.name) and entry.is_dir(follow_symlinks=False):
                is_simple = False
                found = fingerprint(entry.path)
                if found is not None:
                    versions[entry.name] = found
    if flat is not None and is_simple:
        return StoredName.simple(flat)
    if flat is not None:
        versions[FLAT_VERSION] = flat
    return StoredName(versions, flat is not None, routing) if versions else None


def read_routing(path: str) -> Routing | None:
    """What is written there, the default if there is nothing, or None if it cannot be read, which is logged."""
    try:
        with open_plain(path) as file:
            return Routing.from_json(file.read(_MAX_ROUTING_BYTES).decode())
    except FileNotFoundError:
        return Routing()
    except (OSError, ValueError) as error:
        log.error("%s cannot be read, the name means what it did before: %s", path, error)
        return None

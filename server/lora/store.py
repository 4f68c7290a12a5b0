"""Adapters on disk, by name and version. Index only: nothing is read until somebody asks. Event loop.

<root>/<name>/adapter_config.json …             one adapter, version 1
<root>/<name>/<version>/adapter_config.json …   versions are numbers; the highest is what the bare name means
"""

import re
from dataclasses import dataclass
from pathlib import Path

from adapters.config import CONFIG_FILE
from server.errors import AdapterNotFound, InvalidRequest

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
_VERSION = re.compile(r"[0-9]{1,9}")
FLAT_VERSION = "1"


@dataclass(frozen=True, slots=True, order=True)
class AdapterRef:
    """A name with the version it stands for."""

    name: str
    version: str


def parse_reference(text: str) -> tuple[str, str | None]:
    """`name` or `name@version` → its parts.

    Raises:
        InvalidRequest: characters that a name cannot have.
    """
    name, at, version = text.partition("@")
    if not _NAME.fullmatch(name) or (at and not (_VERSION.fullmatch(version))):
        raise InvalidRequest(
            f"{text[:160]!r} is no adapter name: 1 to 128 letters, digits, '.', '_' or '-', the first a letter or "
            "digit, then '@' and a number for one version",
            field="adapter",
        )
    return name, version if at else None


class AdapterStore:
    """Owns the adapters folder. Names are checked before they become paths, and links are not followed."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def scan(self) -> list[AdapterRef]:
        """The newest version of every adapter in the folder, in name order."""
        if not self.root.is_dir():
            return []
        found = []
        for folder in sorted(self.root.iterdir()):
            if _NAME.fullmatch(folder.name):
                version = self._latest(folder)
                if version is not None:
                    found.append(AdapterRef(folder.name, version))
        return found

    def find(self, name: str, version: str | None) -> AdapterRef:
        """The adapter that a name means now.

        Raises:
            AdapterNotFound: there is none.
        """
        folder = self.root / name
        found = self._latest(folder) if version is None else version
        if found is None or not self._is_adapter(self.path(AdapterRef(name, found))):
            raise AdapterNotFound(name if version is None else f"{name}@{version}")
        return AdapterRef(name, found)

    def path(self, ref: AdapterRef) -> Path:
        folder = self.root / ref.name
        flat = ref.version == FLAT_VERSION and self._is_adapter(folder)
        return folder if flat else folder / ref.version

    def source(self, text: str) -> Path:
        """A folder that a client names, relative to the adapters folder and inside it.

        Raises:
            InvalidRequest: it leads out of the adapters folder.
        """
        path = self.root / text
        if "\0" in text or not path.resolve().is_relative_to(self.root.resolve()):
            raise InvalidRequest(f"source {text!r} is not inside the adapters folder (--adapters-dir)", field="source")
        return path

    def _latest(self, folder: Path) -> str | None:
        if self._is_adapter(folder):
            return FLAT_VERSION
        if folder.is_symlink() or not folder.is_dir():
            return None
        try:
            numbers = [int(child.name) for child in folder.iterdir() if _VERSION.fullmatch(child.name)]
        except OSError:  # unreadable: nothing to be found there
            return None
        versions = [str(number) for number in sorted(numbers, reverse=True)]
        return next((version for version in versions if self._is_adapter(folder / version)), None)

    @staticmethod
    def _is_adapter(folder: Path) -> bool:
        try:
            return not folder.is_symlink() and (folder / CONFIG_FILE).is_file()
        except OSError:
            return False

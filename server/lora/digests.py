"""The digests that a published adapter keeps beside its files, in the format of `sha256sum`. Worker threads."""

import hashlib
import os
import re
from collections.abc import Mapping
from pathlib import Path

from adapters.config import CONFIG_FILE, WEIGHTS_FILE
from adapters.errors import is_of_the_file
from adapters.format import digest_of, open_plain
from server.errors import DamagedAdapter

SUMS_FILE = "SHA256SUMS"
_LINE = re.compile(r"([0-9a-f]{64})  ([A-Za-z0-9._-]+)")
_MAX_BYTES = 4096


def write_sums(folder: Path, digests: Mapping[str, str]) -> None:
    with (folder / SUMS_FILE).open("x") as file:
        file.writelines(f"{digest}  {name}\n" for name, digest in digests.items())
        file.flush()
        os.fsync(file.fileno())


def check_sums(folder: Path, known: Mapping[str, str]) -> None:
    """Holds an adapter's files against its recorded digests; one without a record passes.

    Args:
        known: digests of what was read; other files are read here.

    Raises:
        DamagedAdapter: they differ, or the record itself is none.
        OSError: the disk fails, which says nothing of them.
    """
    path = folder / SUMS_FILE
    try:
        os.lstat(path)
    except FileNotFoundError:
        return
    try:
        with open_plain(path) as record:
            lines = record.read(_MAX_BYTES).decode().splitlines()
        unnamed = set(known)
        for line in lines:
            match = _LINE.fullmatch(line)
            if match is None or not (folder / match[2]).is_file():
                raise DamagedAdapter(f"{SUMS_FILE} has a line for no file here: {line[:100]!r}")
            unnamed.discard(match[2])
            digest = known.get(match[2]) or _digest(folder / match[2])
            if digest != match[1]:
                raise DamagedAdapter(
                    f"{match[2]} is not what was published: its sha256 is {digest}, {SUMS_FILE} says {match[1]}; "
                    "publish it anew as another version"
                )
        if unnamed:
            raise DamagedAdapter(f"{SUMS_FILE} has no line for {', '.join(sorted(unnamed))}")
    except (OSError, UnicodeDecodeError) as error:
        if isinstance(error, OSError) and not is_of_the_file(error):
            raise
        raise DamagedAdapter(f"{SUMS_FILE} cannot be checked: {error}") from error


def recorded_digest(folder: Path) -> str:
    """The one digest of a published adapter, as its record has it; empty if there is none that can be read."""
    try:
        with open_plain(folder / SUMS_FILE) as record:
            lines = record.read(_MAX_BYTES).decode().splitlines()
    except (OSError, UnicodeDecodeError):
        return ""
    recorded = {match[2]: match[1] for line in lines if (match := _LINE.fullmatch(line))}
    return digest_of(recorded) if recorded.keys() == {CONFIG_FILE, WEIGHTS_FILE} else ""


def _digest(path: Path) -> str:
    with open_plain(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()

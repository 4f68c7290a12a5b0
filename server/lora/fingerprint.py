"""The state of an adapter's files, by which a change shows without a look into them. Any thread."""

import os
import stat
from pathlib import Path

from adapters.config import CONFIG_FILE, WEIGHTS_FILE

# Time, size and inode of each of an adapter's files: equal as long as nobody has changed them.
Fingerprint = tuple[int, ...]


def fingerprint(folder: str | Path) -> Fingerprint | None:
    """The state of an adapter's files, or None if the folder holds no adapter.

    Raises:
        OSError: it cannot be read.
    """
    result: list[int] = []
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        try:
            status = os.lstat(os.path.join(folder, name))
        except (FileNotFoundError, NotADirectoryError):
            status = None
        if status is not None and stat.S_ISREG(status.st_mode):
            result += (status.st_mtime_ns, status.st_size, status.st_ino)
        elif not result:
            return None
    return tuple(result)


def num_bytes(of: Fingerprint | None) -> int:
    """Of an adapter's files."""
    return sum(of[1::3]) if of else 0

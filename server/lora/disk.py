"""Files that must last, and files that strangers may have put there. Every function blocks, any thread."""

import contextlib
import errno
import io
import os
from collections.abc import Iterator
from pathlib import Path

from server.errors import Overloaded, StoreNotWritable


def fsync_folder(folder: Path) -> None:
    """Makes renames into a folder last."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextlib.contextmanager
def disk_errors() -> Iterator[None]:
    """Tells clients what the disk refused: Overloaded if it is full, StoreNotWritable for all else."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise Overloaded(f"no room in the adapters folder: {error.strerror}", reason="DISK_FULL") from error
        where = error.filename2 or error.filename or "the adapters folder"
        raise StoreNotWritable(f"{where} cannot be written: {error.strerror}") from error


def open_plain(path: str | Path) -> io.BufferedReader:
    """Opens a file for reading that strangers may have put there: links are not followed, pipes not waited for."""
    return open(path, "rb", opener=lambda path, flags: os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK))

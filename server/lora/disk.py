"""What the disk may refuse to take. Any thread."""

import contextlib
import errno
from collections.abc import Iterator

from server.errors import Overloaded, StoreNotWritable


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

"""What the disk refuses, in words for clients. Any thread."""

import contextlib
import errno
from collections.abc import Iterator

from server.errors import Overloaded, ServingError, StoreNotWritable, Unavailable

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_SHORT = (errno.ENOMEM, errno.EMFILE, errno.ENFILE)  # of memory or handles
_FAILING = (errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EREMOTEIO, errno.ENOTCONN)


@contextlib.contextmanager
def read_errors(what: str) -> Iterator[None]:
    """Within, what the disk refuses says nothing of the files: Overloaded if the system is short of something,
    Unavailable for all else.
    """
    try:
        yield
    except OSError as error:
        raise _of_the_moment(f"{what} cannot be read now: {error.strerror or error}", error) from error


@contextlib.contextmanager
def disk_errors() -> Iterator[None]:
    """Tells clients what the disk refused to take: Overloaded if it is full or the system is short of something,
    Unavailable if it fails, StoreNotWritable for all else.
    """
    try:
        yield
    except OSError as error:
        if error.errno in _FULL:
            raise Overloaded(f"no room in the adapters folder: {error.strerror}", reason="DISK_FULL") from error
        where = error.filename2 or error.filename or "the adapters folder"
        text = f"{where} cannot be written: {error.strerror}"
        if error.errno in _SHORT + _FAILING:
            raise _of_the_moment(text, error) from error
        raise StoreNotWritable(text) from error


def _of_the_moment(text: str, error: OSError) -> ServingError:
    if error.errno in _SHORT:
        return Overloaded(text, reason="SYSTEM_RESOURCES")
    return Unavailable(text, reason="DISK_FAILED")

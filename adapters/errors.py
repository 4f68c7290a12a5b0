"""Why an adapter is refused."""

import contextlib
import errno
from collections.abc import Iterator

MAX_MESSAGE = 2000  # characters
# What a file is not there for, or is no file for; all else is the disk's or the system's, and of the moment.
_OF_THE_FILE = (errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.ENXIO)


def printable(text: str) -> str:
    """A message that may quote files of strangers, as one line of bounded length that every protocol and log takes."""
    shown = "".join(
        char if char.isprintable() else char.encode("unicode_escape").decode() for char in text[: MAX_MESSAGE + 1]
    )
    return shown if len(shown) <= MAX_MESSAGE else shown[:MAX_MESSAGE] + "…"


def is_of_the_file(error: OSError) -> bool:
    """Whether the file itself is wrong, and will be when it is asked for again."""
    return error.errno in _OF_THE_FILE


@contextlib.contextmanager
def memory_errors() -> Iterator[None]:
    """Within, memory that the system does not have for a tensor is a MemoryError, as all other memory is."""
    try:
        yield
    except RuntimeError as error:
        if "DefaultCPUAllocator" not in str(error):  # torch has no type of its own for it
            raise
        raise MemoryError(str(error).partition("\n")[0]) from error


class AdapterFormatError(ValueError):
    """The adapter's files are wrong in themselves.

    Attributes:
        reason: machine-readable word for the kind of fault, e.g. `NON_FINITE_WEIGHTS`.
    """

    def __init__(self, message: str, reason: str = "INVALID_ADAPTER") -> None:
        super().__init__(printable(message))
        self.reason = reason


class AdapterIncompatibleError(AdapterFormatError):
    """The files are sound, but this base model or this server cannot serve them."""

    def __init__(self, message: str, reason: str = "INCOMPATIBLE_ADAPTER") -> None:
        super().__init__(message, reason)


class WrongBaseError(AdapterIncompatibleError):
    """What the files hold belongs to another base model."""

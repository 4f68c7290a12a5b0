"""Why an adapter is refused."""

MAX_MESSAGE = 2000  # characters


def printable(text: str) -> str:
    """A message that may quote files of strangers, as one line of bounded length that every protocol and log takes."""
    shown = "".join(
        char if char.isprintable() else char.encode("unicode_escape").decode() for char in text[: MAX_MESSAGE + 1]
    )
    return shown if len(shown) <= MAX_MESSAGE else shown[:MAX_MESSAGE] + "…"


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

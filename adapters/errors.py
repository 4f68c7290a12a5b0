"""Why an adapter is refused."""


class AdapterFormatError(ValueError):
    """The adapter's files are wrong in themselves.

    Attributes:
        reason: machine-readable word for the kind of fault, e.g. `NON_FINITE_WEIGHTS`.
    """

    def __init__(self, message: str, reason: str = "INVALID_ADAPTER") -> None:
        super().__init__(message)
        self.reason = reason


class AdapterIncompatibleError(AdapterFormatError):
    """The files are sound, but this base model or this server cannot serve them."""

    def __init__(self, message: str, reason: str = "INCOMPATIBLE_ADAPTER") -> None:
        super().__init__(message, reason)

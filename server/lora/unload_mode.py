"""How an adapter is unloaded. Plain data."""

import enum


class UnloadMode(enum.Enum):
    """What happens to the requests that use an adapter when its name is taken away."""

    DRAIN = enum.auto()  # they finish
    FORCE = enum.auto()  # they end ABORTED
    IF_IDLE = enum.auto()  # with any, nothing is unloaded

"""What other threads ask of the engine: each goes into its inbox once."""

from concurrent.futures import Future
from dataclasses import dataclass

from server.engine.request import Request
from server.errors import ServingError
from server.lora.adapter import Adapter


@dataclass(frozen=True, slots=True)
class Submit:
    request: Request


@dataclass(frozen=True, slots=True)
class Abort:
    request_id: int


@dataclass(frozen=True, slots=True)
class Evict:
    """Free the device slot of an adapter that no request uses any more; answers with the bytes that were freed."""

    adapter: Adapter
    freed: Future[int]
    makes_room: bool = False  # its host memory is needed, and with that goes the slot


@dataclass(frozen=True, slots=True)
class Merge:
    """Add an adapter to the base's weights, or with None take the merged one out; answers with the seconds it took."""

    adapter: Adapter | None
    done: Future[float]


@dataclass(frozen=True, slots=True)
class Revoke:
    """End every request on an adapter with an error, and those that still come; until its `Evict`."""

    adapter: Adapter
    error: ServingError


@dataclass(frozen=True, slots=True)
class Stop:
    pass


Command = Submit | Abort | Evict | Merge | Revoke | Stop

"""What other threads ask of the engine: each goes into its inbox once."""

from concurrent.futures import Future
from dataclasses import dataclass
from typing import NamedTuple

from server.engine.request import Request
from server.errors import ServingError
from server.lora.adapter import Adapter
from server.lora.host_copy import FreedBytes


@dataclass(frozen=True, slots=True)
class Submit:
    request: Request


@dataclass(frozen=True, slots=True)
class Abort:
    request_id: int


@dataclass(frozen=True, slots=True)
class Evict:
    """Free what an adapter that no request uses any more has on the device: its slot, and its sums with the base.

    Answers with the bytes that were freed besides the host's copy.
    """

    adapter: Adapter
    freed: Future[FreedBytes]
    makes_room: bool = False  # its host memory is needed, and with that goes the slot


class MergeDone(NamedTuple):
    """What a `Merge` cost: the bytes are those of the sums with the base's weights, taken or given back."""

    seconds: float
    num_bytes: int


@dataclass(frozen=True, slots=True)
class Merge:
    """Add an adapter to the base's weights, or with None take the merged one out."""

    adapter: Adapter | None
    done: Future[MergeDone]


@dataclass(frozen=True, slots=True)
class Revoke:
    """End every request on an adapter with an error, and those that still come; until its `Evict`."""

    adapter: Adapter
    error: ServingError


@dataclass(frozen=True, slots=True)
class Stop:
    pass


Command = Submit | Abort | Evict | Merge | Revoke | Stop

"""How adapters lie over the rows of a batch."""

from typing import NamedTuple


class Segment(NamedTuple):
    """Rows `start` to `end` (not included) belong to adapter slot `slot`."""

    slot: int
    start: int
    end: int

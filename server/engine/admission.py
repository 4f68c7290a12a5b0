"""How many requests are in the server, and whether more are taken. Event loop only."""

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager

from server.errors import Overloaded, Unavailable


class Admission:
    """Owns the count of requests that run or wait."""

    def __init__(self, max_requests: int) -> None:
        self.draining = False
        self._max_requests = max_requests
        self._num_requests = 0
        self._empty = asyncio.Event()
        self._empty.set()

    @contextmanager
    def admit(self) -> Iterator[None]:
        """Within, a request is in the server.

        Raises:
            Overloaded: too many are.
            Unavailable: no more are taken.
        """
        if self.draining:
            raise Unavailable("the server is draining", reason="DRAINING")
        if self._num_requests >= self._max_requests:
            raise Overloaded(
                f"{self._num_requests} requests are running or waiting; more than {self._max_requests} (--max-num-seqs "
                "plus --max-waiting) are not taken",
                reason="QUEUE_FULL",
            )
        self._num_requests += 1
        self._empty.clear()
        try:
            yield
        finally:
            self._num_requests -= 1
            if not self._num_requests:
                self._empty.set()

    async def drain(self, grace: float) -> bool:
        """Refuses new requests and waits for those that are here; says whether all ended within `grace` seconds."""
        self.draining = True
        try:
            async with asyncio.timeout(grace):
                await self._empty.wait()
        except TimeoutError:
            return False
        return True

"""One request's adapters for all of its answers. Event loop."""

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import ExitStack
from types import TracebackType

from server.lora.cache import Found


class SharedHold:
    """Holds adapters once for several answers, so that no change of a name comes between them.

    Lets go when the last of them is done, or at the end of its own `with`, for those that never began.
    """

    def __init__(self, num_answers: int) -> None:
        self._num_left = num_answers
        self._held = ExitStack()
        self._turn = asyncio.Lock()
        self._adapters: Found | None = None

    async def adapters(self, held: ExitStack, hold: Callable[[ExitStack], Awaitable[Found]]) -> Found:
        """What `hold` says to the first answer that asks, for each; an answer is done when its `held` is closed."""
        held.callback(self._done)
        async with self._turn:
            if self._adapters is None:
                self._adapters = await hold(self._held)
            return self._adapters

    def _done(self) -> None:
        self._num_left -= 1
        if not self._num_left:
            self._adapters = None  # whose weights a slow reader must not keep in memory
            self._held.close()

    def __enter__(self) -> "SharedHold":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        self._held.close()

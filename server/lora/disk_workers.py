"""The threads that wait for the disk, so that a slow one holds up nobody else. Event loop."""

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import ParamSpec, TypeVar

import torch

from server.openmp import work_alone

_THREADS = 2  # for each kind of work; more would only take turns with the engine at the cores

Parameters = ParamSpec("Parameters")
Result = TypeVar("Result")


class DiskWorkers:
    """Owns the threads; they end with it."""

    def __init__(self, work: str) -> None:
        """`work`: what they do, for their name."""
        self._threads = ThreadPoolExecutor(
            _THREADS, thread_name_prefix=f"loraplex-{work}", initializer=_leave_the_cores_to_the_engine
        )

    async def run(
        self, work: Callable[Parameters, Result], *args: Parameters.args, **kwargs: Parameters.kwargs
    ) -> Result:
        """Runs blocking work; a caller that is cancelled gets back only when it is done, and can clean up after it."""
        future = asyncio.wrap_future(self._threads.submit(work, *args, **kwargs))
        try:
            return await asyncio.shield(future)
        except asyncio.CancelledError:
            await asyncio.wait([future])
            raise


def _leave_the_cores_to_the_engine() -> None:
    torch.get_num_threads()  # torch tells a new thread its own number, once
    work_alone()

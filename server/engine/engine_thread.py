"""The engine's thread as the event loop sees it: commands go in, answers come back or fail. Event loop."""

import asyncio
import logging
import threading
from collections.abc import Callable
from concurrent.futures import Future
from functools import partial
from typing import Any, TypeVar

import torch

from server.engine.commands import Command, Stop
from server.engine.core import EngineCore
from server.errors import Unavailable
from server.openmp import bound_team

log = logging.getLogger(__name__)

Answer = TypeVar("Answer")


class EngineThread:
    """Owns the thread, and the commands that wait for an answer: none waits for a thread that has ended."""

    def __init__(self, core: EngineCore, on_death: Callable[[], None]) -> None:
        """`on_death` is called on the event loop if the thread ends without having been told to."""
        self.died = asyncio.Event()
        self._core = core
        self._on_death = on_death
        self._ended = False
        self._unanswered: set[Future[Any]] = set()
        self._loop = asyncio.get_running_loop()
        self._thread = threading.Thread(target=self._run, name="loraplex-engine", daemon=True)

    def start(self) -> None:
        self._thread.start()

    async def stop(self) -> None:
        """Ends the thread after its current step."""
        self._core.put(Stop())
        await asyncio.to_thread(self._thread.join)

    async def ask(self, command: Callable[[Future[Answer]], Command]) -> Answer:
        """Sends what `command` makes with a place for the answer, and waits for that.

        Raises:
            Unavailable: the thread has ended, or ends before it answers.
        """
        if self._ended:
            raise engine_down()
        answer: Future[Answer] = Future()
        self._unanswered.add(answer)
        self._core.put(command(answer))
        waiting = asyncio.wrap_future(answer)
        waiting.add_done_callback(lambda _: self._unanswered.discard(answer))
        # Shielded: the engine obeys whether or not somebody still waits, and must find a place for its answer.
        return await asyncio.shield(waiting)

    def _end(self, *, died: bool) -> None:
        self._ended = True
        for answer in self._unanswered:
            if not answer.done():
                answer.set_exception(engine_down())
        if died:
            self.died.set()
            self._on_death()

    def _run(self) -> None:
        """Engine thread."""
        died = False
        try:
            torch.set_num_threads(torch.get_num_threads())  # OpenMP's count belongs to the thread that opens a region
            with bound_team(self._core.runner.base.device.type):
                self._core.run()
        except BaseException:
            log.exception("the engine thread died")
            died = True
        self._loop.call_soon_threadsafe(partial(self._end, died=died))


def engine_down() -> Unavailable:
    return Unavailable("the engine is down", reason="ENGINE_DOWN")

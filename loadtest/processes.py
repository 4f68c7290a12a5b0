"""One load split over processes, each with its own share of the schedule; results merged."""

import asyncio
import contextlib
import multiprocessing
import signal
import time
from dataclasses import replace
from multiprocessing.connection import Connection
from typing import Any

from loadtest.generator import LoadGenerator, Outcome, Progress, Share

_HEAD_START = 0.2  # seconds between everything being ready and second 0
_REPORT_PERIOD = 0.25  # seconds between two counts of a process


class LoadProcessError(Exception):
    """A load process ended without a result."""


class Load:
    """Owns the sending side of a run: this process's event loop for one process, child processes for more."""

    def __init__(self, share: Share, processes: int, stop: asyncio.Event) -> None:
        self._shares = split(share, processes)
        self._stop = stop
        self._progresses = [Progress() for _ in self._shares]
        self.start = 0.0  # time.monotonic() of second 0, once `run` has begun to send

    @property
    def progress(self) -> Progress:
        return sum(self._progresses, Progress())

    async def run(self) -> list[Outcome]:
        """Sends the whole share; one outcome per process, also of one that ended early.

        Raises:
            LoadProcessError: a process ended before all were ready, or all of them did later.
        """
        if len(self._shares) == 1:
            generator = LoadGenerator(self._shares[0], self._progresses[0], self._stop)
            return [await generator.run(self._begin())]
        context = multiprocessing.get_context("spawn")  # gRPC does not survive a fork
        children, connections = [], []
        try:
            for share in self._shares:
                mine, theirs = context.Pipe()
                connections.append(mine)
                children.append(context.Process(target=_child, args=(share, theirs), daemon=True))
                children[-1].start()
                theirs.close()
            for connection in connections:
                await asyncio.to_thread(_receive, connection)  # it is ready
            start = self._begin()
            for connection in connections:
                connection.send(start)
            stopping = asyncio.create_task(self._pass_on_stop(connections))
            outcomes = await asyncio.gather(*[self._follow(index, mine) for index, mine in enumerate(connections)])
            stopping.cancel()
            if all(outcome.process_lost for outcome in outcomes):
                raise LoadProcessError("all load processes ended before they had a result")
            return outcomes
        finally:
            for child in children:
                child.kill()
                child.join()
            for connection in connections:
                connection.close()

    def _begin(self) -> float:
        self.start = time.monotonic() + _HEAD_START
        return self.start

    async def _follow(self, index: int, connection: "Connection[Any, Any]") -> Outcome:
        while True:
            try:
                received = await asyncio.to_thread(_receive, connection)
            except LoadProcessError:
                sent = self._progresses[index].sent
                unsent = len(self._shares[index].arrivals) - sent
                ended = time.monotonic()
                return Outcome((), (), cpu_share=0.0, unsent=unsent, cut=sent, ended=ended, process_lost=True)
            if isinstance(received, Outcome):
                if received.server_lost:
                    self._stop.set()
                return received
            self._progresses[index] = received

    async def _pass_on_stop(self, connections: "list[Connection[Any, Any]]") -> None:
        await self._stop.wait()
        for connection in connections:
            with contextlib.suppress(OSError):  # it has ended already
                connection.send("stop")


def split(share: Share, processes: int) -> list[Share]:
    """Every n-th arrival to the same process, so that each sees the whole time; a closed loop's places likewise."""
    processes = min(processes, len(share.arrivals), share.concurrency or processes)
    return [
        replace(
            share,
            arrivals=share.arrivals[index::processes],
            concurrency=len(range(index, share.concurrency, processes)),
        )
        for index in range(processes)
    ]


def _receive(connection: "Connection[Any, Any]") -> Any:
    try:
        return connection.recv()
    except (EOFError, OSError) as error:
        raise LoadProcessError("a load process ended before it had a result") from error


def _child(share: Share, connection: "Connection[Any, Any]") -> None:
    """A child process. Signals to the whole group reach it too, but only the parent says when to stop."""
    for signum in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signum, signal.SIG_IGN)
    asyncio.run(_generate(share, connection))


async def _generate(share: Share, connection: "Connection[Any, Any]") -> None:
    stop, progress = asyncio.Event(), Progress()
    generator = LoadGenerator(share, progress, stop)
    connection.send("ready")
    start = await asyncio.to_thread(connection.recv)
    asyncio.get_running_loop().add_reader(connection.fileno(), stop.set)  # all that comes now is the word to stop

    async def report() -> None:
        while True:
            await asyncio.sleep(_REPORT_PERIOD)
            connection.send(progress)

    reporting = asyncio.create_task(report())
    outcome = await generator.run(start)
    reporting.cancel()
    connection.send(outcome)

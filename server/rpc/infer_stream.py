"""Many requests on one stream: they are answered side by side, and each reports its own failure. Event loop only."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterable, Callable
from contextlib import aclosing
from typing import TypeVar

MAX_CONCURRENT = 256  # requests of one stream; more wait in the client's send buffer
MAX_UNSENT = 16  # responses that wait for a slow reader; behind them tokens collect in the engine's streams

Request = TypeVar("Request")
Response = TypeVar("Response")


async def answer_concurrently(
    requests: AsyncIterable[Request], answer: Callable[[Request], AsyncGenerator[Response, None]]
) -> AsyncGenerator[tuple[Request, Response | Exception], None]:
    """Yields what `answer` gives for each request, or the exception that ended it, in the order in which it comes.

    Ends when the requests have ended and all of them are answered. Whatever ends the iteration ends the requests too.

    Raises:
        Exception: whatever reading the requests raises.
    """
    unsent: asyncio.Queue[tuple[Request, Response | Exception] | Exception | None] = asyncio.Queue(MAX_UNSENT)
    room = asyncio.Semaphore(MAX_CONCURRENT)
    running: set[asyncio.Task[None]] = set()

    async def run(request: Request) -> None:
        try:
            async with aclosing(answer(request)) as responses:
                async for response in responses:
                    await unsent.put((request, response))
        except Exception as error:
            await unsent.put((request, error))
        finally:
            room.release()

    async def read() -> None:
        try:
            async for request in requests:
                await room.acquire()
                task = asyncio.create_task(run(request))
                running.add(task)
                task.add_done_callback(running.discard)
            if running:
                await asyncio.wait(running)
            await unsent.put(None)
        except Exception as error:
            await unsent.put(error)

    reader = asyncio.create_task(read())
    try:
        while (item := await unsent.get()) is not None:
            if isinstance(item, Exception):
                raise item
            yield item
    finally:
        tasks = {reader, *running}
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

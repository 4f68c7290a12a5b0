"""How a run goes while it goes: a line that is drawn anew on a terminal, a line now and then elsewhere."""

import asyncio
import contextlib
import time
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.live import Live
from rich.text import Text

from loadtest.generator import Progress
from loadtest.processes import Load

LIVE_PERIOD = 0.25  # seconds between two lines on a terminal
LOG_PERIOD = 10.0  # and where there is none: a file, or the log of a CI


@contextlib.contextmanager
def live(console: Console, load: Load, total: int) -> Iterator[None]:
    """Says how a load of `total` requests goes while the block runs, on the running event loop."""
    with contextlib.ExitStack() as stack:
        if console.is_terminal:
            shown = stack.enter_context(Live(console=console, transient=True, auto_refresh=False))
            showing = _show(load, total, LIVE_PERIOD, lambda line: shown.update(Text(line), refresh=True))
        else:
            showing = _show(load, total, LOG_PERIOD, lambda line: console.print(Text(line), soft_wrap=True))
        task = asyncio.get_running_loop().create_task(showing)
        stack.callback(task.cancel)
        yield


def live_line(elapsed: float | None, count: Progress, total: int, tokens_per_second: float) -> str:
    """How it goes, `elapsed` seconds from second 0; None: the load processes are not ready."""
    if elapsed is None:
        return "starting"
    return (
        f"{max(0.0, elapsed):6.1f} s   sent {count.sent:,} of {total:,}   running {count.sent - count.done:,}   "
        f"done {count.done:,}   failed {count.failed:,}   {tokens_per_second:,.0f} tokens/s"
    )


async def _show(load: Load, total: int, period: float, write: Callable[[str], object]) -> None:
    before, tokens = time.monotonic(), 0
    while True:
        await asyncio.sleep(period)
        now, count = time.monotonic(), load.progress
        elapsed = now - load.start if load.start else None
        write(live_line(elapsed, count, total, (count.tokens - tokens) / (now - before)))
        before, tokens = now, count.tokens

"""What is said while a run goes on, with a real load behind it."""

import asyncio
import re
import time
from collections.abc import Callable
from io import StringIO

import pytest
from rich.console import Console

from loadtest import live as module
from loadtest.generator import Progress, Share
from loadtest.live import live, live_line
from loadtest.processes import Load
from loadtest.schedule import Arrival
from tests.loadtest.conftest import ScriptedServer

LINE = r"\d\.\d s   sent [1-9]\d* of 60   running \d+   done [1-9]\d*   failed 0   [1-9]\d* tokens/s"


async def watched(console: Console, address: str) -> None:
    arrivals = tuple(Arrival(index * 0.01, "a", index, 4, 1) for index in range(60))
    load = Load(Share(address, arrivals, 0, 1, 100, 30.0), 1, asyncio.Event())
    with live(console, load, len(arrivals)):
        await load.run()


async def test_a_terminal_has_one_line_that_changes(
    scripted: Callable[..., ScriptedServer], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "LIVE_PERIOD", 0.1)
    drawn = StringIO()
    await watched(Console(file=drawn, force_terminal=True, width=120), scripted().address)
    assert len(set(re.findall(LINE, drawn.getvalue()))) >= 3
    assert drawn.getvalue().endswith("\x1b[2K")  # nothing of it is left
    await asyncio.sleep(0)
    assert len(asyncio.all_tasks()) == 1


async def test_a_file_has_a_line_now_and_then(
    scripted: Callable[..., ScriptedServer], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "LOG_PERIOD", 0.35)
    written = StringIO()
    started = time.monotonic()
    await watched(Console(file=written), scripted().address)
    elapsed = time.monotonic() - started
    lines = written.getvalue().splitlines()
    assert 1 <= len(lines) <= elapsed / 0.35
    assert re.fullmatch(rf" *{LINE}", lines[0])


def test_there_is_no_time_before_second_0() -> None:
    assert live_line(None, Progress(), 40, 0.0) == "starting"
    assert live_line(-0.1, Progress(), 40, 0.0).startswith("   0.0 s   sent 0 of 40 ")
    assert "running 1   done 2   failed 1   8 tokens/s" in live_line(3.0, Progress(3, 2, 1, 9), 40, 8.0)

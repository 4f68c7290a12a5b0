"""A channel to a server that hangs."""

import asyncio
import signal
import subprocess
import sys
import time

import pytest

from loadtest import channel
from loadtest.generator import LoadGenerator, Progress, Share
from loadtest.schedule import Arrival

NULL_SERVER = "from loadtest.cli import loadtest_command; loadtest_command()"


@pytest.mark.parametrize("concurrency", [0, 2])
async def test_a_server_that_hangs_is_lost(monkeypatch: pytest.MonkeyPatch, concurrency: int) -> None:
    monkeypatch.setattr(channel, "_PING_MS", 100)
    monkeypatch.setattr(channel, "_PING_TIMEOUT_MS", 200)
    command = [sys.executable, "-c", NULL_SERVER, "null-server", "--listen", "127.0.0.1:0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        try:
            assert server.stdout
            port = server.stdout.readline().split()[-1]
            arrivals = tuple(Arrival(index * 0.01, "", index, 4, 1) for index in range(5_000))
            share = Share(f"127.0.0.1:{port}", arrivals, concurrency, seed=1, vocab_size=100, timeout=300.0)
            progress = Progress()
            load = LoadGenerator(share, progress, asyncio.Event())
            running = asyncio.create_task(load.run(time.monotonic() + 0.1))
            while progress.done < 20:
                await asyncio.sleep(0.01)
            server.send_signal(signal.SIGSTOP)
            outcome = await asyncio.wait_for(running, 60)
        finally:
            server.kill()
    assert outcome.server_lost.startswith("the server was lost ")
    assert sum(result.ok for result in outcome.results) >= 20
    assert outcome.unsent > 1_000

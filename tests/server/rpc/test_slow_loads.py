"""An adapter that is slow to read keeps nobody waiting but those who asked for it."""

import asyncio
import threading
from pathlib import Path
from typing import Any

import pytest

from adapters.format import read_adapter
from server.pb.loraplex.v1 import inference_pb2 as pb
from tests.server.rpc.conftest import Running


def ask(adapter: str, max_tokens: int = 10) -> pb.GenerateRequest:
    sampling = pb.SamplingParams(max_tokens=max_tokens, ignore_eos=True)
    return pb.GenerateRequest(prompt="Tell me", adapter=adapter, sampling=sampling)


async def test_others_run_while_an_adapter_is_read(running: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    reading, go_on = asyncio.Event(), threading.Event()
    loop = asyncio.get_running_loop()

    def slowly(folder: Path, *arguments: Any) -> Any:
        if folder.name == "plain":
            loop.call_soon_threadsafe(reading.set)
            go_on.wait(10)
        return read_adapter(folder, *arguments)

    monkeypatch.setattr("server.lora.loader.read_adapter", slowly)
    try:
        async with asyncio.timeout(10):
            await running.inference.Generate(ask("attention"))
            slow = asyncio.ensure_future(running.inference.Generate(ask("plain")))
            await reading.wait()
            stream = running.inference.GenerateStream(ask("attention", max_tokens=100))
            assert sum([len(message.token_ids) async for message in stream]) == 100
            for adapter in ("", "head"):  # the second is read by the other thread
                assert len((await running.inference.Generate(ask(adapter))).token_ids) == 10
            assert not slow.done()
            go_on.set()
            assert len((await slow).token_ids) == 10
    finally:
        go_on.set()

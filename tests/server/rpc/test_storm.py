"""A thousand rounds of everything that adapters go through, beside good traffic: nothing is left behind."""

import asyncio
import gc
import resource
import weakref
from collections.abc import Callable
from pathlib import Path

import pytest
from torch import Tensor

from server.lora.store import AdapterRef
from server.pb.loraplex.v1 import adapters_pb2 as pb
from tests.conftest import ADAPTERS
from tests.server.rpc.conftest import Running, Serve, listed
from tests.server.rpc.test_inference import ask, idle

ROUNDS = 1000
TASKS = 8
ADAPTER_BYTES = 59_000  # at least, of what is loaded
LEAK_BYTES = ROUNDS * ADAPTER_BYTES // 10  # less than the weights of a tenth of the rounds


def resident_bytes() -> int:
    gc.collect()
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


class Storm:
    """Tasks that load, use, replace and unload adapters of their own, in less room than all of them need."""

    def __init__(self, running: Running) -> None:
        self.running = running
        self.weights: list[weakref.ref[Tensor]] = []

    async def run(self, rounds: int) -> None:
        await asyncio.gather(*[self._rounds(f"storm-{task}", rounds // TASKS) for task in range(TASKS)])

    async def _rounds(self, name: str, rounds: int) -> None:
        adapters = self.running.adapters
        for number in range(rounds):
            await self._load(name, replace=False)
            await self._use(name)
            if number % 4 == 0:
                await self._load(name, replace=True)
                await self._use(name)
            await adapters.UnloadAdapter(pb.UnloadAdapterRequest(name=name, mode=(pb.DRAIN, pb.FORCE)[number % 2]))

    async def _load(self, name: str, *, replace: bool) -> None:
        await self.running.adapters.LoadAdapter(pb.LoadAdapterRequest(name=name, source="plain", replace=replace))
        copy = self.running.engine.adapters.memory.get(AdapterRef(name, "1"))
        if copy is not None:  # or others needed its room already
            self.weights.append(weakref.ref(next(iter(copy.adapter.weights.values())).lora_a))

    async def _use(self, name: str) -> None:
        """Of one token, after one that ends while it runs."""
        answer = await self.running.inference.Generate(ask(adapter=name, max_tokens=1))
        assert answer.adapter.name == name


async def _while(busy: Callable[[], bool], traffic: Callable[[], object]) -> int:
    raise NotImplementedError

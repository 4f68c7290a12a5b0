"""A thousand rounds of what adapters go through, beside good traffic: nothing is left behind."""

import asyncio
import gc
import resource
import weakref
from pathlib import Path

import grpc
from torch import Tensor

from server.lora.store import AdapterRef
from server.pb.loraplex.v1 import adapters_pb2 as pb
from tests.conftest import ADAPTERS
from tests.server.rpc.conftest import Running, Serve, listed
from tests.server.rpc.test_inference import ask, idle

ROUNDS = 1000
TASKS = 8
ROOM = 300_000  # bytes of host memory, for five of the eight and the one of the good traffic
LEAK = 12 << 20  # bytes, less than the weights of a fifth of the rounds


def resident_bytes() -> int:
    gc.collect()
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def num_evictions(running: Running) -> float:
    """From host memory, of all adapters."""
    samples = (sample for metric in running.metrics.registry.collect() for sample in metric.samples)
    return sum(
        sample.value
        for sample in samples
        if sample.name == "loraplex_adapter_evictions_total" and sample.labels["tier"] == "host"
    )


class Storm:
    """Tasks that load, use, replace and unload each an adapter of its own, in less room than all of them need."""

    def __init__(self, running: Running) -> None:
        self.running = running
        self.weights: list[weakref.ref[Tensor]] = []

    async def run(self, rounds: int) -> None:
        await asyncio.gather(*[self._rounds(f"storm-{task}", rounds // TASKS) for task in range(TASKS)])

    async def _rounds(self, name: str, rounds: int) -> None:
        for number in range(rounds):
            await self._load(name)
            await self._use(name)
            if number % 4 == 0:
                await self._load(name, replace=True)
                await self._use(name)
            unload = pb.UnloadAdapterRequest(name=name, mode=(pb.DRAIN, pb.FORCE)[number % 2])
            await self.running.adapters.UnloadAdapter(unload)

    async def _load(self, name: str, *, replace: bool = False) -> None:
        load = pb.LoadAdapterRequest(name=name, source="plain", replace=replace)
        while True:
            try:
                await self.running.adapters.LoadAdapter(load)
            except grpc.aio.AioRpcError as error:
                if error.code() != grpc.StatusCode.RESOURCE_EXHAUSTED:  # all the room is in use
                    raise
                await asyncio.sleep(0.005)
            else:
                break
        copy = self.running.engine.adapters.memory.get(AdapterRef(name, "1"))
        if copy is not None:  # else others had its room already
            self.weights.append(weakref.ref(next(iter(copy.adapter.weights.values())).lora_a))

    async def _use(self, name: str) -> None:
        answer = await self.running.inference.Generate(ask(adapter=name, max_tokens=1))
        assert answer.adapter.name == name


async def test_a_storm_of_loads_leaves_nothing(serve: Serve) -> None:
    """Names, slots and memory are what they were, and so are the tokens of others."""
    async with serve(adapter_host_bytes=ROOM) as running:
        expected = list((await running.inference.Generate(ask(adapter="attention"))).token_ids)

        async def good_traffic() -> None:
            for _ in range(ROUNDS // 20):
                answer = await running.inference.Generate(ask(adapter="attention"))
                assert list(answer.token_ids) == expected

        storm = Storm(running)
        await storm.run(ROUNDS // 10)
        before = resident_bytes()
        await asyncio.gather(storm.run(ROUNDS), good_traffic())
        await idle(running)
        assert resident_bytes() - before < LEAK
        assert len(storm.weights) > ROUNDS
        assert sum(weights() is not None for weights in storm.weights) == 0
        assert num_evictions(running) > 0
        assert set(await listed(running)) == set(ADAPTERS)
        assert {adapter.name for adapter in running.parts.scheduler.slots.adapters()} <= {"attention"}
        assert running.engine.adapters.num_bytes == (await listed(running))["attention"].bytes_host

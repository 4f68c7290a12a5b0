"""Merging through a real client: on request, beside others, and what becomes of a merged adapter."""

import asyncio
import threading
from concurrent.futures import Future

import grpc
import pytest

from server.engine.commands import Merge
from server.lora.adapter import Adapter
from server.lora.store import AdapterRef
from server.pb.loraplex.v1 import adapters_pb2 as pb
from tests.server.rpc.conftest import Running, Serve, listed
from tests.server.rpc.test_inference import ask, failure


async def test_merge_and_unmerge(running: Running) -> None:
    plain = await running.inference.Generate(ask(adapter="plain"))
    other = await running.inference.Generate(ask(adapter="attention"))
    merged = await running.adapters.MergeAdapter(pb.MergeAdapterRequest(name="plain"))
    assert merged.seconds > 0
    assert merged.adapter.merged
    assert [name for name, adapter in (await listed(running)).items() if adapter.merged] == ["plain"]
    again = await running.inference.Generate(ask(adapter="plain"))
    assert (again.token_ids, again.adapter.merged) == (plain.token_ids, True)
    beside = await running.inference.Generate(ask(adapter="attention"))
    assert (beside.token_ids, beside.adapter.merged) == (other.token_ids, False)
    await running.adapters.UnmergeAdapter(pb.UnmergeAdapterRequest())
    assert not any(adapter.merged for adapter in (await listed(running)).values())
    error = await failure(running.adapters.MergeAdapter(pb.MergeAdapterRequest(name="nobody")))
    assert error.code() == grpc.StatusCode.NOT_FOUND


async def test_a_merged_adapter_is_replaced_and_unloaded(running: Running) -> None:
    expected = await running.inference.Generate(ask(adapter="plain"))
    await running.adapters.MergeAdapter(pb.MergeAdapterRequest(name="plain"))
    await running.adapters.LoadAdapter(pb.LoadAdapterRequest(name="plain", replace=True))
    assert (await running.inference.Generate(ask(adapter="plain"))).token_ids == expected.token_ids
    await running.adapters.MergeAdapter(pb.MergeAdapterRequest(name="plain"))
    await running.adapters.UnloadAdapter(pb.UnloadAdapterRequest(name="plain"))
    assert running.engine.merging.num_bytes == 0
    assert (await running.inference.Generate(ask())).token_ids != expected.token_ids


async def test_memory_of_a_merge_is_told_while_it_is_there_and_when_it_goes(running: Running) -> None:
    """All linear layers but the head, once more."""

    async def told() -> tuple[int, float | None]:
        answer = await running.adapters.ListAdapters(pb.ListAdaptersRequest())
        return answer.bytes_merged, running.metrics.registry.get_sample_value("loraplex_adapter_merged_bytes")

    assert await told() == (0, 0)
    shapes = running.parts.base.linear_layers.values()
    expected = sum(4 * shape.in_features * shape.out_features for shape in shapes if shape.kind == "linear")
    for name in ("plain", "plain"):
        merged = await running.adapters.MergeAdapter(pb.MergeAdapterRequest(name=name))
        assert merged.bytes_merged == expected > 0
        assert await told() == (expected, expected)
    unmerged = await running.adapters.UnmergeAdapter(pb.UnmergeAdapterRequest())
    assert (unmerged.freed_bytes, await told()) == (expected, (0, 0))
    assert (await running.adapters.UnmergeAdapter(pb.UnmergeAdapterRequest())).freed_bytes == 0

    merged = await running.adapters.MergeAdapter(pb.MergeAdapterRequest(name="plain"))
    freed = await running.adapters.UnloadAdapter(pb.UnloadAdapterRequest(name="plain"))
    assert freed.freed_bytes_host == merged.adapter.bytes_host + expected
    assert await told() == (0, 0)


async def test_a_merge_fails_with_the_engine(running: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever waits for an answer of the engine's thread hears when it dies, and so does who asks later."""
    await running.inference.Generate(ask(adapter="plain"))
    reached, die = threading.Event(), threading.Event()

    def stop_here(adapter: object) -> float:
        reached.set()
        die.wait()
        raise SystemExit("the weights are broken")

    monkeypatch.setattr(running.parts.runner, "merge", stop_here)
    merge = running.adapters.MergeAdapter(pb.MergeAdapterRequest(name="attention"))
    async with asyncio.timeout(10):
        await asyncio.to_thread(reached.wait)
        unload = running.adapters.UnloadAdapter(pb.UnloadAdapterRequest(name="plain"))
        while "plain" in await listed(running):
            await asyncio.sleep(0.01)
        die.set()
        for error in await asyncio.gather(failure(merge), failure(unload)):
            assert error.code() == grpc.StatusCode.UNAVAILABLE
            assert error.details() == "the engine is down"
    error = await failure(running.adapters.UnmergeAdapter(pb.UnmergeAdapterRequest()))
    assert error.code() == grpc.StatusCode.UNAVAILABLE


async def test_a_client_that_leaves_a_merge_leaves_the_engine_alive(
    running: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    reached, go_on = threading.Event(), threading.Event()
    merge = running.parts.runner.merge

    def slow(adapter: Adapter | None) -> float:
        reached.set()
        go_on.wait()
        return merge(adapter)

    monkeypatch.setattr(running.parts.runner, "merge", slow)
    call = running.adapters.MergeAdapter(pb.MergeAdapterRequest(name="plain"))
    other = asyncio.create_task(running.engine.merging.merge("attention"))  # and one that has not begun
    async with asyncio.timeout(10):
        await asyncio.to_thread(reached.wait)
        while not (await listed(running))["attention"].requests_running:
            await asyncio.sleep(0.01)
        call.cancel()
        other.cancel()
        await asyncio.wait([other])
        go_on.set()
        assert (await running.inference.Generate(ask(adapter="plain"))).token_ids
    assert not running.engine.died.is_set()


async def test_merging_on_request_needs_its_policy(serve: Serve) -> None:
    async with serve({"merge_policy": "off"}) as server:
        error = await failure(server.adapters.MergeAdapter(pb.MergeAdapterRequest(name="plain")))
        assert error.code() == grpc.StatusCode.FAILED_PRECONDITION
        assert "--merge-policy is off" in str(error.details())


async def test_what_an_operator_merged_stays_until_it_is_unmerged(serve: Serve) -> None:
    """As if it were pinned. What goes in its stead leaves host and device, and counts for both."""
    async with serve(adapter_host_bytes=30_000) as server:  # for two of these three
        merged = (await server.adapters.MergeAdapter(pb.MergeAdapterRequest(name="attention"))).adapter
        for name in ("feed-forward", "head"):
            await server.inference.Generate(ask(adapter=name))
        kept = {name for name, adapter in (await listed(server)).items() if adapter.tier != pb.DISK}
        assert kept == {"attention", "head"}
        assert (await listed(server))["attention"].merged
        answer = await server.adapters.ListAdapters(pb.ListAdaptersRequest())
        assert answer.bytes_host_pinned == merged.bytes_host
        for tier in ("host", "device"):
            labels = {"adapter": "feed-forward", "tier": tier}
            for counter in ("evictions_total", "loads_total"):
                assert server.metrics.registry.get_sample_value(f"loraplex_adapter_{counter}", labels) == 1
            seconds = server.metrics.registry.get_sample_value("loraplex_adapter_load_time_seconds_total", labels)
            assert seconds is not None
            assert seconds > 0
        await server.adapters.UnmergeAdapter(pb.UnmergeAdapterRequest())
        await server.inference.Generate(ask(adapter="feed-forward"))
        assert (await listed(server))["attention"].tier == pb.DISK


async def test_what_was_merged_unasked_goes_and_that_is_told(serve: Serve) -> None:
    async with serve({"merge_policy": "auto"}, adapter_host_bytes=30_000) as server:
        await server.inference.Generate(ask(adapter="attention"))
        copy = server.engine.adapters.memory.get(AdapterRef("attention", "1"))
        assert copy is not None
        events = aiter(server.adapters.WatchAdapters(pb.WatchAdaptersRequest()))

        async def told(kind: int) -> pb.Adapter:
            async with asyncio.timeout(10):
                event = await anext(events)
                while (event.type, event.adapter.name) != (kind, "attention"):
                    event = await anext(events)
            adapter: pb.Adapter = event.adapter
            return adapter

        await told(pb.AdapterEvent.SNAPSHOT)
        server.engine._core.put(Merge(copy.adapter, Future()))  # as its policy would
        assert (await told(pb.AdapterEvent.UPDATED)).merged
        for name in ("feed-forward", "head"):
            await server.inference.Generate(ask(adapter=name))
        assert not (await told(pb.AdapterEvent.EVICTED)).merged
        assert server.engine.merging.num_bytes == 0

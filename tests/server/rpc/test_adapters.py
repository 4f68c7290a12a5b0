"""The Adapters service through a real client: load, list, unload, and refusals that disturb nobody."""

import asyncio
import shutil
from pathlib import Path
from typing import Any

import grpc

from server.pb.loraplex.v1 import adapters_pb2 as pb
from server.pb.loraplex.v1.inference_pb2 import GenerateResponse
from tests.conftest import ADAPTERS
from tests.server.rpc.conftest import Running, Serve
from tests.server.rpc.test_inference import ask, failure


async def listed(running: Running) -> dict[str, pb.Adapter]:
    answer = await running.adapters.ListAdapters(pb.ListAdaptersRequest())
    return {adapter.name: adapter for adapter in answer.adapters}


async def test_the_life_of_an_adapter(running: Running) -> None:
    before = await listed(running)
    assert set(before) == set(ADAPTERS)
    assert before["plain"].state == pb.AVAILABLE
    assert before["plain"].tier == pb.DISK

    loaded = await running.adapters.LoadAdapter(pb.LoadAdapterRequest(name="plain"))
    assert (loaded.state, loaded.tier, loaded.rank, loaded.generation) == (pb.READY, pb.HOST, 8, 1)
    assert loaded.bytes_host > 0
    assert "q_proj" in loaded.target_modules

    await running.inference.Generate(ask(adapter="plain"))
    assert (await listed(running))["plain"].tier == pb.DEVICE

    freed = await running.adapters.UnloadAdapter(pb.UnloadAdapterRequest(name="plain"))
    assert freed.freed_bytes_host == loaded.bytes_host
    assert "plain" not in await listed(running)
    assert (await failure(running.inference.Generate(ask(adapter="plain")))).code() == grpc.StatusCode.NOT_FOUND
    assert (
        await failure(running.adapters.UnloadAdapter(pb.UnloadAdapterRequest(name="plain")))
    ).code() == grpc.StatusCode.NOT_FOUND

    again = await running.adapters.LoadAdapter(pb.LoadAdapterRequest(name="plain"))
    assert again.generation > loaded.generation
    assert again.digest == loaded.digest


async def test_a_name_that_is_taken(running: Running) -> None:
    await running.adapters.LoadAdapter(pb.LoadAdapterRequest(name="plain"))
    error = await failure(running.adapters.LoadAdapter(pb.LoadAdapterRequest(name="plain")))
    assert error.code() == grpc.StatusCode.ALREADY_EXISTS
    replaced = await running.adapters.LoadAdapter(pb.LoadAdapterRequest(name="plain", source="head", replace=True))
    assert replaced.rank == 6


async def test_an_adapter_that_appears_is_served(running: Running) -> None:
    shutil.copytree(running.adapters_dir / "plain", running.adapters_dir / "newcomer" / "3")
    plain = await running.inference.Generate(ask(adapter="plain"))
    newcomer = await running.inference.Generate(ask(adapter="newcomer"))
    assert newcomer.token_ids == plain.token_ids
    assert newcomer.adapter.version == "3"


async def test_replacing_under_a_running_stream(running: Running) -> None:
    expected = await running.inference.Generate(ask(adapter="plain", max_tokens=200))
    call = running.inference.GenerateStream(ask(adapter="plain", max_tokens=200))
    stream = aiter(call)
    messages: list[GenerateResponse] = [await anext(stream)]
    await running.adapters.LoadAdapter(pb.LoadAdapterRequest(name="plain", source="attention", replace=True))
    new = await running.inference.Generate(ask(adapter="plain"))
    messages += [message async for message in stream]
    assert [token for message in messages for token in message.token_ids] == list(expected.token_ids)
    attention = await running.inference.Generate(ask(adapter="attention"))
    assert new.token_ids == attention.token_ids


async def test_bad_loads_change_nobody_elses_tokens(running: Running) -> None:
    """Good traffic beside fifty refused loads says what it says without them."""
    expected = [list((await running.inference.Generate(ask(adapter=name))).token_ids) for name in ADAPTERS]
    broken = running.adapters_dir / "broken"
    faults: list[tuple[Any, grpc.StatusCode]] = [
        (lambda: (broken / "adapter_config.json").write_text("{"), grpc.StatusCode.INVALID_ARGUMENT),
        (lambda: (broken / "adapter_model.safetensors").write_bytes(b"\0" * 64), grpc.StatusCode.INVALID_ARGUMENT),
        (lambda: (broken / "adapter_model.safetensors").unlink(), grpc.StatusCode.INVALID_ARGUMENT),
        (lambda: _set(broken, '"r": 8', '"r": 65'), grpc.StatusCode.FAILED_PRECONDITION),
        (lambda: _set(broken, '"use_qalora": false', '"use_qalora": true'), grpc.StatusCode.FAILED_PRECONDITION),
    ]

    async def bad_loads() -> None:
        for damage, code in faults * 10:
            shutil.rmtree(broken, ignore_errors=True)
            shutil.copytree(running.adapters_dir / "plain", broken)
            damage()
            error = await failure(running.adapters.LoadAdapter(pb.LoadAdapterRequest(name="broken")))
            assert error.code() == code, error.details()

    async def good_traffic() -> list[list[int]]:
        answers = await asyncio.gather(*[running.inference.Generate(ask(adapter=name)) for name in ADAPTERS])
        return [list(answer.token_ids) for answer in answers]

    loading = asyncio.create_task(bad_loads())
    rounds = 0
    while not loading.done() or rounds < 3:
        assert await good_traffic() == expected
        rounds += 1
    await loading
    failed = (await listed(running))["broken"]
    assert failed.state == pb.FAILED
    assert failed.error


def _set(folder: Path, old: str, new: str) -> None:
    path = folder / "adapter_config.json"
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


async def test_a_long_reason_still_arrives(running: Running) -> None:
    error = await failure(running.adapters.LoadAdapter(pb.LoadAdapterRequest(name="x", source="../" * 4000)))
    assert error.code() == grpc.StatusCode.INVALID_ARGUMENT


async def test_merge_and_unmerge(running: Running) -> None:
    plain = await running.inference.Generate(ask(adapter="plain"))
    other = await running.inference.Generate(ask(adapter="attention"))
    merged = await running.adapters.MergeAdapter(pb.MergeAdapterRequest(name="plain"))
    assert merged.seconds > 0
    assert merged.bytes_merged > 0
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
    assert running.engine.merged_bytes == 0
    assert (await running.inference.Generate(ask())).token_ids != expected.token_ids


async def test_merging_on_request_needs_its_policy(serve: Serve) -> None:
    async with serve({"merge_policy": "off"}) as server:
        error = await failure(server.adapters.MergeAdapter(pb.MergeAdapterRequest(name="plain")))
        assert error.code() == grpc.StatusCode.FAILED_PRECONDITION
        assert "--merge-policy is off" in str(error.details())

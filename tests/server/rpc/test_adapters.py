"""The Adapters service through a real client: the life of adapters, and refusals that disturb nobody."""

import asyncio
import gc
import shutil
import weakref
from collections import Counter
from contextlib import aclosing
from typing import Any

import grpc
from torch import Tensor

from server.engine.request import SamplingParams
from server.lora.store import AdapterRef
from server.lora.uploads import UploadLimits
from server.pb.loraplex.v1 import adapters_pb2 as pb
from server.pb.loraplex.v1.inference_pb2 import GenerateResponse
from server.rpc import adapters as service
from tests.conftest import ADAPTERS
from tests.server.rpc.conftest import Running, edit_config, listed
from tests.server.rpc.test_inference import ask, failure, idle, mix
from tests.server.rpc.test_uploads import WEIGHTS, upload


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


async def test_another_folder_under_a_stored_name_is_a_replacement(running: Running) -> None:
    """Whether or not the name's own adapter is in memory."""
    error = await failure(running.adapters.LoadAdapter(pb.LoadAdapterRequest(name="plain", source="head")))
    assert error.code() == grpc.StatusCode.ALREADY_EXISTS
    assert (await listed(running))["plain"].bytes_disk > 0


async def test_targets_that_the_base_lacks_are_told(running: Running) -> None:
    edit_config(running.adapters_dir / "attention", '"q_proj"', r'"q_proj", "nonsense", "\ud800"')
    loaded = await running.adapters.LoadAdapter(pb.LoadAdapterRequest(name="attention"))
    assert list(loaded.unmatched_targets) == ["nonsense", r"\ud800"]
    assert loaded.num_layers == 2 * len(loaded.target_modules)


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
        (lambda: edit_config(broken, '"r": 8', '"r": 65'), grpc.StatusCode.FAILED_PRECONDITION),
        (lambda: edit_config(broken, '"use_qalora": false', '"use_qalora": true'), grpc.StatusCode.FAILED_PRECONDITION),
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


async def test_a_long_reason_still_arrives(running: Running) -> None:
    error = await failure(running.adapters.LoadAdapter(pb.LoadAdapterRequest(name="x", source="../" * 4000)))
    assert error.code() == grpc.StatusCode.INVALID_ARGUMENT


async def test_versions_promotion_and_traffic(running: Running) -> None:
    for source in ("plain", "attention"):
        await running.adapters.UploadAdapter(upload("mail", running.adapters_dir / source, replace=True))

    async def served(**request: Any) -> str:
        message = ask(adapter="mail", max_tokens=1)
        message.MergeFrom(type(message)(**request))
        return str((await running.inference.Generate(message)).adapter.version)

    assert await served() == "2"
    promoted = await running.adapters.PromoteVersion(pb.PromoteVersionRequest(name="mail", version="1"))
    assert (promoted.version, promoted.current) == ("1", True)
    assert await served() == "1"
    shares = await running.adapters.SetTraffic(pb.SetTrafficRequest(name="mail", percent_by_version={"2": 50}))
    assert [(adapter.version, adapter.traffic_percent) for adapter in shares.adapters] == [("1", 0), ("2", 50)]
    drawn = {label: await served(request_id=label) for label in map(str, range(20))}
    assert set(drawn.values()) == {"1", "2"}
    assert drawn == {label: await served(request_id=label) for label in drawn}
    error = await failure(running.adapters.SetTraffic(pb.SetTrafficRequest(name="mail", percent_by_version={"2": 101})))
    assert error.code() == grpc.StatusCode.INVALID_ARGUMENT
    error = await failure(running.adapters.PromoteVersion(pb.PromoteVersionRequest(name="mail", version="3")))
    assert error.code() == grpc.StatusCode.NOT_FOUND


async def test_a_damaged_version_is_data_loss_and_what_is_loaded_serves(running: Running) -> None:
    await running.adapters.UploadAdapter(upload("sent", running.adapters_dir / "plain"))
    expected = await running.inference.Generate(ask(adapter="sent"))
    weights = running.adapters_dir / "sent" / "1" / WEIGHTS
    data = bytearray(weights.read_bytes())
    data[-5] ^= 1
    weights.write_bytes(data)
    error = await failure(running.adapters.LoadAdapter(pb.LoadAdapterRequest(name="sent", replace=True)))
    assert error.code() == grpc.StatusCode.DATA_LOSS
    assert (await running.inference.Generate(ask(adapter="sent"))).token_ids == expected.token_ids
    listed_now = (await listed(running))["sent"]
    assert listed_now.state == pb.READY
    assert "SHA256SUMS" in listed_now.error


async def test_unload_modes(running: Running) -> None:
    streams = [aiter(running.inference.GenerateStream(ask(adapter="plain", max_tokens=200))) for _ in range(3)]
    for stream in streams:
        await anext(stream)
    other = asyncio.ensure_future(running.inference.Generate(ask(adapter="attention", max_tokens=100)))
    idle = pb.UnloadAdapterRequest(name="plain", mode=pb.IF_IDLE)
    error = await failure(running.adapters.UnloadAdapter(idle))
    assert error.code() == grpc.StatusCode.FAILED_PRECONDITION
    assert (await listed(running))["plain"].requests_running == 3
    freed = await running.adapters.UnloadAdapter(pb.UnloadAdapterRequest(name="plain", mode=pb.FORCE))
    assert freed.freed_bytes_host > 0
    for stream in streams:
        error = await failure(_rest(stream))
        assert error.code() == grpc.StatusCode.ABORTED
        assert "by force" in str(error.details())
    assert len((await other).token_ids) == 100
    await running.adapters.LoadAdapter(pb.LoadAdapterRequest(name="plain"))
    assert (await running.inference.Generate(ask(adapter="plain"))).token_ids
    assert (await running.adapters.UnloadAdapter(idle)).freed_bytes_host > 0
    error = await failure(running.adapters.UnloadAdapter(pb.UnloadAdapterRequest(name="head", mode=7)))  # type: ignore[arg-type]
    assert error.code() == grpc.StatusCode.INVALID_ARGUMENT


async def test_a_reader_that_stalls_does_not_hold_its_adapter(running: Running) -> None:
    params = SamplingParams(max_tokens=20, ignore_eos=True)
    async with aclosing(running.engine.generate([40, 41, 42], params, {"plain": 1.0})) as outputs:
        first = await anext(outputs)
        tokens = list(first.token_ids)
        await idle(running)
        weights = loaded_weights(running, "plain")
        unload = pb.UnloadAdapterRequest(name="plain", mode=pb.FORCE)
        assert (await running.adapters.UnloadAdapter(unload, timeout=10)).freed_bytes_host > 0
        gc.collect()
        assert weights() is None
        assert first.adapters[0].name == "plain"
        async for output in outputs:
            tokens += output.token_ids
    assert len(tokens) == 20


async def test_force_ends_mixtures_too(running: Running) -> None:
    """A request that sums several adapters uses every one of them."""
    request = mix({"plain": 0.5, "attention": 0.5})
    request.sampling.max_tokens = 200
    streams = [aiter(running.inference.GenerateStream(request)) for _ in range(2)]
    for stream in streams:
        await anext(stream)
    idle = pb.UnloadAdapterRequest(name="attention", mode=pb.IF_IDLE)
    error = await failure(running.adapters.UnloadAdapter(idle))
    assert error.code() == grpc.StatusCode.FAILED_PRECONDITION
    await running.adapters.UnloadAdapter(pb.UnloadAdapterRequest(name="attention", mode=pb.FORCE))
    for stream in streams:
        assert (await failure(_rest(stream))).code() == grpc.StatusCode.ABORTED
    assert (await listed(running))["plain"].requests_running == 0
    assert (await failure(running.inference.Generate(request))).code() == grpc.StatusCode.NOT_FOUND


async def test_the_label_of_a_mixture_draws_its_versions(running: Running) -> None:
    for source in ("plain", "attention"):
        await _publish(running, "mail", source)
    await running.adapters.SetTraffic(pb.SetTrafficRequest(name="mail", percent_by_version={"1": 50}))
    drawn = set()
    for number in range(12):
        request = mix({"mail": 0.5, "head": 1}, request_id=f"user-{number}")
        answers = [await running.inference.Generate(request) for _ in range(2)]
        versions = {answer.mix[0].version for answer in answers}
        assert len(versions) == 1
        drawn |= versions
    assert drawn == {"1", "2"}


async def test_all_answers_of_a_request_are_of_one_generation(running: Running) -> None:
    """Without a request_id too, where each request draws its version by chance."""
    for source in ("plain", "attention"):
        await _publish(running, "mail", source)
    await running.adapters.SetTraffic(pb.SetTrafficRequest(name="mail", percent_by_version={"1": 50}))
    drawn = set()
    for _ in range(12):
        answers = await _rest(running.inference.GenerateStream(ask(adapter="mail", n=4, max_tokens=1)))
        assert {answer.index for answer in answers} == {0, 1, 2, 3}
        generations = {answer.adapter.generation for answer in answers}
        assert len(generations) == 1
        drawn |= generations
    assert len(drawn) == 2
    assert {adapter.requests_running for adapter in (await listed(running)).values()} == {0}


async def _publish(running: Running, name: str, source: str) -> None:
    folder = running.adapters_dir / name
    version = len(list(folder.glob("*"))) + 1
    shutil.copytree(running.adapters_dir / source, folder / str(version))
    await running.engine.adapters.look(name)


async def _rest(stream: Any) -> list[GenerateResponse]:
    return [message async for message in stream]


async def test_pages_of_the_listing(running: Running) -> None:
    names, request = [], pb.ListAdaptersRequest(page_size=3)
    while True:
        answer = await running.adapters.ListAdapters(request)
        assert len(answer.adapters) <= 3
        names += [adapter.name for adapter in answer.adapters]
        request.page_token = answer.next_page_token
        if not request.page_token:
            break
    assert names == sorted(ADAPTERS)
    error = await failure(running.adapters.ListAdapters(pb.ListAdaptersRequest(page_token="?")))
    assert error.code() == grpc.StatusCode.INVALID_ARGUMENT


async def test_pins_are_counted(running: Running) -> None:
    pinned = await running.adapters.PinAdapter(pb.PinAdapterRequest(name="plain"))
    await running.adapters.LoadAdapter(pb.LoadAdapterRequest(name="head"))
    assert (pinned.pinned, pinned.state) == (True, pb.READY)
    answer = await running.adapters.ListAdapters(pb.ListAdaptersRequest())
    assert answer.bytes_host_pinned == pinned.bytes_host < answer.bytes_host < answer.bytes_host_limit
    assert not (await running.adapters.UnpinAdapter(pb.UnpinAdapterRequest(name="plain"))).pinned
    assert (await running.adapters.GetAdapter(pb.GetAdapterRequest(name="plain"))).bytes_host == pinned.bytes_host
    error = await failure(running.adapters.GetAdapter(pb.GetAdapterRequest(name="nobody")))
    assert error.code() == grpc.StatusCode.NOT_FOUND


async def test_watching(running: Running) -> None:
    call = running.adapters.WatchAdapters(pb.WatchAdaptersRequest())
    events = aiter(call)
    kinds = Counter([(await anext(events)).type for _ in range(len(ADAPTERS) + 1)])
    assert kinds == {pb.AdapterEvent.SNAPSHOT: len(ADAPTERS), pb.AdapterEvent.SYNCED: 1}
    await running.adapters.LoadAdapter(pb.LoadAdapterRequest(name="plain"))
    event = await anext(events)
    assert (event.type, event.adapter.name, event.adapter.state) == (pb.AdapterEvent.LOADED, "plain", pb.READY)
    await running.adapters.MergeAdapter(pb.MergeAdapterRequest(name="plain"))
    event = await anext(events)
    assert (event.type, event.adapter.name, event.adapter.merged) == (pb.AdapterEvent.UPDATED, "plain", True)
    draining = asyncio.create_task(running.server.drain(grace=5))
    assert (await failure(anext(events))).code() == grpc.StatusCode.UNAVAILABLE
    await draining


async def test_a_watcher_that_does_not_read_keeps_no_weights(running: Running) -> None:
    """Its call stands where it hands an event on."""
    for kind in (pb.AdapterEvent.SNAPSHOT, pb.AdapterEvent.REPLACED):
        await running.adapters.LoadAdapter(pb.LoadAdapterRequest(name="plain"))
        watching = service.AdaptersService(running.engine, UploadLimits(1, 1, 1)).WatchAdapters(
            pb.WatchAdaptersRequest(), None
        )
        async with aclosing(watching) as events:
            event = await anext(events)
            if kind == pb.AdapterEvent.REPLACED:
                await running.adapters.LoadAdapter(pb.LoadAdapterRequest(name="plain", replace=True))
            while (event.type, event.adapter.name) != (kind, "plain"):
                event = await anext(events)
            weights = loaded_weights(running, "plain")
            await running.adapters.UnloadAdapter(pb.UnloadAdapterRequest(name="plain"))
            gc.collect()
            assert weights() is None


def loaded_weights(running: Running, name: str) -> "weakref.ref[Tensor]":
    """Says whether the copy of the adapter that is in host memory now is still alive."""
    copy = running.engine.adapters.memory.get(AdapterRef(name, "1"))
    assert copy is not None
    return weakref.ref(next(iter(copy.adapter.weights.values())).lora_a)

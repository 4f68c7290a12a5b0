"""What the listing tells of adapters: on their way, in use without a name, evicted, without an effect."""

import asyncio
import threading
from pathlib import Path
from typing import Any

import grpc
import pytest
import safetensors.torch

from adapters.format import AdapterFiles, read_adapter
from server.pb.inference.grpc_service_pb2 import RepositoryIndexRequest
from server.pb.loraplex.v1 import adapters_pb2 as pb
from tests.server.rpc.conftest import Running, Serve, listed
from tests.server.rpc.test_inference import ask, failure, idle
from tests.server.rpc.test_uploads import WEIGHTS, upload


async def get(running: Running, name: str) -> pb.Adapter:
    adapter: pb.Adapter = await running.adapters.GetAdapter(pb.GetAdapterRequest(name=name))
    return adapter


async def draining(running: Running) -> list[tuple[str, int, int]]:
    """Name, generation and requests of what drains."""
    answer = await running.adapters.ListAdapters(pb.ListAdaptersRequest())
    assert all(each.state == pb.DRAINING and each.bytes_host for each in answer.draining)
    return [(each.name, each.generation, each.requests_running) for each in answer.draining]


@pytest.mark.parametrize("by_request", [True, False])
async def test_an_adapter_on_its_way(running: Running, monkeypatch: pytest.MonkeyPatch, by_request: bool) -> None:
    begun, go_on = threading.Event(), threading.Event()

    def read_slowly(*args: Any) -> AdapterFiles:
        begun.set()
        go_on.wait(10)
        return read_adapter(*args)

    monkeypatch.setattr("server.lora.loader.read_adapter", read_slowly)
    load = running.inference.Generate(ask(adapter="plain")) if by_request else running.adapters.LoadAdapter(
        pb.LoadAdapterRequest(name="plain"))  # fmt: skip
    loading = asyncio.ensure_future(load)
    await asyncio.to_thread(begun.wait, 10)
    adapter = (await listed(running))["plain"]
    assert (adapter.state, adapter.requests_waiting) == (pb.LOADING, int(by_request))
    for only_ready in (False, True):  # requests for it are taken, and wait
        index = await running.open_inference.RepositoryIndex(RepositoryIndexRequest(ready=only_ready))
        assert [model.state for model in index.models if model.name == "plain"] == ["LOADING"]
    go_on.set()
    await loading
    assert (await get(running, "plain")).state == pb.READY


async def test_generations_without_a_name_are_told_as_long_as_they_run(running: Running) -> None:
    """And are no less in use than those that have one."""
    stream = aiter(running.inference.GenerateStream(ask(adapter="plain", max_tokens=200)))
    first = await anext(stream)
    await running.adapters.LoadAdapter(pb.LoadAdapterRequest(name="plain", source="attention", replace=True))
    assert await draining(running) == [("plain", first.adapter.generation, 1)]
    answer = await running.adapters.ListAdapters(pb.ListAdaptersRequest(page_size=1))
    assert not answer.draining, "they come with the last page"
    assert (await get(running, "plain")).requests_running == 0
    unload = pb.UnloadAdapterRequest(name="plain", mode=pb.IF_IDLE)
    error = await failure(running.adapters.UnloadAdapter(unload))
    assert error.code() == grpc.StatusCode.FAILED_PRECONDITION
    assert "used by 1 requests" in str(error.details())
    async for _ in stream:
        pass
    await idle(running)
    await running.adapters.UnloadAdapter(unload)
    assert await draining(running) == []


async def test_what_was_evicted_is_still_known(serve: Serve) -> None:
    async with serve(adapter_host_bytes=64_000) as running:
        loaded = await running.adapters.LoadAdapter(pb.LoadAdapterRequest(name="plain"))
        await running.adapters.LoadAdapter(pb.LoadAdapterRequest(name="attention"))
        evicted = (await listed(running))["plain"]
        assert (evicted.state, evicted.tier, evicted.bytes_host) == (pb.AVAILABLE, pb.DISK, 0)
        for field in ("digest", "rank", "target_modules", "num_layers", "generation", "bytes_disk"):
            assert getattr(evicted, field) == getattr(loaded, field)


async def test_the_digest_of_what_was_published_is_known_without_loading_it(running: Running) -> None:
    sent = await running.adapters.UploadAdapter(upload("sent", running.adapters_dir / "plain"))
    await running.adapters.UnloadAdapter(pb.UnloadAdapterRequest(name="sent"))
    (running.adapters_dir / "sent" / "1").rename(running.adapters_dir / "sent" / "2")
    fresh = await get(running, "sent@2")
    assert (fresh.state, fresh.generation, fresh.digest) == (pb.AVAILABLE, 0, sent.digest)
    assert (await get(running, "head")).digest == "", "nothing is on record"
    (running.adapters_dir / "sent" / "2" / "SHA256SUMS").write_text("nonsense")
    assert (await get(running, "sent@2")).digest == ""


async def test_layers_are_told_by_target(running: Running) -> None:
    loaded = await running.adapters.LoadAdapter(pb.LoadAdapterRequest(name="one-layer"))
    assert dict(loaded.layers_by_target) == {"q_proj": 1, "gate_proj": 1}
    assert dict((await get(running, "one-layer")).layers_by_target) == {"q_proj": 1, "gate_proj": 1}
    assert not (await listed(running))["one-layer"].layers_by_target


@pytest.mark.parametrize("name", ["plain", "dora"])
async def test_an_adapter_that_adds_nothing_says_so(running: Running, name: str) -> None:
    """DoRA with zeros for B has its magnitudes still."""
    _zero_b(running.adapters_dir / name / WEIGHTS)
    loaded = await running.adapters.LoadAdapter(pb.LoadAdapterRequest(name=name))
    assert loaded.adds_nothing == (name == "plain")
    assert not (await running.adapters.LoadAdapter(pb.LoadAdapterRequest(name="head"))).adds_nothing


def _zero_b(path: Path) -> None:
    tensors = safetensors.torch.load_file(path)
    for name, tensor in tensors.items():
        if "lora_B" in name:
            tensor.zero_()
    safetensors.torch.save_file(tensors, path)

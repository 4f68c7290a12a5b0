"""Uploads through a real client: whole or not at all, whatever ends them."""

import asyncio
import contextlib
import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from server.pb.loraplex.v1 import adapters_pb2 as pb
from tests.server.rpc.conftest import Running, Serve, edit_config, listed
from tests.server.rpc.test_inference import ask, failure

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def upload(name: str, folder: Path, chunk: int = 10_000, **header: Any) -> Iterator[pb.UploadAdapterRequest]:
    """What a client sends."""
    files = {file: (folder / file).read_bytes() for file in (CONFIG, WEIGHTS)}
    declared = [
        pb.UploadFile(name=file, size=len(data), sha256=hashlib.sha256(data).hexdigest())
        for file, data in files.items()
    ]
    yield pb.UploadAdapterRequest(header=pb.UploadHeader(name=name, files=declared, **header))
    for file, data in files.items():
        for offset in range(0, len(data), chunk):
            part = pb.UploadChunk(file=file, offset=offset, data=data[offset : offset + chunk])
            yield pb.UploadAdapterRequest(chunk=part)


def leftovers(running: Running) -> list[Path]:
    return list((running.adapters_dir / ".publish").glob("*"))


async def test_an_upload_is_served_at_once(running: Running) -> None:
    expected = await running.inference.Generate(ask(adapter="plain"))
    uploaded = await running.adapters.UploadAdapter(upload("sent", running.adapters_dir / "plain", pin=True))
    assert (uploaded.version, uploaded.state, uploaded.pinned, uploaded.current) == ("1", pb.READY, True, True)
    answer = await running.inference.Generate(ask(adapter="sent"))
    assert answer.token_ids == expected.token_ids
    assert answer.adapter.digest == uploaded.digest == expected.adapter.digest
    assert {path.name for path in (running.adapters_dir / "sent" / "1").iterdir()} == {CONFIG, WEIGHTS, "SHA256SUMS"}
    assert leftovers(running) == []


async def test_an_upload_to_a_name_that_is_taken(running: Running) -> None:
    folder = running.adapters_dir / "attention"
    for name in ("plain", "plain@1", "tiny"):
        error = await failure(running.adapters.UploadAdapter(upload(name, folder)))
        assert error.code() == grpc.StatusCode.ALREADY_EXISTS
    error = await failure(running.adapters.UploadAdapter(upload("plain@1", folder, replace=True)))
    assert error.code() == grpc.StatusCode.ALREADY_EXISTS
    before = await running.adapters.LoadAdapter(pb.LoadAdapterRequest(name="plain"))
    error = await failure(
        running.adapters.UploadAdapter(upload("plain", folder, expected_generation=before.generation + 1))
    )
    assert error.code() == grpc.StatusCode.ABORTED
    after = await running.adapters.UploadAdapter(upload("plain", folder, expected_generation=before.generation))
    assert (after.version, after.current) == ("2", True)
    assert (await running.inference.Generate(ask(adapter="plain"))).adapter.version == "2"
    assert (await running.inference.Generate(ask(adapter="plain@1"))).adapter.generation == before.generation


def _change(index: int, **chunk: Any) -> Any:
    def apply(messages: list[pb.UploadAdapterRequest]) -> None:
        for field, value in chunk.items():
            setattr(messages[index].chunk, field, value)

    return apply


def _oversized(messages: list[pb.UploadAdapterRequest]) -> None:
    messages[0].header.files[1].size = 1 << 40


def _wrong_digest(messages: list[pb.UploadAdapterRequest]) -> None:
    messages[0].header.files[1].sha256 = "0" * 64


@pytest.mark.parametrize(
    ("damage", "code"),
    [
        (lambda messages: messages.clear(), grpc.StatusCode.INVALID_ARGUMENT),
        (lambda messages: messages.pop(0), grpc.StatusCode.INVALID_ARGUMENT),
        (lambda messages: messages.insert(1, messages[0]), grpc.StatusCode.INVALID_ARGUMENT),
        (lambda messages: messages.insert(1, pb.UploadAdapterRequest()), grpc.StatusCode.INVALID_ARGUMENT),
        (lambda messages: messages.pop(), grpc.StatusCode.INVALID_ARGUMENT),
        (lambda messages: messages.pop(2), grpc.StatusCode.INVALID_ARGUMENT),
        (lambda messages: messages.insert(3, messages[2]), grpc.StatusCode.INVALID_ARGUMENT),
        (lambda messages: messages.reverse(), grpc.StatusCode.INVALID_ARGUMENT),
        (_change(1, file="../evil"), grpc.StatusCode.INVALID_ARGUMENT),
        (_change(-1, data=b"x" * 10_000), grpc.StatusCode.INVALID_ARGUMENT),
        (_wrong_digest, grpc.StatusCode.INVALID_ARGUMENT),
        (_oversized, grpc.StatusCode.RESOURCE_EXHAUSTED),
    ],
)
async def test_uploads_that_are_refused(running: Running, damage: Any, code: grpc.StatusCode) -> None:
    messages = list(upload("sent", running.adapters_dir / "plain"))
    damage(messages)
    error = await failure(running.adapters.UploadAdapter(iter(messages)))
    assert error.code() == code, error.details()
    assert leftovers(running) == []
    assert "sent" not in await listed(running)


@pytest.mark.parametrize(
    ("rank", "code"),
    [(9, grpc.StatusCode.INVALID_ARGUMENT), (4096, grpc.StatusCode.FAILED_PRECONDITION)],
    ids=["its tensors have another rank", "over --max-lora-rank"],
)
async def test_an_upload_whose_rank_does_not_fit_is_not_published(
    running: Running, rank: int, code: grpc.StatusCode
) -> None:
    folder = running.adapters_dir / "plain"
    edit_config(folder, '"r": 8', f'"r": {rank}')
    error = await failure(running.adapters.UploadAdapter(upload("sent", folder)))
    assert error.code() == code, error.details()
    assert not (running.adapters_dir / "sent").exists()
    assert leftovers(running) == []


@pytest.mark.parametrize("how", ["cancel", "stall", "trickle"])
async def test_an_upload_that_ends_half_way_leaves_nothing(serve: Serve, how: str) -> None:
    limits = {"stall": {"upload_idle_seconds": 1}, "trickle": {"upload_seconds": 1}}.get(how, {})
    async with serve(**limits) as running:
        call = running.adapters.UploadAdapter()
        messages = list(upload("sent", running.adapters_dir / "plain", chunk=100))
        for message in messages[:3]:
            await call.write(message)
        if how == "cancel":
            async with asyncio.timeout(5):
                while not leftovers(running):
                    await asyncio.sleep(0.005)
            call.cancel()
        else:
            for message in messages[3:8] if how == "trickle" else ():
                await asyncio.sleep(0.3)
                with contextlib.suppress(grpc.aio.AioRpcError, asyncio.InvalidStateError):  # it has ended already
                    await call.write(message)
            error = await failure(call)
            assert error.code() == grpc.StatusCode.DEADLINE_EXCEEDED
            assert f"(--{next(iter(limits)).replace('_', '-')})" in str(error.details())
        async with asyncio.timeout(5):
            while leftovers(running):
                await asyncio.sleep(0.005)
        assert "sent" not in await listed(running)


async def test_two_uploads_of_one_name_at_once(running: Running) -> None:
    folder = running.adapters_dir / "plain"
    calls = [running.adapters.UploadAdapter(upload("sent", folder)) for _ in range(3)]
    results = await asyncio.gather(*calls, return_exceptions=True)
    codes = [result.code() for result in results if isinstance(result, grpc.aio.AioRpcError)]
    assert codes == [grpc.StatusCode.ALREADY_EXISTS] * 2
    assert leftovers(running) == []

"""Adapters that come over the wire: published when they can be served, and not before."""

import asyncio
import itertools
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from server.errors import (
    AdapterChanged,
    AdapterExists,
    IncompatibleAdapter,
    InvalidRequest,
    ServingError,
    UploadTooSlow,
)
from server.lora.cache import AdapterCache
from server.lora.events import AdapterStatus
from server.lora.uploads import AdapterUploads, UploadClaim, UploadLimits
from tests.server.lora.conftest import ADAPTER_BYTES, MakeAdapter, make_cache
from tests.server.lora.test_publish import CONFIG, WEIGHTS, declared

LIMITS = UploadLimits(1 << 30, idle_seconds=60, seconds=60)


async def send(cache: AdapterCache, name: str, folder: Path, **claim: Any) -> AdapterStatus:
    content = {file: (folder / file).read_bytes() for file in (CONFIG, WEIGHTS)}
    uploads = AdapterUploads(cache, LIMITS)
    async with uploads.receive(UploadClaim(name=name, **claim), declared(content)) as upload:
        for file, data in content.items():
            await upload.write(file, 0, data)
        return await upload.publish(pin=False)


def train_a_bias(folder: Path) -> None:
    """Makes an adapter one whose files are sound, but not for a base without biases."""
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps({**config, "bias": "lora_only"}))
    tensors = safetensors.torch.load_file(folder / WEIGHTS)
    tensors["base_model.model.model.layers.0.self_attn.q_proj.base_layer.bias"] = torch.ones(64)
    safetensors.torch.save_file(tensors, folder / WEIGHTS)


async def test_an_upload_that_only_the_base_refuses_is_not_published(
    tmp_path: Path, make_adapter: MakeAdapter, caplog: pytest.LogCaptureFixture
) -> None:
    store = tmp_path / "store"
    sound = make_adapter("sound", root=tmp_path)
    cache, _ = make_cache(store)
    good = await send(cache, "a", sound)
    train_a_bias(make_adapter("bad", root=tmp_path))
    with pytest.raises(IncompatibleAdapter, match="bias"):
        await send(cache, "a", tmp_path / "bad", replace=True)
    assert {path.name for path in (store / "a").iterdir()} == {"1"}
    assert cache.metrics.adapter_load_failures._value.get() == 1
    assert "adapter a refused" in caplog.text
    async with cache.acquire("a") as adapter:
        assert adapter is good.adapter


async def test_an_upload_needs_its_room_once(tmp_path: Path, make_adapter: MakeAdapter) -> None:
    cache, _ = make_cache(tmp_path / "store", max_bytes=ADAPTER_BYTES + 5000)
    folder = make_adapter("a")
    for version in "12":
        status = await send(cache, "a", folder, replace=True)
        assert status.adapter is not None
        assert status.ref.version == status.adapter.version == version
    assert cache.num_bytes == ADAPTER_BYTES


@pytest.mark.parametrize(
    ("claim", "error"),
    [
        ({"name": "a"}, AdapterExists),
        ({"name": "a@1", "replace": True}, AdapterExists),
        ({"name": "a", "expected_generation": 0}, AdapterExists),
        ({"name": "a", "expected_generation": 7}, AdapterChanged),
        ({"name": "../a"}, InvalidRequest),
        ({"name": "base"}, AdapterExists),
    ],
)
async def test_a_claim_that_cannot_be_granted_is_refused_before_the_first_byte(
    tmp_path: Path, make_adapter: MakeAdapter, claim: dict[str, Any], error: type[ServingError]
) -> None:
    store = tmp_path / "store"
    make_adapter("a", root=store)
    cache, _ = make_cache(store, reserved=frozenset({"base"}))
    with pytest.raises(error):
        async with AdapterUploads(cache, LIMITS).receive(UploadClaim(**claim), declared({CONFIG: b"", WEIGHTS: b""})):
            pytest.fail("it was taken")
    assert not (store / ".publish").exists()


async def test_a_claim_is_checked_again_when_all_is_here(tmp_path: Path, make_adapter: MakeAdapter) -> None:
    store = tmp_path / "store"
    folder = make_adapter("new", root=tmp_path)
    cache, _ = make_cache(store)
    content = {file: (folder / file).read_bytes() for file in (CONFIG, WEIGHTS)}
    async with AdapterUploads(cache, LIMITS).receive(UploadClaim(name="a"), declared(content)) as upload:
        for file, data in content.items():
            await upload.write(file, 0, data)
        await send(cache, "a", folder)
        with pytest.raises(AdapterExists):
            await upload.publish(pin=False)
    assert [path.name for path in (store / "a").iterdir()] == ["1"]


@pytest.mark.parametrize(
    ("idle_seconds", "seconds", "flag"), [(0.02, 60, "--upload-idle-seconds"), (0.2, 0.3, "--upload-seconds")]
)
async def test_messages_that_do_not_come_in_time(idle_seconds: float, seconds: float, flag: str) -> None:
    """A sender that stops, and one that sends for ever."""

    async def trickle() -> AsyncIterator[int]:
        for number in itertools.count():
            yield number
            await asyncio.sleep(0.05)

    messages = UploadLimits(1, idle_seconds, seconds).in_time(trickle())
    assert await anext(messages) == 0
    if flag == "--upload-seconds":
        assert await anext(messages) == 1
    with pytest.raises(UploadTooSlow, match=flag):
        [message async for message in messages]

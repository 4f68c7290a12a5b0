"""Adapters that come over the wire: published when they can be served, and not before."""

import json
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from server.errors import IncompatibleAdapter
from server.lora.cache import AdapterCache
from server.lora.events import AdapterStatus
from server.lora.uploads import AdapterUploads
from tests.server.lora.conftest import ADAPTER_BYTES, MakeAdapter, make_cache
from tests.server.lora.test_publish import CONFIG, WEIGHTS, declared


async def send(cache: AdapterCache, name: str, folder: Path, **publish: Any) -> AdapterStatus:
    content = {file: (folder / file).read_bytes() for file in (CONFIG, WEIGHTS)}
    async with AdapterUploads(cache, 1 << 30).receive(name, declared(content)) as upload:
        for file, data in content.items():
            await upload.write(file, 0, data)
        return await upload.publish(**{"replace": False, "expected_generation": None, "pin": False, **publish})


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

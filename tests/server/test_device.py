"""What follows from the device and its settings."""

import importlib.machinery
from pathlib import Path
from typing import Any

import pytest
import torch

from server.config import EngineConfig
from server.device import Device, pick_device
from server.engine.build import build_engine
from server.engine.cpu_kv_cache import CpuKVCache
from server.engine.cuda_kv_cache import CudaKVCache
from server.engine.kv_cache import KVShape, TorchKVCache
from server.errors import ConfigError
from server.kernels import native, onednn
from server.kernels.torch_ops import torch_kernels

needs_native = pytest.mark.skipif(not native.available(), reason="the native kernels are not built")


@needs_native
@pytest.mark.parametrize(
    ("settings", "storage"),
    [({}, "float32"), ({"dtype": "bfloat16"}, "bfloat16"), ({"quantization": "int8"}, "int8")],
)
def test_native_kernels_compute_in_float32_whatever_they_store(settings: dict[str, Any], storage: str) -> None:
    device = pick_device(EngineConfig(device="cpu", **settings))
    assert (device.native, device.dtype, device.storage) == (True, torch.float32, storage)


@needs_native
def test_plain_c_serves_processors_without_wide_vectors() -> None:
    chosen = native.isa()
    native.set_isa("generic")
    try:
        device = pick_device(EngineConfig(device="cpu"))
    finally:
        native.set_isa(chosen)
    assert (device.native, device.kernels.name) == (True, "native generic")


@needs_native
@pytest.mark.parametrize(
    ("settings", "lora_dtype"),
    [
        ({}, None),
        ({"quantization": "int8"}, None),
        ({"lora_dtype": "bfloat16"}, torch.bfloat16),
        ({"dtype": "bfloat16"}, torch.bfloat16),
        ({"dtype": "bfloat16", "lora_dtype": "float32"}, torch.float32),
        ({"dtype": "bfloat16", "quantization": "int8"}, torch.bfloat16),
        ({"dtype": "float16", "kernels": "torch"}, torch.float16),
    ],
)
def test_adapters_are_as_wide_as_the_weights_or_as_asked(
    settings: dict[str, Any], lora_dtype: torch.dtype | None
) -> None:
    assert pick_device(EngineConfig(device="cpu", **settings)).lora_dtype is lora_dtype


def test_torch_serves_what_the_native_kernels_do_not() -> None:
    device = pick_device(EngineConfig(device="cpu", kernels="torch", dtype="bfloat16"))
    assert (device.native, device.dtype, device.storage) == (False, torch.bfloat16, "bfloat16")
    assert not pick_device(EngineConfig(device="cpu", dtype="float16")).native


@pytest.mark.skipif(not onednn.available(torch.float32), reason="torch was built without oneDNN")
def test_onednn_packs_the_weights_where_the_native_kernels_are_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "available", lambda: False)
    assert pick_device(EngineConfig(device="cpu")).kernels.name == "oneDNN"
    assert pick_device(EngineConfig(device="cpu", dtype="float16")).kernels.name == "torch"
    assert pick_device(EngineConfig(device="cpu", kernels="torch")).kernels.name == "torch"


@pytest.mark.parametrize("broken", [True, False], ids=["broken", "not built"])
def test_missing_native_kernels_are_told_once_with_the_reason(
    broken: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    if broken:
        (tmp_path / f"_native{importlib.machinery.EXTENSION_SUFFIXES[0]}").write_bytes(b"no library")
    monkeypatch.setattr(native, "__file__", str(tmp_path / "native.py"))
    library, missing_because = native._load()
    monkeypatch.setattr(native, "library", library)
    monkeypatch.setattr(native, "missing_because", missing_because)
    pick_device(EngineConfig(device="cpu"))
    (message,) = caplog.messages
    assert message == f"the native CPU kernels {missing_because}: torch does their work, slower"
    assert ("build them anew" in message) == broken
    pick_device(EngineConfig(device="cpu", kernels="torch"))
    pick_device(EngineConfig(device="cpu", dtype="float16"))
    assert len(caplog.messages) == 1


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"quantization": "int8", "kernels": "torch"}, "needs the native kernels"),
        ({"quantization": "int8", "dtype": "float16"}, "needs the native kernels"),
        ({"lora_dtype": "bfloat16", "kernels": "torch"}, "--lora-dtype bfloat16 needs the native CPU kernels"),
        pytest.param(
            {"device": "cuda"},
            "no CUDA device",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has CUDA"),
        ),
    ],
)
def test_what_cannot_be_had_is_said(settings: dict[str, Any], reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        pick_device(EngineConfig(**{"device": "cpu", **settings}))


@needs_native
def test_the_cache_is_native_where_the_kernel_fits() -> None:
    device = pick_device(EngineConfig(device="cpu"))
    assert isinstance(device.paged_cache(KVShape(1, 2, 64), 4, 16), CpuKVCache)
    assert isinstance(device.paged_cache(KVShape(1, 2, 64), 4, 8), TorchKVCache)
    assert isinstance(device.paged_cache(KVShape(1, 2, 20), 4, 16), TorchKVCache)


@needs_native
@pytest.mark.parametrize(
    ("settings", "native_dtype"),
    [
        ({}, torch.float32),
        ({"dtype": "bfloat16"}, torch.bfloat16),
        ({"dtype": "bfloat16", "kv_cache_dtype": "float32"}, torch.float32),
        ({"quantization": "int8", "kv_cache_dtype": "bfloat16"}, torch.bfloat16),
    ],
)
def test_the_native_cache_may_be_narrower_than_what_it_computes_in(
    settings: dict[str, Any], native_dtype: torch.dtype
) -> None:
    device = pick_device(EngineConfig(device="cpu", **settings))
    cache = device.paged_cache(KVShape(1, 2, 64), 4, 16)
    assert isinstance(cache, CpuKVCache)
    assert cache.layer(0).keys.dtype is device.kv_dtype(KVShape(1, 2, 64), 16) is native_dtype
    assert device.kv_dtype(KVShape(1, 2, 64), 8) is torch.float32


@pytest.mark.parametrize("settings", [{"kernels": "torch"}, {"block_size": 8}])
def test_a_cache_of_another_format_than_the_model_needs_the_native_kernels(
    settings: dict[str, Any], model_dir: Path
) -> None:
    config = EngineConfig(model=str(model_dir), device="cpu", kv_cache_dtype="bfloat16", **settings)
    with pytest.raises(ConfigError, match="--kv-cache-dtype bfloat16: the cache is float32 here"):
        build_engine(config)


def test_pages_suit_the_flash_attention_where_it_serves_the_model() -> None:
    served, other = KVShape(1, 2, 64), KVShape(1, 2, 64, plain_attention=False)

    def device(flash: bool = False, graphs: bool = False) -> Device:
        cpu = torch.device("cpu")
        return Device(cpu, torch.bfloat16, "bfloat16", torch_kernels(), native=False, flash=flash, graphs=graphs)

    flash = device(flash=True, graphs=True)
    assert (flash.block_size(served), flash.block_size(other), device().block_size(served)) == (256, 16, 16)
    assert isinstance(flash.paged_cache(served, 4, 256), CudaKVCache)
    assert isinstance(flash.paged_cache(served, 4, 16), TorchKVCache)
    assert isinstance(flash.paged_cache(other, 4, 256), TorchKVCache)
    assert flash.fixed_shapes(served, 512)
    assert not flash.fixed_shapes(served, 16)
    assert not flash.fixed_shapes(other, 256)
    assert not device(flash=True).fixed_shapes(served, 256)
    assert not device(graphs=True).fixed_shapes(served, 256)


@needs_native
def test_packed_weights_take_the_place_of_the_originals(model_dir: Path) -> None:
    """What is left of the model's own parameters are norms and an embedding that no head shares."""
    model = build_engine(EngineConfig(model=str(model_dir), device="cpu")).base.model
    names = [name.removesuffix("._base.weight") for name, _ in model.named_parameters()]
    left = {name.removesuffix(".weight").rpartition(".")[2] for name in names}
    assert left == {"embed_tokens", "input_layernorm", "post_attention_layernorm", "norm"}

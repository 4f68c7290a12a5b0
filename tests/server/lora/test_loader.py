"""What is read from a folder, and what is refused before it costs anything."""

import errno
import hashlib
import json
import logging
import os
import shutil
import struct
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from adapters.folder import write_adapter
from adapters.format import read_adapter
from server.errors import AdapterNotFound, IncompatibleAdapter, InvalidAdapter, Overloaded, ServingError, Unavailable
from server.lora.digests import write_sums
from tests.server.lora.conftest import LAYERS, MakeAdapter, fail_disk, make_cache


async def test_a_header_of_three_hundred_thousand_tensors_is_refused_at_once(
    tmp_path: Path, make_adapter: MakeAdapter
) -> None:
    entry = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
    header = json.dumps({f"x{index}": entry for index in range(300_000)}).encode()
    (make_adapter("a") / "adapter_model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header)
    cache, _ = make_cache(tmp_path)
    started = time.process_time()
    with pytest.raises(InvalidAdapter):
        await cache.load("a")
    assert time.process_time() - started < 0.1


async def test_ten_gigabytes_are_not_read(tmp_path: Path, make_adapter: MakeAdapter) -> None:
    os.truncate(make_adapter("a") / "adapter_model.safetensors", 10 << 30)  # sparse: it takes no room
    cache, _ = make_cache(tmp_path)
    with pytest.raises(InvalidAdapter, match="at most"):
        await cache.load("a")


async def test_other_files_are_named_and_never_opened(
    tmp_path: Path, make_adapter: MakeAdapter, caplog: pytest.LogCaptureFixture
) -> None:
    folder = make_adapter("a")
    for name in ("tokenizer.json", "modeling.py", "chat_template.jinja", "new\nline"):
        os.mkfifo(folder / name)  # to open one for reading would wait for ever
    cache, _ = make_cache(tmp_path)
    with caplog.at_level(logging.INFO):
        await cache.load("a")
    (line,) = [record.getMessage() for record in caplog.records if "never opened" in record.message]
    assert "'tokenizer.json'" in line
    assert "\n" not in line


async def test_weights_that_are_a_pipe(tmp_path: Path, make_adapter: MakeAdapter) -> None:
    weights = make_adapter("a") / "adapter_model.safetensors"
    weights.unlink()
    os.mkfifo(weights)
    cache, _ = make_cache(tmp_path)
    with pytest.raises(InvalidAdapter, match="not a plain file"):
        await cache.load("a")


async def test_another_base_model_is_named(tmp_path: Path, make_adapter: MakeAdapter) -> None:
    """And so is ours: by which layers it has not, or by their shapes."""
    files = read_adapter(make_adapter("a"), LAYERS, max_rank=8)
    config = replace(files.config, base_model="someone/sibling", base_revision="v2")
    narrow = {module: replace(lora, lora_a=lora.lora_a[:, :32]) for module, lora in files.weights.items()}
    write_adapter(tmp_path / "layers", replace(config, target_modules=("o_proj",)), files.weights)
    write_adapter(tmp_path / "shapes", config, narrow)
    cache, _ = make_cache(tmp_path)
    for name, why in (("layers", "target_modules .* match no linear layer"), ("shapes", "adapter_model.* has shape")):
        match = f"trained on someone/sibling at revision v2, served is tiny: {why}"
        with pytest.raises(IncompatibleAdapter, match=match):
            await cache.load(name)


async def test_a_recorded_base_must_be_ours(tmp_path: Path, make_adapter: MakeAdapter) -> None:
    for name, fingerprint in (("ours", "0123" * 16), ("other", "4567" * 16)):
        files = read_adapter(make_adapter(name), LAYERS, max_rank=8)
        shutil.rmtree(tmp_path / name)
        config = replace(files.config, base_model="sibling")
        write_adapter(tmp_path / name, config, files.weights, fingerprint)
    cache, _ = make_cache(tmp_path)
    await cache.load("ours")
    with pytest.raises(IncompatibleAdapter, match="sibling with fingerprint '456745674567'; served is tiny") as caught:
        await cache.load("other")
    assert caught.value.reason == "WRONG_BASE"


@pytest.mark.parametrize(
    ("base_model", "other"),
    [
        ("tiny", ""),
        ("someone/Tiny", ""),
        ("/models/tiny/", ""),
        (r"C:\models\tiny", ""),
        ("/cache/models--someone--tiny/snapshots/0123abcd", ""),
        ("", ""),
        ("someone/tiny-chat", "someone/tiny-chat at revision v2"),
        ("/cache/models--someone--small/snapshots/tiny", "/cache/models--someone--small/snapshots/tiny at revision v2"),
    ],
)
async def test_a_base_of_another_name_is_told(
    tmp_path: Path, make_adapter: MakeAdapter, caplog: pytest.LogCaptureFixture, base_model: str, other: str
) -> None:
    """And is no reason to refuse; with our fingerprint the name counts for nothing."""
    files = read_adapter(make_adapter("a"), LAYERS, max_rank=8)
    config = replace(files.config, base_model=base_model, base_revision="v2")
    for name, fingerprint in (("a", ""), ("proven", "0123" * 16)):
        write_adapter(tmp_path / name, config, files.weights, fingerprint)
    cache, _ = make_cache(tmp_path)
    assert (await cache.load("a")).other_base == other
    told = [record.getMessage() for record in caplog.records if "trained on" in record.message]
    assert told == ([f"adapter a: trained on {other}, served is tiny"] if other else [])
    assert (await cache.load("proven")).other_base == ""


async def test_a_folder_without_an_adapter_is_no_source(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    cache, _ = make_cache(tmp_path)
    with pytest.raises(InvalidAdapter, match=r"adapter_config\.json"):
        await cache.load("a", "empty")
    with pytest.raises(AdapterNotFound):
        await cache.load("empty")


@pytest.mark.parametrize("file", ["adapter_config.json", "adapter_model.safetensors", "SHA256SUMS"])
@pytest.mark.parametrize(
    ("code", "error"),
    [(errno.EIO, Unavailable), (errno.ESTALE, Unavailable), (errno.EACCES, Unavailable), (errno.EMFILE, Overloaded)],
)
async def test_a_disk_that_fails_says_nothing_of_the_adapter(
    tmp_path: Path,
    make_adapter: MakeAdapter,
    monkeypatch: pytest.MonkeyPatch,
    file: str,
    code: int,
    error: type[ServingError],
) -> None:
    folder = make_adapter("a")
    write_sums(folder, {name: hashlib.sha256((folder / name).read_bytes()).hexdigest()
                        for name in ("adapter_config.json", "adapter_model.safetensors")})  # fmt: skip
    cache, _ = make_cache(tmp_path)
    with monkeypatch.context() as failing:
        fail_disk(failing, folder / file, code)
        with pytest.raises(error, match=f"adapter 'a' cannot be read now: {os.strerror(code)}"):
            await cache.load("a")
    assert cache.statuses()[0].error == ""
    await cache.load("a")


@pytest.mark.parametrize("step", ["safetensors.torch.load", "server.lora.adapter.CheckedAdapter.from_files"])
async def test_memory_that_the_system_does_not_have(
    tmp_path: Path, make_adapter: MakeAdapter, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    make_adapter("a")
    cache, _ = make_cache(tmp_path)
    with monkeypatch.context() as short:
        short.setattr(step, lambda *args: torch.empty(1 << 60))
        with pytest.raises(Overloaded, match="no memory for adapter 'a'"):
            await cache.load("a")
    assert cache.statuses()[0].error == ""
    assert cache.num_bytes == 0
    await cache.load("a")

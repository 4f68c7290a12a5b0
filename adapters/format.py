"""PEFT's adapter files, read strictly and written atomically.

An adapter is untrusted input. Only `adapter_config.json` and `adapter_model.safetensors` are ever opened: no pickle, no
code, no tokenizer, no template. Every size is capped before it is used, every key of the configuration is either
understood or refused by name, and every tensor must be one that the configuration and the base model call for.
"""

import hashlib
import json
import math
import os
import shutil
import struct
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from adapters.base_fingerprint import METADATA_KEY
from adapters.config import (
    CONFIG_FILE,
    WEIGHTS_FILE,
    AdapterConfig,
    AdapterFormatError,
    AdapterIncompatibleError,
    parse_config,
    parse_json,
    to_peft,
)

MAX_CONFIG_BYTES = 1 << 20
MAX_HEADER_BYTES = 4 << 20
DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}

_PREFIX = "base_model.model."
_SUFFIXES = {".lora_A.weight": "lora_a", ".lora_B.weight": "lora_b"}


@dataclass(frozen=True, slots=True)
class LinearShape:
    """Sizes of a linear layer of the base model."""

    in_features: int
    out_features: int


@dataclass(frozen=True, slots=True)
class LoRAWeights:
    """One layer's part of an adapter: `y += scaling · lora_b · lora_a · x`."""

    lora_a: Tensor  # [rank, in_features]
    lora_b: Tensor  # [out_features, rank]
    scaling: float


@dataclass(frozen=True, slots=True)
class AdapterFiles:
    """A checked adapter: what it is, its weights by module path, and the digests of its content."""

    config: AdapterConfig
    weights: Mapping[str, LoRAWeights]
    file_digests: Mapping[str, str]  # sha256 of each file by its name, hex
    base_fingerprint: str  # of the model that it was trained on; empty: not recorded
    num_bytes: int  # of both files

    @property
    def digest(self) -> str:
        """One for both files, hex."""
        return hashlib.sha256("".join(self.file_digests.values()).encode()).hexdigest()


def read_adapter(folder: Path, layers: Mapping[str, LinearShape], max_rank: int) -> AdapterFiles:
    """Reads and checks an adapter for a base model that has `layers`.

    Raises:
        AdapterFormatError: the files are missing, malformed, of wrong shapes or not finite.
        AdapterIncompatibleError: another base, a rank over `max_rank`, or a feature that is not served.
    """
    config_bytes = _read_file(folder / CONFIG_FILE, MAX_CONFIG_BYTES)
    config = parse_config(config_bytes)
    expected = _expected_tensors(config, layers, max_rank)
    largest = sum(4 * rows * columns for rows, columns in expected.values())
    weights_bytes = _read_file(folder / WEIGHTS_FILE, 8 + MAX_HEADER_BYTES + largest)
    metadata = _check_header(weights_bytes, expected, layers)
    try:
        tensors = safetensors.torch.load(weights_bytes)
    except Exception as error:  # the library's errors have no common base but Exception
        raise AdapterFormatError(f"{WEIGHTS_FILE}: {error}", "MALFORMED_WEIGHTS") from error
    for name, tensor in tensors.items():
        low, high = torch.aminmax(tensor)  # one pass, and what is not finite shows in it
        if not (math.isfinite(low) and math.isfinite(high)):
            raise AdapterFormatError(f"{WEIGHTS_FILE}: {name} has values that are not finite", "NON_FINITE_WEIGHTS")
    files = {CONFIG_FILE: config_bytes, WEIGHTS_FILE: weights_bytes}
    modules = sorted({_split_name(name)[0] for name in tensors})
    weights = {
        module: LoRAWeights(
            tensors[f"{_PREFIX}{module}.lora_A.weight"],
            tensors[f"{_PREFIX}{module}.lora_B.weight"],
            config.scaling_of(module),
        )
        for module in modules
    }
    return AdapterFiles(
        config,
        weights,
        {name: hashlib.sha256(data).hexdigest() for name, data in files.items()},
        str(metadata.get(METADATA_KEY, "")),
        len(config_bytes) + len(weights_bytes),
    )


def check_config(folder: Path, layers: Mapping[str, LinearShape], max_rank: int) -> None:
    """Checks the configuration alone: a cheap first look at many adapters.

    Raises:
        AdapterFormatError, AdapterIncompatibleError: those of `read_adapter` that need no weights.
    """
    _expected_tensors(parse_config(_read_file(folder / CONFIG_FILE, MAX_CONFIG_BYTES)), layers, max_rank)


def write_adapter(
    folder: Path, config: AdapterConfig, weights: Mapping[str, LoRAWeights], base_fingerprint: str = ""
) -> None:
    """Writes an adapter as PEFT would, whole or not at all: temporary folder, fsync, rename.

    An adapter that is already in `folder` is replaced; any other folder is left alone.

    Raises:
        FileExistsError: `folder` exists and holds something that is not an adapter.
    """
    check_writable(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    tensors = {}
    for module, layer in weights.items():
        tensors[f"{_PREFIX}{module}.lora_A.weight"] = layer.lora_a.detach().cpu().contiguous()
        tensors[f"{_PREFIX}{module}.lora_B.weight"] = layer.lora_b.detach().cpu().contiguous()
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as scratch:
        fresh = Path(scratch) / "new"
        fresh.mkdir()
        (fresh / CONFIG_FILE).write_text(json.dumps(to_peft(config), indent=2) + "\n")
        metadata = {"format": "pt"} | ({METADATA_KEY: base_fingerprint} if base_fingerprint else {})
        safetensors.torch.save_file(tensors, fresh / WEIGHTS_FILE, metadata=metadata)
        (fresh / WEIGHTS_FILE).chmod((fresh / CONFIG_FILE).stat().st_mode)  # the library makes it private to its owner
        for path in (fresh / CONFIG_FILE, fresh / WEIGHTS_FILE, fresh):
            _fsync(path)
        if folder.exists():
            folder.rename(Path(scratch) / "old")
        fresh.rename(folder)
        _fsync(folder.parent)
        shutil.rmtree(Path(scratch) / "old", ignore_errors=True)


def check_writable(folder: Path) -> None:
    """Raises FileExistsError if `folder` holds something that is not an adapter, which `write_adapter` would refuse."""
    if folder.exists() and any(folder.iterdir()) and not (folder / CONFIG_FILE).is_file():
        raise FileExistsError(f"{folder} holds something that is not an adapter: choose another folder")


def _expected_tensors(
    config: AdapterConfig, layers: Mapping[str, LinearShape], max_rank: int
) -> dict[str, tuple[int, int]]:
    """Name and shape of every tensor that the adapter must have on this base, no more and no fewer."""
    expected: dict[str, tuple[int, int]] = {}
    for module, shape in layers.items():
        if not config.targets(module):
            continue
        rank = config.rank_of(module)
        if rank > max_rank:
            raise AdapterIncompatibleError(
                f"rank {rank} of {module} is over the limit of {max_rank}: start with --max-lora-rank {rank}",
                "RANK_TOO_LARGE",
            )
        expected[f"{_PREFIX}{module}.lora_A.weight"] = (rank, shape.in_features)
        expected[f"{_PREFIX}{module}.lora_B.weight"] = (shape.out_features, rank)
    if not expected:
        raise AdapterIncompatibleError(
            f"target_modules {sorted(config.target_modules)} match no linear layer of the base model, "
            f"whose layers end in {sorted({module.rpartition('.')[2] for module in layers})}",
            "NO_MATCHING_MODULE",
        )
    return expected


def _check_header(
    data: bytes, expected: Mapping[str, tuple[int, int]], layers: Mapping[str, LinearShape]
) -> dict[str, Any]:
    """Holds the safetensors header against the expected tensors, before the library parses it; returns its metadata."""
    if len(data) < 8:
        raise AdapterFormatError(f"{WEIGHTS_FILE}: truncated: {len(data)} bytes", "MALFORMED_WEIGHTS")
    (length,) = struct.unpack("<Q", data[:8])
    if length > min(MAX_HEADER_BYTES, len(data) - 8):
        raise AdapterFormatError(f"{WEIGHTS_FILE}: header of {length} bytes does not fit", "MALFORMED_WEIGHTS")
    header = parse_json(data[8 : 8 + length], WEIGHTS_FILE)
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict):
        raise AdapterFormatError(f"{WEIGHTS_FILE}: __metadata__ is not an object", "MALFORMED_WEIGHTS")
    for name in header:
        module, part = _split_name(name)
        if part is None or (name not in expected and module in layers):
            raise AdapterFormatError(f"{WEIGHTS_FILE}: unexpected tensor {name}", "UNEXPECTED_TENSOR")
        if module not in layers:
            raise AdapterIncompatibleError(
                f"{WEIGHTS_FILE}: {name} belongs to a layer that the base model does not have", "NO_MATCHING_MODULE"
            )
    if missing := [name for name in expected if name not in header]:
        raise AdapterFormatError(
            f"{WEIGHTS_FILE}: {len(missing)} of {len(expected)} tensors are missing, the first is {missing[0]}",
            "MISSING_TENSOR",
        )
    dtypes = set()
    for name, entry in header.items():
        dtype = entry.get("dtype") if isinstance(entry, dict) else entry
        if not isinstance(dtype, str) or dtype not in DTYPES:
            raise AdapterFormatError(f"{WEIGHTS_FILE}: {name} has dtype {dtype}; one of {', '.join(DTYPES)} is needed")
        if entry.get("shape") != list(expected[name]):
            raise AdapterIncompatibleError(
                f"{WEIGHTS_FILE}: {name} has shape {entry.get('shape')}; the configuration and the base model need "
                f"{list(expected[name])}",
                "WRONG_SHAPE",
            )
        dtypes.add(dtype)
    if len(dtypes) > 1:
        raise AdapterFormatError(f"{WEIGHTS_FILE}: tensors of different dtypes: {', '.join(sorted(dtypes))}")
    return metadata


def _split_name(name: str) -> tuple[str, str | None]:
    for suffix, part in _SUFFIXES.items():
        if name.startswith(_PREFIX) and name.endswith(suffix):
            return name[len(_PREFIX) : -len(suffix)], part
    return name, None


def _read_file(path: Path, max_bytes: int) -> bytes:
    """Reads a plain file of at most `max_bytes`; a link, device or pipe is refused unopened."""
    try:
        if path.is_symlink() or not path.is_file():
            if path.name == WEIGHTS_FILE and path.with_name("adapter_model.bin").exists():
                raise AdapterFormatError(
                    "the weights are a pickle (adapter_model.bin), which is never opened: save as safetensors",
                    "PICKLE_WEIGHTS",
                )
            raise AdapterFormatError(f"{path.name} is missing or is not a plain file", "MISSING_FILE")
        if path.stat().st_size > max_bytes:
            raise AdapterFormatError(
                f"{path.name} has {path.stat().st_size:,} bytes; at most {max_bytes:,} make sense here",
                "FILE_TOO_LARGE",
            )
        return path.read_bytes()
    except OSError as error:
        raise AdapterFormatError(f"{path.name} cannot be read: {error.strerror}", "MISSING_FILE") from error


def _fsync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)

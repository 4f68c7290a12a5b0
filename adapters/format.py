"""PEFT's adapter files, read strictly.

An adapter is untrusted input. Only `adapter_config.json` and `adapter_model.safetensors` are ever opened: no pickle, no
code, no tokenizer, no template. Every size is capped before it is used, every key of the configuration is either
understood or refused by name, and every tensor must be one that the configuration and the base model call for.
"""

import contextlib
import hashlib
import io
import math
import os
import stat
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor

from adapters.base_fingerprint import METADATA_KEY
from adapters.config import CONFIG_FILE, WEIGHTS_FILE, AdapterConfig, parse_config
from adapters.errors import AdapterFormatError, WrongBaseError, is_of_the_file, memory_errors
from adapters.tensors import LinearShape, Part, known_tensors, largest_file, read_header

MAX_CONFIG_BYTES = 1 << 20
_START_BYTES = 4 << 20  # that are read of a file which is too large


@dataclass(frozen=True, slots=True)
class LoRAWeights:
    """One layer's part of an adapter: `y += scaling · (lora_b · lora_a · x + lora_bias)`; PEFT's orientation."""

    lora_a: Tensor  # [rank, in_features]
    lora_b: Tensor  # [out_features, rank]
    scaling: float
    lora_bias: Tensor | None = None  # [out_features]
    magnitude: Tensor | None = None  # [out_features]: DoRA's norms of the rows of the adapted weight


@dataclass(frozen=True, slots=True)
class AdapterFiles:
    """A checked adapter: what it is, its weights by module path, and the digests of its content."""

    config: AdapterConfig
    weights: Mapping[str, LoRAWeights]
    file_digests: Mapping[str, str]  # sha256 of each file by its name, hex
    base_fingerprint: str  # of the model that it was trained on; empty: not recorded
    num_bytes: int  # of both files
    # The base's own weights and biases as they were when the adapter was saved, by module path: PEFT saves them with
    # an adapted embedding or head, after the vocabulary was resized, and where it trained them.
    base_weights: Mapping[str, Tensor] = field(default_factory=dict)
    base_biases: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def digest(self) -> str:
        """See `digest_of`."""
        return digest_of(self.file_digests)


def digest_of(file_digests: Mapping[str, str]) -> str:
    """One digest for both files, hex, from each file's own by its name."""
    return hashlib.sha256("".join(file_digests[name] for name in sorted(file_digests)).encode()).hexdigest()


def read_adapter(
    folder: Path, layers: Mapping[str, LinearShape], max_rank: int, base_model: str = "the base model"
) -> AdapterFiles:
    """Reads and checks an adapter for a base model that has `layers`, and a name for messages.

    Raises:
        AdapterFormatError: the files are missing, malformed, of wrong shapes or not finite.
        AdapterIncompatibleError: a rank over `max_rank`, or a feature that is not served.
        WrongBaseError: the layers or shapes are another base's.
        MemoryError, OSError: the system has no memory, or the disk fails; neither says anything of the adapter.
    """
    config_bytes = _read_file(folder / CONFIG_FILE, MAX_CONFIG_BYTES)
    config = parse_config(config_bytes)
    with _naming_bases(config, base_model):
        known = known_tensors(config, layers, max_rank)
        try:
            weights_bytes = _read_file(folder / WEIGHTS_FILE, largest_file(known))
        except _FileTooLargeError as error:
            read_header(error.start, known, layers)  # an adapter of a larger base is refused as that
            raise
        present, metadata = read_header(weights_bytes, known, layers)
    try:
        with memory_errors():
            tensors = safetensors.torch.load(weights_bytes)
    except MemoryError:
        raise
    except Exception as error:  # the library's errors have no common base but Exception
        raise AdapterFormatError(f"{WEIGHTS_FILE}: {error}", "MALFORMED_WEIGHTS") from error
    parts: dict[str, dict[Part, Tensor]] = {}
    for name, spec in present.items():
        low, high = torch.aminmax(tensors[name])  # one pass, and what is not finite shows in it
        if not (math.isfinite(low) and math.isfinite(high)):
            raise AdapterFormatError(f"{WEIGHTS_FILE}: {name} has values that are not finite", "NON_FINITE_WEIGHTS")
        parts.setdefault(spec.module, {})[spec.part] = tensors[name]
    files = {CONFIG_FILE: config_bytes, WEIGHTS_FILE: weights_bytes}
    weights = {
        module: LoRAWeights(
            of["lora_a"], of["lora_b"], config.scaling_of(module), of.get("lora_bias"), of.get("magnitude")
        )
        for module, of in sorted(parts.items())
        if "lora_a" in of
    }
    return AdapterFiles(
        config,
        weights,
        {name: hashlib.sha256(data).hexdigest() for name, data in files.items()},
        str(metadata.get(METADATA_KEY, "")),
        len(config_bytes) + len(weights_bytes),
        {module: of["weight"] for module, of in parts.items() if "weight" in of},
        {module: of["bias"] for module, of in parts.items() if "bias" in of},
    )


def check_config(
    folder: Path, layers: Mapping[str, LinearShape], max_rank: int, base_model: str = "the base model"
) -> None:
    """Checks the configuration alone: a cheap first look at many adapters.

    Raises:
        AdapterFormatError, AdapterIncompatibleError, WrongBaseError: those of `read_adapter` that need no weights.
        OSError: the disk fails.
    """
    config = parse_config(_read_file(folder / CONFIG_FILE, MAX_CONFIG_BYTES))
    with _naming_bases(config, base_model):
        known_tensors(config, layers, max_rank)


def open_plain(path: str | Path) -> io.BufferedReader:
    """Opens a file for reading that strangers may have put there: links are not followed, pipes not waited for."""
    return open(path, "rb", opener=lambda path, flags: os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK))


class _FileTooLargeError(AdapterFormatError):
    """A file is larger than anything that makes sense; `start` is how it begins."""

    def __init__(self, message: str, start: bytes) -> None:
        super().__init__(message, "FILE_TOO_LARGE")
        self.start = start


@contextlib.contextmanager
def _naming_bases(config: AdapterConfig, base_model: str) -> Iterator[None]:
    """Within, a refusal that blames the base names both: the adapter's and ours."""
    try:
        yield
    except WrongBaseError as error:
        message = f"it was trained on {config.trained_on}, served is {base_model}: {error}"
        raise WrongBaseError(message, error.reason) from error


def _read_file(path: Path, max_bytes: int) -> bytes:
    """Reads a plain file of at most `max_bytes`, even if it becomes something else meanwhile.

    A link is not followed, a device or pipe neither read nor waited for.
    """
    try:
        if path.is_symlink() or not path.is_file():
            if path.name == WEIGHTS_FILE and path.with_name("adapter_model.bin").exists():
                raise AdapterFormatError(
                    "the weights are a pickle (adapter_model.bin), which is never opened: save as safetensors",
                    "PICKLE_WEIGHTS",
                )
            raise _not_plain(path)
        with open_plain(path) as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise _not_plain(path)
            # No more than there is, and a byte that shows growth: room for more costs as long as the reading.
            data = file.read(status.st_size + 1 if status.st_size <= max_bytes else _START_BYTES)
            if status.st_size > max_bytes or len(data) > max_bytes:
                raise _FileTooLargeError(
                    f"{path.name} has {max(status.st_size, len(data)):,} bytes; at most {max_bytes:,} make sense here",
                    data,
                )
            return data
    except OSError as error:
        if not is_of_the_file(error):
            raise
        raise AdapterFormatError(f"{path.name} cannot be read: {error.strerror}", "MISSING_FILE") from error


def _not_plain(path: Path) -> AdapterFormatError:
    return AdapterFormatError(f"{path.name} is missing or is not a plain file", "MISSING_FILE")

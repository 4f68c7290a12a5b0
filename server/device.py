"""Everything that depends on the device is chosen here: which one, its number format, its memory, its kernels."""

from dataclasses import dataclass

import torch

from server.errors import ConfigError
from server.kernels import Kernels, torch_kernels

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

_CPU_KV_BYTES = 2 << 30
_CUDA_KV_SHARE = 0.8  # of the memory that the weights leave free


@dataclass(frozen=True, slots=True)
class Device:
    """A device and the choices that follow from it."""

    torch_device: torch.device
    dtype: torch.dtype
    kernels: Kernels

    def kv_cache_bytes(self) -> int:
        """A sensible size of the KV cache, asked after the weights are in place."""
        if self.torch_device.type == "cuda":
            free, _ = torch.cuda.mem_get_info(self.torch_device)
            return int(free * _CUDA_KV_SHARE)
        return _CPU_KV_BYTES


def pick_device(device: str, dtype: str) -> Device:
    """Device and number format from their settings; `auto` takes CUDA when there is one, and what runs best on it.

    Raises:
        ConfigError: CUDA is asked for and missing.
    """
    has_cuda = torch.cuda.is_available()
    if device == "cuda" and not has_cuda:
        raise ConfigError("--device cuda: torch finds no CUDA device here; use --device cpu or auto")
    kind = ("cuda" if has_cuda else "cpu") if device == "auto" else device
    default = torch.bfloat16 if kind == "cuda" else torch.float32
    return Device(torch.device(kind), default if dtype == "auto" else DTYPES[dtype], torch_kernels())

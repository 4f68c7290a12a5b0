"""Everything that depends on the device is chosen here: which one, its number format, its memory, its kernels."""

import logging
from dataclasses import dataclass

import torch

from server.engine.attention import PagedCache
from server.engine.cpu_kv_cache import CpuKVCache
from server.engine.kv_cache import KVShape, TorchKVCache
from server.errors import ConfigError
from server.kernels import Kernels, Storage, native
from server.kernels.cpu import cpu_kernels
from server.kernels.torch_ops import torch_kernels

log = logging.getLogger(__name__)

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

_CPU_KV_BYTES = 2 << 30
_CUDA_KV_SHARE = 0.8  # of the memory that the weights leave free


@dataclass(frozen=True, slots=True)
class Device:
    """A device and the choices that follow from it."""

    torch_device: torch.device
    dtype: torch.dtype  # of activations, and of weights that no kernel stores in its own way
    storage: str  # of the packed weights: the dtype, or what the weights are quantized to
    kernels: Kernels
    native: bool  # whether the native CPU kernels do the work

    def kv_cache_bytes(self) -> int:
        """A sensible size of the KV cache, asked after the weights are in place."""
        if self.torch_device.type == "cuda":
            free, _ = torch.cuda.mem_get_info(self.torch_device)
            return int(free * _CUDA_KV_SHARE)
        return _CPU_KV_BYTES

    def paged_cache(self, shape: KVShape, num_blocks: int, block_size: int) -> PagedCache:
        if self.native and block_size == CpuKVCache.block_size and native.serves_head_dim(shape.head_dim):
            return CpuKVCache(shape, num_blocks)
        return TorchKVCache(shape, num_blocks, block_size, self.dtype, self.torch_device)


def pick_device(device: str, dtype: str, quantization: str, kernels: str) -> Device:
    """Device, number format and kernels from their settings; `auto` takes CUDA when there is one.

    On the CPU the native kernels compute in float32 whatever the weights are stored in; without them torch does the
    work in the dtype that is asked for.

    Raises:
        ConfigError: what is asked for cannot be had here.
    """
    has_cuda = torch.cuda.is_available()
    if device == "cuda" and not has_cuda:
        raise ConfigError("--device cuda: torch finds no CUDA device here; use --device cpu or auto")
    if device == "cuda" or (device == "auto" and has_cuda):
        if quantization != "none":
            raise ConfigError(f"--quantization {quantization} is for the CPU; this server runs on CUDA")
        chosen = torch.bfloat16 if dtype == "auto" else DTYPES[dtype]
        return Device(torch.device("cuda"), chosen, _name(chosen), torch_kernels(), native=False)
    chosen = torch.float32 if dtype == "auto" else DTYPES[dtype]
    cpu = torch.device("cpu")
    if kernels == "auto" and native.available() and chosen != torch.float16:
        storage: Storage = "int8" if quantization == "int8" else "float32" if chosen == torch.float32 else "bfloat16"
        return Device(cpu, torch.float32, storage, cpu_kernels(storage), native=True)
    if quantization != "none":
        raise ConfigError(
            f"--quantization {quantization} needs the native kernels (a C compiler at install, --kernels auto) and "
            "--dtype float32 or bfloat16"
        )
    if not native.available():
        log.warning("the native CPU kernels are not built (no C compiler at install): torch does their work, slower")
    return Device(cpu, chosen, _name(chosen), torch_kernels(), native=False)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")

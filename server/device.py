"""Everything that depends on the device is chosen here: which one, its number format, its memory, its kernels."""

import logging
from dataclasses import dataclass

import torch

from server.config import EngineConfig
from server.engine.attention import PagedCache
from server.engine.cpu_kv_cache import CpuKVCache
from server.engine.cuda_kv_cache import CudaKVCache
from server.engine.kv_cache import KVShape, TorchKVCache
from server.errors import ConfigError
from server.kernels import Kernels, Storage, native, native_attention, onednn
from server.kernels.cpu import cpu_kernels
from server.kernels.memory import keep_freed_memory
from server.kernels.torch_ops import torch_kernels

log = logging.getLogger(__name__)

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

_CPU_KV_BYTES = 2 << 30
_CUDA_KV_SHARE = 0.8  # of the memory that the weights leave free
_BLOCK_SIZE = 16  # tokens, where the kernels leave it open


@dataclass(frozen=True, slots=True)
class Device:
    """A device and the choices that follow from it."""

    torch_device: torch.device
    dtype: torch.dtype  # of activations, and of weights that no kernel stores in its own way
    storage: str  # of the packed weights: the dtype, or what the weights are quantized to
    kernels: Kernels
    native: bool  # whether the native CPU kernels do the work
    native_kv_dtype: torch.dtype = torch.float32  # of their KV cache; others are of `dtype`
    lora_dtype: torch.dtype | None = None  # of adapters' factors in memory; None: as they were saved
    flash: bool = False  # whether torch's flash attention over pages runs here
    graphs: bool = False  # whether a step's kernels are to be captured as CUDA graphs

    def kv_cache_bytes(self) -> int:
        """A sensible size of the KV cache, asked after the weights are in place."""
        if self.torch_device.type == "cuda":
            free, _ = torch.cuda.mem_get_info(self.torch_device)
            return int(free * _CUDA_KV_SHARE)
        return _CPU_KV_BYTES

    def block_size(self, shape: KVShape) -> int:
        """Tokens per KV block that suit the fastest attention of the device."""
        return CudaKVCache.page_size if self.flash and CudaKVCache.serves(shape, self.dtype) else _BLOCK_SIZE

    def fixed_shapes(self, shape: KVShape, block_size: int) -> bool:
        """Whether decode steps are padded to a few sizes, for CUDA graphs."""
        return self.graphs and self._pages(shape, block_size)

    def kv_dtype(self, shape: KVShape, block_size: int) -> torch.dtype:
        """Number format of the KV cache."""
        return self.native_kv_dtype if self._attends_natively(shape, block_size) else self.dtype

    def paged_cache(self, shape: KVShape, num_blocks: int, block_size: int) -> PagedCache:
        if self._pages(shape, block_size):
            return CudaKVCache(shape, num_blocks, block_size, self.dtype, self.torch_device)
        if self._attends_natively(shape, block_size):
            return CpuKVCache(shape, num_blocks, self.native_kv_dtype)
        return TorchKVCache(shape, num_blocks, block_size, self.dtype, self.torch_device)

    def _attends_natively(self, shape: KVShape, block_size: int) -> bool:
        fits = block_size == CpuKVCache.block_size and native_attention.serves_head_dim(shape.head_dim)
        return self.native and fits

    def _pages(self, shape: KVShape, block_size: int) -> bool:
        return self.flash and block_size % CudaKVCache.page_size == 0 and CudaKVCache.serves(shape, self.dtype)


def pick_device(config: EngineConfig) -> Device:
    """Device, number format and kernels from the settings; `auto` takes CUDA when there is one.

    On the CPU the native kernels compute in float32 whatever the weights are stored in; without them torch does the
    work in the dtype that is asked for.

    Raises:
        ConfigError: what is asked for cannot be had here.
    """
    has_cuda = torch.cuda.is_available()
    if config.device == "cuda" and not has_cuda:
        raise ConfigError("--device cuda: torch finds no CUDA device here; use --device cpu or auto")
    if config.device == "cuda" or (config.device == "auto" and has_cuda):
        return _cuda(config)
    return _cpu(config)


def _cuda(config: EngineConfig) -> Device:
    if config.quantization != "none":
        raise ConfigError(f"--quantization {config.quantization} is for the CPU; this server runs on CUDA")
    device = torch.device("cuda")
    dtype = torch.bfloat16 if config.dtype == "auto" else DTYPES[config.dtype]
    _check_lora_dtype(config, dtype)
    kernels = torch_kernels()
    if config.kernels == "auto":
        try:
            from server.kernels.triton_ops import triton_kernels
        except ImportError:
            log.warning("Triton is not installed: torch applies the adapters, one after the other")
        else:
            kernels = triton_kernels(device, dtype, config.max_lora_rank)
    flash = torch.version.hip is None and torch.cuda.get_device_capability(device) >= (8, 0)
    graphs = config.cuda_graphs and kernels.fixed_segments is not None
    return Device(
        device,
        dtype,
        dtype_name(dtype),
        kernels,
        native=False,
        lora_dtype=dtype,
        flash=flash,
        graphs=graphs,
    )


def _cpu(config: EngineConfig) -> Device:
    keep_freed_memory()
    device = torch.device("cpu")
    dtype = torch.float32 if config.dtype == "auto" else DTYPES[config.dtype]
    if config.kernels == "auto" and native.available() and dtype != torch.float16:
        storage: Storage = "float32" if dtype == torch.float32 else "bfloat16"
        if config.quantization == "int8":
            storage = "int8"
        return Device(
            device,
            torch.float32,
            storage,
            cpu_kernels(storage),
            native=True,
            native_kv_dtype=dtype if config.kv_cache_dtype == "auto" else DTYPES[config.kv_cache_dtype],
            lora_dtype=_lora_dtype(config, dtype),
        )
    if config.quantization != "none":
        raise ConfigError(
            f"--quantization {config.quantization} needs the native kernels (a C compiler at install, --kernels auto) "
            "and --dtype float32 or bfloat16"
        )
    if config.kernels == "auto" and dtype != torch.float16 and not native.available():
        log.warning("the native CPU kernels %s: torch does their work, slower", native.missing_because)
    _check_lora_dtype(config, dtype)
    packed = config.kernels == "auto" and onednn.available(dtype)
    kernels = onednn.onednn_kernels() if packed else torch_kernels()
    return Device(device, dtype, dtype_name(dtype), kernels, native=False, lora_dtype=_lora_dtype(config, dtype))


def _lora_dtype(config: EngineConfig, dtype: torch.dtype) -> torch.dtype | None:
    """Beside weights of 16 bits adapters have them too; beside float32 those that were saved in 16 bits keep them."""
    if config.lora_dtype == "auto":
        return None if dtype == torch.float32 else dtype
    return DTYPES[config.lora_dtype]


def _check_lora_dtype(config: EngineConfig, dtype: torch.dtype) -> None:
    """Only the native kernels read factors of any format as they are."""
    if config.lora_dtype not in ("auto", dtype_name(dtype)):
        raise ConfigError(
            f"--lora-dtype {config.lora_dtype} needs the native CPU kernels; here adapters are {dtype_name(dtype)} as "
            "the model is"
        )


def dtype_name(dtype: torch.dtype) -> str:
    """As `--dtype` has it."""
    return str(dtype).removeprefix("torch.")

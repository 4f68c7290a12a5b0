"""Puts an engine together from its settings."""

import logging
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from server.base_models import resolve
from server.config import EngineConfig
from server.device import DTYPES, Device, dtype_name, pick_device
from server.engine.block_allocator import BlockAllocator
from server.engine.cpu_kv_cache import CpuKVCache
from server.engine.decode_graphs import CudaCapture
from server.engine.fixed_shapes import FixedShapes
from server.engine.kv_cache import KVShape
from server.engine.merge_costs import measure_merge_costs
from server.engine.merge_policy import MergePolicy
from server.engine.model import BaseModel, load_base_model
from server.engine.model_runner import ModelRunner, blocks_to_verify
from server.engine.scheduler import Scheduler
from server.errors import ConfigError
from server.lora.slots import AdapterSlots

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class EngineParts:
    """What `EngineCore` runs on, with the limits that follow from model and memory."""

    base: BaseModel
    runner: ModelRunner
    scheduler: Scheduler
    max_model_len: int
    num_blocks: int
    kv_cache_bytes: int
    kv_cache_dtype: str
    largest_difference: float  # of the self-check, in logits
    storage: str  # of the weights
    lora_dtype: torch.dtype | None  # of adapters' factors in memory; None: as they were saved
    merge_policy: MergePolicy | None  # None: nothing is merged unasked


def build_engine(config: EngineConfig) -> EngineParts:
    """Loads the model, sizes the KV cache, and proves that flat steps answer as the model itself does.

    Raises:
        ConfigError: a model that cannot be served, or memory that does not suffice.
    """
    if config.threads:
        torch.set_num_threads(config.threads)
    device = pick_device(config)
    path = resolve(config.model)
    log.info("loading %s on %s", path, device.torch_device)
    started = time.monotonic()
    base = load_base_model(path, Path(path).name, device.torch_device, device.dtype)
    log.info(
        "loaded in %.1f s; packing the weights for %d adapter slots", time.monotonic() - started, config.adapter_slots
    )
    max_model_len = _max_model_len(config, base)
    block_size = config.block_size or device.block_size(base.kv_shape)
    kv_dtype = dtype_name(device.kv_dtype(base.kv_shape, block_size))
    if config.kv_cache_dtype not in ("auto", kv_dtype):
        raise ConfigError(
            f"--kv-cache-dtype {config.kv_cache_dtype}: the cache is {kv_dtype} here; it is of another format than the "
            f"model only with the native CPU kernels and --block-size {CpuKVCache.block_size}"
        )
    num_blocks = _num_blocks(config, base.kv_shape, device, max_model_len, block_size)
    runner = _model_runner(config, base, device, num_blocks, block_size, max_model_len)
    log.info("checking steps against the model's own answers")
    largest_difference = runner.verify(device.storage, kv_dtype)
    scheduler = Scheduler(
        BlockAllocator(num_blocks, block_size, prefix_cache=config.prefix_cache),
        AdapterSlots(config.adapter_slots),
        max_num_seqs=config.max_num_seqs,
        max_num_batched_tokens=config.max_num_batched_tokens,
        max_model_len=max_model_len,
    )
    return EngineParts(
        base,
        runner,
        scheduler,
        max_model_len,
        num_blocks,
        num_blocks * block_size * base.kv_shape.bytes_per_token(DTYPES[kv_dtype]),
        kv_dtype,
        largest_difference,
        device.storage,
        device.lora_dtype,
        _merge_policy(config, runner),
    )


def _merge_policy(config: EngineConfig, runner: ModelRunner) -> MergePolicy | None:
    if config.merge_policy != "auto":
        return None
    if runner.lora.no_merge:
        raise ConfigError(f"--merge-policy auto: no adapter can be merged: {runner.lora.no_merge}")
    if runner.replays_graphs:
        raise ConfigError(
            "--merge-policy auto: with an adapter merged decode steps run without CUDA graphs, which costs more than a "
            "bypass; use --merge-policy manual, or --no-cuda-graphs"
        )
    costs = measure_merge_costs(runner, config.max_lora_rank)
    log.info(
        "merging takes %.0f ms; a bypass of %s",
        1000 * costs.merge_seconds,
        ", ".join(f"{tokens} tokens {1000 * seconds:.1f} ms" for tokens, seconds in costs.bypass_seconds),
    )
    return MergePolicy(costs)


def _model_runner(
    config: EngineConfig, base: BaseModel, device: Device, num_blocks: int, block_size: int, max_model_len: int
) -> ModelRunner:
    """The runner with everything that is done once: kernels fused or compiled, graphs captured."""
    fixed_shapes = None
    cache_blocks = num_blocks
    if device.fixed_shapes(base.kv_shape, block_size):
        cache_blocks += 1  # one that the allocator does not know
        fixed_shapes = FixedShapes(
            max_num_seqs=config.max_num_seqs,
            max_blocks=-(-max_model_len // block_size),
            block_size=block_size,
            padding_block=num_blocks,
            device=device.torch_device,
        )
    cache = device.paged_cache(base.kv_shape, cache_blocks, block_size)
    runner = ModelRunner(base, device.kernels, cache, config.adapter_slots, fixed_shapes)
    if device.native:
        fused = runner.fuse()
        log.info("fused: %s", ", ".join(f"{count} × {kind}" for kind, count in fused.items()) or "nothing")
    if device.torch_device.type == "cuda":
        runner.warm_up()
        if fixed_shapes is not None:
            runner.capture_graphs(CudaCapture())
            log.info("CUDA graphs of decode steps: %s requests", ", ".join(map(str, fixed_shapes.sizes)))
    return runner


def _max_model_len(config: EngineConfig, base: BaseModel) -> int:
    if config.max_model_len > base.max_model_len:
        raise ConfigError(f"--max-model-len {config.max_model_len}: the model was made for {base.max_model_len} tokens")
    return config.max_model_len or base.max_model_len


def _num_blocks(config: EngineConfig, shape: KVShape, device: Device, max_model_len: int, block_size: int) -> int:
    """As many blocks as fit, but at least one request of the full length: no request is ever too long to run."""
    block_bytes = block_size * shape.bytes_per_token(device.kv_dtype(shape, block_size))
    available = config.kv_cache_bytes or device.kv_cache_bytes()
    wanted = -(-max_model_len // block_size)
    if available < wanted * block_bytes:
        raise ConfigError(
            f"a KV cache of {available:,} bytes does not hold one request of {max_model_len:,} tokens, which takes "
            f"{wanted * block_bytes:,}: raise --kv-cache-bytes or lower --max-model-len"
        )
    useful = max(config.max_num_seqs * wanted, blocks_to_verify(block_size))
    return min(max(available // block_bytes, blocks_to_verify(block_size)), useful)

"""What a server tells its clients of itself: model, limits, machine, and the settings that shape its speed."""

from dataclasses import fields
from importlib.metadata import version

import torch

from server.config import EngineConfig, ServerConfig
from server.device import dtype_name
from server.engine.build import EngineParts
from server.environment import machine
from server.pb.loraplex.v1.inference_pb2 import ModelInfo

_TOLD_ELSEWHERE = {"model", "device", "dtype"}  # in fields of their own, and a path is nobody's business


def model_info(engine_config: EngineConfig, config: ServerConfig, parts: EngineParts) -> ModelInfo:
    base = parts.base
    return ModelInfo(
        name=base.name,
        architecture=base.architecture,
        dtype=parts.storage,
        device=str(base.device),
        max_model_len=parts.max_model_len,
        vocab_size=base.vocab_size,
        base_digest=base.digest,
        max_lora_rank=engine_config.max_lora_rank,
        num_adapter_slots=engine_config.adapter_slots,
        version=version("loraplex"),
        machine=dict(machine()),
        settings=_settings(engine_config, config, parts),
    )


def _settings(engine_config: EngineConfig, config: ServerConfig, parts: EngineParts) -> dict[str, str]:
    """By the names of the flags; where one leaves the choice to the server, what that chose."""
    values = {item.name: getattr(engine_config, item.name) for item in fields(engine_config)}
    values |= {
        "max_model_len": parts.max_model_len,
        "block_size": parts.runner.cache.block_size,
        "kv_cache_bytes": parts.kv_cache_bytes,
        "kv_cache_dtype": parts.kv_cache_dtype,
        "lora_dtype": dtype_name(parts.lora_dtype) if parts.lora_dtype else "as saved",
        "threads": torch.get_num_threads(),
        "kernels": parts.runner.lora.kernels_name,
        "cuda_graphs": parts.runner.replays_graphs,
        "adapter_host_bytes": config.adapter_host_bytes,
        "max_waiting": config.max_waiting,
    }
    return {name.replace("_", "-"): _text(value) for name, value in values.items() if name not in _TOLD_ELSEWHERE}


def _text(value: object) -> str:
    return ("on" if value else "off") if isinstance(value, bool) else str(value)

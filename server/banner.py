"""What the server says of itself when it starts."""

import platform
from collections.abc import Collection, Mapping, Sequence
from importlib.metadata import version
from itertools import islice
from pathlib import Path

import torch

from adapters.errors import AdapterFormatError
from adapters.format import check_config
from adapters.tensors import LinearShape
from server.config import EngineConfig, ServerConfig
from server.engine.build import EngineParts
from server.lora.store import AdapterRef

MAX_CHECKED = 1000  # adapters whose configuration is looked at before the server is ready
MAX_REFUSED_LINES = 10


def banner(
    engine_config: EngineConfig,
    config: ServerConfig,
    parts: EngineParts,
    adapters: Collection[AdapterRef],
    refused: Mapping[AdapterRef, str],
    addresses: Sequence[str],
    metrics_address: str,
) -> list[str]:
    """Its lines.

    Args:
        adapters: every version.
        refused: those that cannot be served, and why.
        addresses: of --listen, and of --admin-listen if there is one, with the ports that were bound.
        metrics_address: empty if there is none.
    """
    base = parts.base
    lines = [
        f"Loraplex {version('loraplex')}, torch {torch.__version__}, Python {platform.python_version()}",
        f"model     {base.name}: {base.architecture}, {parts.storage} on {base.device}, digest {base.digest[:12]}",
        f"check     packed and chunked steps answer as the model itself, logits within {parts.largest_difference:.1e}",
        f"KV cache  {parts.num_blocks:,} blocks of {parts.runner.cache.block_size} tokens, "
        f"{parts.kv_cache_bytes / 2**20:,.0f} MiB of {parts.kv_cache_dtype}; requests up to {parts.max_model_len:,} "
        "tokens",
        f"adapters  {_count(adapters)} in {config.adapters_dir}; {engine_config.adapter_slots} device slots, rank up "
        f"to {engine_config.max_lora_rank}, kernels: {parts.runner.lora.kernels_name}",
        *(f"refused   {ref.name}@{ref.version}: {why}" for ref, why in list(refused.items())[:MAX_REFUSED_LINES]),
        f"listening gRPC {', for operators '.join(addresses)}, metrics {metrics_address or 'off'}, reflection "
        f"{'on' if config.reflection else 'off'}, {_security(config)}",
    ]
    if len(refused) > MAX_REFUSED_LINES:
        lines.insert(-1, f"refused   {len(refused) - MAX_REFUSED_LINES} more: see 'loraplex adapters list'")
    return lines


def _count(adapters: Collection[AdapterRef]) -> str:
    num_names = len({ref.name for ref in adapters})
    return f"{num_names:,}" if num_names == len(adapters) else f"{num_names:,} of {len(adapters):,} versions"


def _security(config: ServerConfig) -> str:
    if not config.tls_cert:
        return "no TLS, no authentication"
    return "TLS, clients show a certificate" if config.tls_client_ca else "TLS, no authentication"


def refused_adapters(
    adapters: Mapping[AdapterRef, Path], layers: Mapping[str, LinearShape], max_rank: int, base_model: str
) -> dict[AdapterRef, str]:
    """The adapters whose configuration this server cannot serve, and why, of the first thousand by name and folder.

    Their weights are not read.
    """
    refused = {}
    for ref, folder in islice(adapters.items(), MAX_CHECKED):
        try:
            check_config(folder, layers, max_rank, base_model)
        except AdapterFormatError as error:
            refused[ref] = str(error)
        except OSError:  # of the moment: its first request will try again
            continue
    return refused

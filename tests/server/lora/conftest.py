"""A cache over a folder, with a device that only remembers what left it; and disks that fail."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from prometheus_client import CollectorRegistry

from adapters.tensors import LinearShape
from server.lora.adapter import Adapter
from server.lora.base_weights import BaseWeights
from server.lora.cache import AdapterCache
from server.lora.host_copy import FreedBytes
from server.lora.served_base import ServedBase
from server.lora.store import AdapterStore
from server.metrics import Metrics

LAYERS = {f"model.layers.{layer}.self_attn.{name}": LinearShape(64, 64 if name == "q_proj" else 32)
          for layer in range(2) for name in ("q_proj", "v_proj")}  # fmt: skip
ADAPTER_BYTES = 2 * 4 * (64 + 64 + 64 + 32) * 4  # layers · rank · (A and B of q, A and B of v) · float32

MakeAdapter = Callable[..., Path]


def make_cache(
    root: Path,
    max_bytes: int = 1 << 30,
    reserved: frozenset[str] = frozenset(),
    revoke: Callable[[Adapter], None] = lambda adapter: None,
) -> tuple[AdapterCache, list[Adapter]]:
    """The cache, and the adapters that were taken off the device, in order."""
    cache = AdapterCache(
        AdapterStore(root, reserved),
        ServedBase(weights=BaseWeights(LAYERS, torch.float32), max_rank=8, name="tiny", fingerprint="0123" * 16),
        max_bytes=max_bytes,
        metrics=Metrics(CollectorRegistry()),
    )
    evicted: list[Adapter] = []

    async def evict(adapter: Adapter, makes_room: bool) -> FreedBytes:
        evicted.append(adapter)
        return FreedBytes(device=5, host=0)

    cache.connect(evict, revoke)
    return cache, evicted


def fail_disk(monkeypatch: pytest.MonkeyPatch, path: Path, code: int) -> None:
    """Until it is undone, the system answers with an error whenever this path is opened or looked at."""

    def failing(real: Callable[..., Any]) -> Callable[..., Any]:
        def call(of: Any, *args: Any, **kwargs: Any) -> Any:
            if not isinstance(of, int) and os.fspath(of) == str(path):
                raise OSError(code, os.strerror(code), str(path))
            return real(of, *args, **kwargs)

        return call

    for name in ("open", "lstat", "stat", "scandir"):
        monkeypatch.setattr(os, name, failing(getattr(os, name)))

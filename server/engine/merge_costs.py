"""What merging an adapter would save and cost on this machine, measured before the first request. Engine thread."""

import statistics
import time
from collections.abc import Mapping
from typing import Any

import torch

from adapters.tensors import LinearShape
from server.engine.merge_policy import MergeCosts
from server.engine.model_runner import ModelRunner
from server.kernels import LayerWeights, Segment
from server.lora.adapter import Adapter

RANK = 8
STEP_TOKENS = (1, 4, 16, 64, 256)
ROUNDS = 3


@torch.inference_mode()
def measure_merge_costs(runner: ModelRunner) -> MergeCosts:
    """Runs every linear layer with and without the bypass of an adapter of random weights, and merges it."""
    lora, layers = runner.lora, runner.base.linear_layers
    adapter = _random_adapter({name: shape for name, shape in layers.items() if shape.kind == "linear"})
    lora.write(lora.merged_slot, adapter)
    bypass_seconds = []
    for num_tokens in STEP_TOKENS:
        inputs = [
            torch.randn(1, num_tokens, layers[names[0]].in_features, dtype=runner.base.dtype, device=runner.base.device)
            for names, _ in lora.groups
        ]
        passes = [lora.prepare((Segment(lora.merged_slot, 0, num_tokens),))]
        extra = [_seconds(runner, inputs, passes) - _seconds(runner, inputs, ()) for _ in range(ROUNDS)]
        bypass_seconds.append((num_tokens, max(0.0, statistics.median(extra))))
    merge_seconds = statistics.median([runner.merge(adapter) + runner.merge(None) for _ in range(ROUNDS)])
    return MergeCosts(bypass_seconds, merge_seconds, adapter.num_bytes)


def _seconds(runner: ModelRunner, inputs: list[torch.Tensor], passes: Any) -> float:
    started = time.perf_counter()
    for x, (_, group) in zip(inputs, runner.lora.groups, strict=True):
        y = group(x, passes)[0]
    y[0, 0, 0].item()  # waits for the device
    return time.perf_counter() - started


def _random_adapter(layers: Mapping[str, LinearShape]) -> Adapter:
    weights = {
        name: LayerWeights(torch.randn(RANK, shape.in_features), torch.randn(RANK, shape.out_features), 1.0)
        for name, shape in layers.items()
    }
    num_bytes = sum(layer.lora_a.nbytes + layer.lora_b.nbytes for layer in weights.values())
    return Adapter("measured", "0", 0, "", RANK, (), weights, num_bytes, 0)

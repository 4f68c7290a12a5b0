"""What merging an adapter would save and cost on this machine, measured before the first request. Engine thread."""

import statistics
import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from adapters.tensors import LinearShape
from server.engine.merge_policy import MergeCosts
from server.engine.model_runner import ModelRunner
from server.kernels import LayerWeights, LinearGroup, Segment
from server.lora.adapter import Adapter

RANK = 8  # at most, of the adapter that is measured
STEP_TOKENS = (1, 4, 16, 64, 256)
ROUNDS = 3


@torch.inference_mode()
def measure_merge_costs(runner: ModelRunner, max_rank: int) -> MergeCosts:
    """Runs every linear layer but the head with and without the bypass of an adapter of random weights, and merges it.

    `max_rank`: the largest that the kernels take.
    """
    lora, shapes = runner.lora, runner.base.linear_layers
    layers = {name: shape for name, shape in shapes.items() if shape.kind == "linear"}
    groups = [(layers[names[0]].in_features, group) for names, group in lora.groups if names[0] in layers]
    adapter = _random_adapter(layers, min(RANK, max_rank))
    lora.write(lora.merged_slot, adapter)
    bypass_seconds = []
    for num_tokens in STEP_TOKENS:
        inputs = [
            (torch.randn(1, num_tokens, in_features, dtype=runner.base.dtype, device=runner.base.device), group)
            for in_features, group in groups
        ]
        passes = [lora.prepare((Segment(lora.merged_slot, 0, num_tokens),))]
        extra = [_seconds(inputs, passes) - _seconds(inputs, ()) for _ in range(ROUNDS)]
        bypass_seconds.append((num_tokens, max(0.0, statistics.median(extra))))
    merge_seconds = statistics.median([runner.merge(adapter) + runner.merge(None) for _ in range(ROUNDS)])
    return MergeCosts(bypass_seconds, merge_seconds, adapter.num_bytes)


def _seconds(inputs: Sequence[tuple[Tensor, LinearGroup]], passes: Sequence[Any]) -> float:
    started = time.perf_counter()
    for x, group in inputs:
        y = group(x, passes)[0]
    y[0, 0, 0].item()  # waits for the device
    return time.perf_counter() - started


def _random_adapter(layers: Mapping[str, LinearShape], rank: int) -> Adapter:
    """As small beside the base's weights as trained ones are."""
    weights = {
        name: LayerWeights(torch.randn(rank, shape.in_features), torch.randn(rank, shape.out_features), 1e-4)
        for name, shape in layers.items()
    }
    num_bytes = sum(layer.lora_a.nbytes + layer.lora_b.nbytes for layer in weights.values())
    return Adapter("measured", "0", 0, "", rank, (), weights, num_bytes, 0)

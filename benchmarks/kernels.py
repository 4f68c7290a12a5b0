"""The native CPU kernels, which sum every row in one fixed order, against torch's, which need not: what that costs."""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoConfig

from server.errors import ConfigError
from server.kernels import native, native_attention, onednn
from server.kernels.cpu import CpuLinearGroup
from server.kernels.memory import Arena


@dataclass(frozen=True, slots=True)
class Shape:
    """A decoder as Llama's family has it."""

    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int

    @classmethod
    def of(cls, model: str) -> "Shape":
        """
        Raises:
            ConfigError: the model's config does not name its sizes as Llama's does.
        """
        config = AutoConfig.from_pretrained(model)
        try:
            heads = config.num_attention_heads
            return cls(
                config.num_hidden_layers,
                config.hidden_size,
                config.intermediate_size,
                heads,
                config.num_key_value_heads,
                getattr(config, "head_dim", None) or config.hidden_size // heads,
            )
        except AttributeError as error:
            raise ConfigError(f"--model {model}: its config is not of Llama's kind ({error})") from error

    def linear_groups(self) -> list[list[nn.Linear]]:
        """New linear layers of one decoder layer; those of a group read the same input."""
        queries, keys = self.heads * self.head_dim, self.kv_heads * self.head_dim
        sizes = [
            [(self.hidden, queries), (self.hidden, keys), (self.hidden, keys)],
            [(queries, self.hidden)],
            [(self.hidden, self.intermediate)] * 2,
            [(self.intermediate, self.hidden)],
        ]
        return [[nn.Linear(width, out, bias=False) for width, out in group] for group in sizes]


@torch.inference_mode()
def measure_kernels(
    shape: Shape, rows: Sequence[int], prompts: Sequence[int], contexts: Sequence[int], rounds: int
) -> dict[str, Any]:
    """Milliseconds, medians of calls in turn: all linear layers at so many rows, in float32, and one layer's attention.

    Raises:
        ConfigError: the native kernels cannot be used.
    """
    if not native.available():
        raise ConfigError(f"the native kernels {native.missing_because}")
    linear = _Linear(shape)
    return {
        "kernels": native.isa(),
        "threads": torch.get_num_threads(),
        "linear_ms": {count: _medians(linear.calls(count), rounds) for count in rows},
        "prompt_attention_ms": {count: _medians(attention_calls(shape, count, count), rounds) for count in prompts},
        "decode_attention_ms": {count: _medians(attention_calls(shape, 1, count), rounds) for count in contexts},
    }


Calls = Mapping[str, Callable[[], Any]]


class _Linear:
    """All linear layers of a model, once for each of those who multiply."""

    def __init__(self, shape: Shape) -> None:
        self._plain = [group for _ in range(shape.layers) for group in shape.linear_groups()]
        arena = Arena()
        self._native = [CpuLinearGroup("float32", arena, group, num_slots=1) for group in self._plain]
        self._packed = (
            [[onednn.PackedLinear(layer) for layer in group] for group in self._plain]
            if onednn.available(torch.float32)
            else None
        )

    def calls(self, rows: int) -> Calls:
        inputs = {group[0].in_features: torch.randn(rows, group[0].in_features) for group in self._plain}
        xs = [inputs[group[0].in_features] for group in self._plain]

        def by_native() -> None:
            for group, x in zip(self._native, xs, strict=True):
                group(x, [])

        def by(groups: Sequence[Sequence[nn.Module]]) -> Callable[[], None]:
            def call() -> None:
                for group, x in zip(groups, xs, strict=True):
                    for layer in group:
                        layer(x)

            return call

        packed = {"onednn": by(self._packed)} if self._packed else {}
        return {"native": by_native, **packed, "torch": by(self._plain)}


def attention_calls(shape: Shape, queries: int, positions: int) -> Calls:
    """The last `queries` of one request's positions attend to themselves and to all before: one, or all of them.

    What both give is [queries, heads, head_dim].
    """
    num_blocks = -(-positions // native_attention.BLOCK_SIZE)
    cache = native_attention.KVCacheLayer(num_blocks, shape.kv_heads, shape.head_dim)
    q = torch.randn(queries, shape.heads, shape.head_dim)
    k, v = torch.randn(2, positions, shape.kv_heads, shape.head_dim)
    native_attention.write_kv(cache, k, v, torch.arange(positions))
    options = native_attention.AttentionOptions(shape.heads, shape.head_dim**-0.5)
    batch = native_attention.AttentionBatch(
        torch.arange(num_blocks, dtype=torch.int32)[None],
        torch.tensor([0, queries], dtype=torch.int32),
        torch.arange(positions - queries, positions),
    )
    query, key, value = [tensor.transpose(0, 1)[None].contiguous() for tensor in (q, k, v)]

    def by_torch() -> Tensor:
        out = F.scaled_dot_product_attention(query, key, value, is_causal=queries > 1, enable_gqa=True)
        return out[0].transpose(0, 1)

    return {"native": lambda: native_attention.paged_attention(q, cache, options, batch), "torch": by_torch}


def _medians(calls: Calls, rounds: int) -> dict[str, float]:
    times: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        call()
    for _ in range(rounds):
        for name, call in calls.items():
            started = time.perf_counter()
            call()
            times[name].append(time.perf_counter() - started)
    return {name: round(1e3 * statistics.median(seconds), 3) for name, seconds in times.items()}

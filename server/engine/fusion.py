"""Fused forwards for the small parts of a model: norms, gated feed-forwards, rotary attention, residual sums.

No architecture is known by name. One recorded forward shows what goes into every part and what comes out; a part gets a
fused forward only if that gives the same output for the same input. Whatever is not recognized stays as it is.
Engine thread, once at start.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from server.engine.attention import AttentionOptions, AttentionStep
from server.engine.recorded_forward import Forward, RecordingStep, record_forward
from server.engine.replay import replay_parts
from server.kernels import native, native_fused


@torch.inference_mode()
@native.float32_products()
def fuse(
    model: nn.Module, run: Callable[[AttentionStep], Any], step: AttentionStep, passes: Callable[[], Any]
) -> Counter[str]:
    """Gives the parts of a model fused forwards; says how many of each kind.

    Meanwhile x is not rounded for bfloat16 weights, which makes more of the last bit of an x than the tolerance of
    `Call.is_answered_by`.

    Args:
        run: computes one forward of the model on the CPU, with the step it is given.
        step: the attention of that forward.
        passes: the bypasses of the running step, as the kernels want them.
    """
    recording = RecordingStep(step)
    calls = record_forward(model, run, recording)
    done: Counter[str] = Counter()
    # From the inside out: a layer is built from parts that are fused already.
    for path, module in reversed(list(model.named_modules())):
        if path not in calls:
            continue
        for kind, forward in _candidates(module, recording.options):
            if calls[path].is_answered_by(forward):
                module.forward = forward
                done[kind] += 1
                break
    done["replay"] = replay_parts(model, calls, passes)
    return +done  # without kinds of which there are none


def _candidates(module: Any, options: dict[int | None, AttentionOptions]) -> Iterator[tuple[str, Forward]]:
    """Fused forwards that the module's parts suggest; whether they are right is tried, not believed."""
    if isinstance(module, nn.LayerNorm):
        yield "layer norm", _layer_norm(module)
    elif type(module).__name__.endswith("RMSNorm"):
        for weight in _norm_weights(module):
            yield "RMS norm", _rms_norm(weight, _eps(module))
    elif _has(module, "gate_proj", "up_proj", "down_proj"):
        for gate in (native_fused.silu_mul, native_fused.gelu_tanh_mul):
            yield "gated feed-forward", _gated(module, gate)
    elif _has(module, "q_proj", "k_proj", "v_proj", "o_proj"):
        layer = getattr(module, "layer_idx", None)
        if layer in options:
            yield "rotary attention", _attention(module, layer, options[layer])
    elif _has(module, "input_layernorm", "self_attn", "post_attention_layernorm", "mlp"):
        for first in _norm_weights(module.input_layernorm):
            for second in _norm_weights(module.post_attention_layernorm):
                yield "decoder layer", _decoder_layer(module, first, second)


def _layer_norm(module: nn.LayerNorm) -> Forward:
    def forward(x: Tensor) -> Tensor:
        return native_fused.layer_norm(x, module.weight, module.bias, module.eps)

    return forward


def _rms_norm(weight: Tensor, eps: float) -> Forward:
    def forward(x: Tensor) -> Tensor:
        return native_fused.rms_norm(x, weight, eps)

    return forward


def _gated(module: Any, gate_and_up: Callable[[Tensor, Tensor], Tensor]) -> Forward:
    gate, up, down = module.gate_proj.forward, module.up_proj.forward, module.down_proj.forward

    def forward(x: Tensor) -> Tensor:
        y: Tensor = down(gate_and_up(gate(x), up(x)))
        return y

    return forward


def _attention(module: Any, layer: int | None, options: AttentionOptions) -> Forward:
    """Projections, rotary embedding in place, attention, projection."""
    q_proj, k_proj, v_proj = module.q_proj.forward, module.k_proj.forward, module.v_proj.forward
    o_proj, head_dim = module.o_proj.forward, module.head_dim

    def forward(
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: None = None,
        *,
        attention_step: AttentionStep,
        **_: Any,
    ) -> tuple[Tensor, None]:
        num_tokens = hidden_states.shape[1]
        heads = (num_tokens, -1, head_dim)
        query, key = q_proj(hidden_states).view(heads), k_proj(hidden_states).view(heads)
        value = v_proj(hidden_states).view(heads)
        native_fused.rotary(query, key, *position_embeddings)
        attended = attention_step.attend(layer, query, key, value, options)
        return o_proj(attended.view(1, num_tokens, -1)), None

    return forward


def _decoder_layer(module: Any, first: Tensor, second: Tensor) -> Forward:
    """Norm, attention, sum and norm, feed-forward, sum; the sums go into the layer's own input."""
    attention, mlp = module.self_attn.forward, module.mlp.forward
    first_eps, second_eps = _eps(module.input_layernorm), _eps(module.post_attention_layernorm)

    def forward(hidden_states: Tensor, **kwargs: Any) -> Tensor:
        attended, _ = attention(native_fused.rms_norm(hidden_states, first, first_eps), **kwargs)
        normed = native_fused.rms_norm(attended, second, second_eps, residual=hidden_states)
        return native_fused.add(mlp(normed), hidden_states)

    return forward


def _has(module: nn.Module, *names: str) -> bool:
    return all(isinstance(getattr(module, name, None), nn.Module) for name in names)


def _norm_weights(module: Any) -> Iterator[Tensor]:
    """What an RMS norm may multiply by: its weight, or one more than it."""
    weight = getattr(module, "weight", None)
    if isinstance(weight, Tensor) and type(module).__name__.endswith("RMSNorm"):
        yield weight.detach().float().contiguous()
        yield (1 + weight.detach().float()).contiguous()


def _eps(module: nn.Module) -> float:
    return float(getattr(module, "variance_epsilon", getattr(module, "eps", 1e-6)))

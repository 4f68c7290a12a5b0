"""Fused forwards that a module's parts suggest: norms, gated feed-forwards, rotary attention, decoder layers.

They are guesses: `fusion` tries each against what the module itself gave. Engine thread, once at start.
"""

from collections.abc import Callable, Collection, Iterator, Sequence
from functools import partial
from typing import Any

from torch import Tensor, nn

from server.engine.attention import AttentionStep
from server.engine.recorded_forward import AttentionCall, Forward
from server.kernels import native_fused


def candidates(
    module: Any, children: Sequence[nn.Module], norms: Collection[nn.Module], attention: AttentionCall | None
) -> Iterator[tuple[str, Forward]]:
    """The kinds of part that a module may be, each with the forward it would have.

    Args:
        children: the modules it calls, in the order of their calls.
        norms: modules that have a fused norm already.
        attention: the attention of the module's layer, if it has one.
    """
    if isinstance(module, nn.LayerNorm):
        norm = partial(native_fused.layer_norm, weight=module.weight, bias=module.bias, eps=module.eps)
        yield "layer norm", norm
    elif type(module).__name__.endswith("RMSNorm"):
        for weight in _norm_weights(module):
            yield "RMS norm", partial(native_fused.rms_norm, weight=weight, eps=_eps(module))
    elif _has(module, "down_proj") and (gate_and_up := _gate_and_up(module)):
        for activation in (native_fused.silu_mul, native_fused.gelu_tanh_mul):
            yield "gated feed-forward", _gated(gate_and_up, activation, module.down_proj.forward)
    elif attention and (qkv := _query_key_value(module, attention)) and (output := _first(module, "o_proj", "dense")):
        yield "rotary attention", _attention(module, attention, qkv, output.forward)
    else:
        for layer in _decoder_layers(module, children, norms):
            yield "decoder layer", layer


def _gate_and_up(module: Any) -> Callable[[Tensor], Sequence[Tensor]] | None:
    """x → gate, up [..., intermediate_size], of two layers or of one."""
    if _has(module, "gate_proj", "up_proj"):
        gate, up = module.gate_proj.forward, module.up_proj.forward
        return lambda x: (gate(x), up(x))
    if _has(module, "gate_up_proj"):
        both = module.gate_up_proj.forward
        return lambda x: both(x).chunk(2, dim=-1)
    return None


def _gated(
    gate_and_up: Callable[[Tensor], Sequence[Tensor]], activation: Callable[[Tensor, Tensor], Tensor], down: Forward
) -> Forward:
    def forward(x: Tensor) -> Tensor:
        y: Tensor = down(activation(*gate_and_up(x)))
        return y

    return forward


def _query_key_value(module: Any, attention: AttentionCall) -> Callable[[Tensor], Sequence[Tensor]] | None:
    """x → q, k, v [..., heads * head_dim], of three layers or of one."""
    if _has(module, "q_proj", "k_proj", "v_proj"):
        q, k, v = module.q_proj.forward, module.k_proj.forward, module.v_proj.forward
        return lambda x: (q(x), k(x), v(x))
    if _has(module, "qkv_proj"):
        qkv = module.qkv_proj.forward
        heads = (attention.num_heads, attention.num_kv_heads, attention.num_kv_heads)
        widths = [number * attention.head_dim for number in heads]
        return lambda x: qkv(x).split(widths, dim=-1)
    return None


def _attention(
    module: Any, attention: AttentionCall, query_key_value: Callable[[Tensor], Sequence[Tensor]], output: Forward
) -> Forward:
    """Projections, norms of q and k where there are any, rotary embedding in place, attention, projection."""
    q_norm = _first(module, "q_norm", "q_layernorm")
    k_norm = _first(module, "k_norm", "k_layernorm")

    def forward(
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: None = None,
        *,
        attention_step: AttentionStep,
        **_: Any,
    ) -> tuple[Tensor, None]:
        num_tokens = hidden_states.shape[1]
        heads = (num_tokens, -1, attention.head_dim)
        query, key, value = query_key_value(hidden_states)
        query, key = _normed(query, q_norm).view(heads), _normed(key, k_norm).view(heads)
        native_fused.rotary(query, key, *position_embeddings)
        attended = attention_step.attend(attention.layer, query, key, value.view(heads), attention.options)
        return output(attended.view(1, num_tokens, -1)), None

    return forward


def _normed(x: Tensor, norm: Any) -> Tensor:
    """x [..., heads * head_dim], each head or the whole row normed, as wide as the norm's weight is."""
    if norm is None:
        return x
    y: Tensor = norm.forward(x.unflatten(-1, (-1, norm.weight.numel())))
    return y


def _decoder_layers(module: Any, children: Sequence[nn.Module], norms: Collection[nn.Module]) -> Iterator[Forward]:
    """Two modules with norms around them: attention and feed-forward, each with its sum.

    The first sum may stand before or after any norm between the two; a norm right after it takes it along.
    """
    parts = [child for child in children if not isinstance(child, nn.Dropout)]  # which do nothing here
    inner = [index for index, part in enumerate(parts) if part not in norms]
    if len(inner) != 2 or len(parts) == 2:
        return
    attention, mlp = inner
    multiplier = float(getattr(module, "residual_multiplier", 1))
    for sum_at in range(attention + 1, mlp + 1):
        after, rest = parts[attention + 1 : sum_at], parts[sum_at:]
        first_sum = rest.pop(0) if sum_at < mlp else _sum
        yield _decoder_layer(parts[:attention], parts[attention], after, first_sum, rest, multiplier)


def _decoder_layer(
    before: Sequence[Forward],
    attention: Forward,
    after: Sequence[Forward],
    first_sum: Forward,
    rest: Sequence[Forward],
    multiplier: float,
) -> Forward:
    """x += multiplier * after(attention(before(x))), x += multiplier * rest(x), into the layer's own input.

    The parts are called as modules: whatever forwards they get later are theirs here too.
    """

    def forward(hidden_states: Tensor, **kwargs: Any) -> Tensor:
        x, _ = attention(_chained(before, hidden_states), **kwargs)
        x = first_sum(_scaled(_chained(after, x), multiplier), residual=hidden_states)
        return _sum(_scaled(_chained(rest, x), multiplier), residual=hidden_states)

    return forward


def _sum(x: Tensor, residual: Tensor) -> Tensor:
    return native_fused.add(x, residual)


def _chained(forwards: Sequence[Forward], x: Tensor) -> Tensor:
    for forward in forwards:
        x = forward(x)
    return x


def _scaled(x: Tensor, factor: float) -> Tensor:
    """In place, and not by `add_(alpha=…)`, which may round once or twice, by a row's place in the batch."""
    return x if factor == 1 else x.mul_(factor)


def _first(module: nn.Module, *names: str) -> Any:
    """The first of these that the module has."""
    return next((getattr(module, name) for name in names if _has(module, name)), None)


def _has(module: nn.Module, *names: str) -> bool:
    return all(isinstance(getattr(module, name, None), nn.Module) for name in names)


def _norm_weights(module: Any) -> Iterator[Tensor]:
    """What an RMS norm may multiply by: its weight, or one more than it."""
    weight = getattr(module, "weight", None)
    if isinstance(weight, Tensor):
        yield weight.detach().float().contiguous()
        yield (1 + weight.detach().float()).contiguous()


def _eps(module: nn.Module) -> float:
    return float(getattr(module, "variance_epsilon", getattr(module, "eps", None)) or 1e-6)

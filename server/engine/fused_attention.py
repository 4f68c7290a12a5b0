"""Fused forwards that an attention module may have; see `fused_forwards`. Engine thread, once at start."""

import inspect
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from torch import Tensor, nn

from server.engine.attention import AttentionOptions, AttentionStep
from server.engine.recorded_forward import AttentionCall, Call, Forward
from server.kernels.native_fused import Rotary, split_heads

Projections = Callable[[Tensor], Sequence[Tensor]]  # x → q, k, v [..., heads * head_dim]


def attentions(module: nn.Module, call: Call, attention: AttentionCall) -> Iterator[tuple[str, Forward]]:
    """Projections, norms of q and k where there are any, rotary embedding before or after them, attention, projection.

    Args:
        call: of the module.
        attention: which it asked for meanwhile.
    """
    output = _first(module, "o_proj", "out_proj", "dense", "c_proj")
    if output is None:
        return
    for projections in _projections(module, attention):
        for options in _options(module, attention.options):
            made = attention._replace(options=options)
            for rotary in _rotaries(module, call, attention):
                if rotary is None:
                    yield "attention", _attention(module, made, projections, None, output.forward)
                    continue
                for normed_last in (False, True):
                    forward = _attention(module, made, projections, rotary, output.forward, normed_last=normed_last)
                    yield "rotary attention", forward


def _projections(module: Any, attention: AttentionCall) -> Iterator[Projections]:
    """Of three layers or of one, whose output is all of q, k and v in turn or those of one head after the other."""
    if all(isinstance(getattr(module, name, None), nn.Module) for name in ("q_proj", "k_proj", "v_proj")):
        q, k, v = module.q_proj.forward, module.k_proj.forward, module.v_proj.forward
        yield lambda x: (q(x), k(x), v(x))
    elif packed := _first(module, "qkv_proj", "query_key_value", "c_attn"):
        qkv = packed.forward
        heads = (attention.num_heads, attention.num_kv_heads, attention.num_kv_heads)
        widths = [number * attention.head_dim for number in heads]
        yield lambda x: qkv(x).split(widths, dim=-1)
        if attention.num_heads == attention.num_kv_heads:
            yield lambda x: split_heads(qkv(x), attention.num_heads).split(widths, dim=-1)


def _options(module: nn.Module, options: AttentionOptions) -> Iterator[AttentionOptions]:
    yield options
    if options.scaling == 1:  # q may have been scaled before
        yield options._replace(scaling=float(getattr(module, "scaling", 1)))


def _rotaries(module: nn.Module, call: Call, attention: AttentionCall) -> Iterator[Rotary | None]:
    arguments = inspect.signature(module.forward).bind(*call.args, **call.kwargs).arguments
    tables = arguments.get("position_embeddings")
    if tables is not None:
        yield from Rotary.layouts(attention.head_dim, tables[0].shape[-1])
    yield None


def _attention(
    module: nn.Module,
    attention: AttentionCall,
    projections: Projections,
    rotary: Rotary | None,
    output: Forward,
    *,
    normed_last: bool = False,
) -> Forward:
    q_norm = _first(module, "q_norm", "q_layernorm", "query_layernorm")
    k_norm = _first(module, "k_norm", "k_layernorm", "key_layernorm")

    def forward(
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        attention_mask: None = None,
        *,
        attention_step: AttentionStep,
        **_: Any,
    ) -> tuple[Tensor, None]:
        num_tokens = hidden_states.shape[1]
        heads = (num_tokens, -1, attention.head_dim)
        query, key, value = projections(hidden_states)
        if not normed_last:
            query, key = _normed(query, q_norm), _normed(key, k_norm)
        if rotary is not None:
            assert position_embeddings is not None
            rotary(query.view(heads), key.view(heads), *position_embeddings)
        if normed_last:
            query, key = _normed(query, q_norm), _normed(key, k_norm)
        query, key, value = query.view(heads), key.view(heads), value.view(heads)
        attended = attention_step.attend(attention.layer, query, key, value, attention.options)
        return output(attended.view(1, num_tokens, -1)), None

    return forward


def _normed(x: Tensor, norm: Any) -> Tensor:
    """x [..., heads * head_dim], each head or the whole row normed, as the norm's weight is: [n] or [heads, n]."""
    if norm is None:
        return x
    *heads, n = norm.weight.shape
    y: Tensor = norm.forward(x.unflatten(-1, (*heads, n) if heads else (-1, n)))
    return y


def _first(module: nn.Module, *names: str) -> Any:
    """The first of these that the module has."""
    found = (getattr(module, name, None) for name in names)
    return next((part for part in found if isinstance(part, nn.Module)), None)

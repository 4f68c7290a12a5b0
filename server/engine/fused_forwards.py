"""Fused forwards that a module's parts suggest: norms and feed-forwards here, attention and layers in files beside.

They are guesses: `fusion` tries each against what the module itself gave. Engine thread, once at start.
"""

from collections.abc import Callable, Collection, Iterator, Sequence
from functools import partial
from typing import Any

from torch import Tensor, nn

from server.engine.fused_attention import attentions
from server.engine.fused_layers import decoder_layers
from server.engine.recorded_forward import AttentionCall, Call, Forward
from server.kernels.native_fused import Activation, layer_norm, rms_norm

# Where activations come from that have nothing but their input.
_ACTIVATIONS = ("transformers.activations", "torch.nn.modules.activation")


def candidates(
    module: nn.Module,
    call: Call,
    children: Sequence[nn.Module],
    norms: Collection[nn.Module],
    attention: AttentionCall | None,
) -> Iterator[tuple[str, Forward]]:
    """The kinds of part that a module may be, each with the forward it would have.

    Args:
        children: the modules it calls, in the order of their calls.
        norms: modules that have a fused norm already.
        attention: the attention of the module's layer, if it has one.
    """
    parts = [child for child in children if not isinstance(child, nn.Dropout)]  # which do nothing here
    yield from _norms(module)
    yield from _feed_forwards(module, parts)
    if attention is not None:
        yield from attentions(module, call, attention)
    for layer in decoder_layers(module, _joined(parts), norms):
        yield "decoder layer", layer


def _norms(module: Any) -> Iterator[tuple[str, Forward]]:
    """With a weight or one more than it, as models have it, or without."""
    name = type(module).__name__
    weight, bias = (_vector(module, each) for each in ("weight", "bias"))
    weights = [None] if weight is None else [weight, (1 + weight).contiguous()]
    eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    for vector in weights:
        if name.endswith("RMSNorm") and vector is not None:
            yield "RMS norm", partial(rms_norm, weight=vector, eps=eps or 1e-6)
        elif name.endswith("LayerNorm"):
            yield "layer norm", partial(layer_norm, weight=vector, bias=bias, eps=eps or 1e-5)


def _vector(module: nn.Module, name: str) -> Tensor | None:
    vector = getattr(module, name, None)
    return vector.detach().float().contiguous() if isinstance(vector, Tensor) else None


def _feed_forwards(module: Any, parts: Sequence[nn.Module]) -> Iterator[tuple[str, Forward]]:
    activations = [activation for part in parts if (activation := _activation(part)) is not None]
    if len(activations) != 1:
        return
    (activation,) = activations
    if _has(module, "down_proj") and (gate_and_up := _gate_and_up(module)):
        yield "gated feed-forward", _gated(gate_and_up, activation, module.down_proj.forward)
    elif len(parts) == 3:
        yield "feed-forward", _plain(parts[0].forward, activation, parts[2].forward)


def _activation(module: nn.Module) -> Activation | None:
    """The native activation that computes what a module computes, by its values."""
    if type(module).__module__ not in _ACTIVATIONS or any(True for _ in module.parameters()):
        return None
    x = Activation.inputs(8001)[None]
    return Activation.that_gives(module.forward(x), x)


def _gate_and_up(module: Any) -> Callable[[Tensor], Sequence[Tensor]] | None:
    """x → gate, up [..., intermediate_size], of two layers or of one."""
    if _has(module, "gate_proj", "up_proj"):
        gate, up = module.gate_proj.forward, module.up_proj.forward
        return lambda x: (gate(x), up(x))
    if _has(module, "gate_up_proj"):
        both = module.gate_up_proj.forward
        return lambda x: both(x).chunk(2, dim=-1)
    return None


def _gated(gate_and_up: Callable[[Tensor], Sequence[Tensor]], activation: Activation, down: Forward) -> Forward:
    def forward(x: Tensor) -> Tensor:
        y: Tensor = down(activation(*gate_and_up(x)))
        return y

    return forward


def _plain(up: Forward, activation: Activation, down: Forward) -> Forward:
    def forward(x: Tensor) -> Tensor:
        y: Tensor = down(activation(up(x)))
        return y

    return forward


def _joined(parts: Sequence[nn.Module]) -> list[Forward]:
    """A layer's parts; a feed-forward whose own parts the layer calls itself is one of them."""
    for at in range(1, len(parts) - 1):
        if activation := _activation(parts[at]):
            feed_forward = _plain(parts[at - 1].forward, activation, parts[at + 1].forward)
            return [*parts[: at - 1], feed_forward, *parts[at + 2 :]]
    return list(parts)


def _has(module: nn.Module, *names: str) -> bool:
    return all(isinstance(getattr(module, name, None), nn.Module) for name in names)

"""Mixtures of experts by the kernels of linear layers, every expert packed. Engine thread, once at start.

Adapters have no part in them. Which tensors hold the experts' layers, and how, transformers'
`use_experts_implementation` says of every model's class alike.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from server.kernels import LinearGroup
from server.kernels.native_fused import Activation

MakeGroup = Callable[[Sequence[nn.Module], int], LinearGroup]  # see `Kernels.linear_group`


@torch.inference_mode()
def pack_experts(model: nn.Module, make_group: MakeGroup) -> int:
    """Packs the layers of all experts, in place of the model's own tensors; says how many mixtures have them."""
    mixtures = [module for module in model.modules() if _is_mixture(module)]
    for module in mixtures:
        module.forward = PackedExperts(module, make_group)
    return len(mixtures)


def _is_mixture(module: Any) -> bool:
    names = ("is_concatenated", "is_transposed", "has_bias", "has_gate", "has_post_expert_norm")
    return all(hasattr(module, name) for name in names) and module.has_gate and not module.has_post_expert_norm


class PackedExperts:
    """The forward of a mixture's experts. A token's experts are summed in the order of its router's choice."""

    def __init__(self, module: Any, make_group: MakeGroup) -> None:
        """Takes the weights out of the module."""
        self._activation = _activation(module)
        takes_turns = self._activation is not None and not module.is_concatenated
        self._gate_and_up = _take(module, "gate_up_proj", make_group, halves=takes_turns)
        self._down = _take(module, "down_proj", make_group)
        self._own_gate: Callable[[Tensor], Tensor] = module._apply_gate

    def __call__(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """
        Args:
            hidden_states: [num_tokens, hidden_size].
            top_k_index: the experts of each token, [num_tokens, top_k].
            top_k_weights: their shares, of the same shape.
        """
        num_tokens, top_k = top_k_index.shape
        order = top_k_index.flatten().argsort(stable=True)
        x, chosen = hidden_states[order // top_k], top_k_index.flatten().bincount(minlength=len(self._down)).tolist()
        outputs = []
        for expert, rows in enumerate(x.split(chosen)):
            if len(rows):
                (both,) = self._gate_and_up[expert](rows, ())
                outputs += self._down[expert](self._gated(both), ())
        y = torch.empty(len(order), hidden_states.shape[1])
        y[order] = torch.cat(outputs)
        y = y.view(num_tokens, top_k, -1) * top_k_weights[..., None]
        total = y[:, 0]
        for nth in range(1, top_k):
            total = total + y[:, nth]
        return total

    def _gated(self, both: Tensor) -> Tensor:
        """Gate and up [num_rows, 2 * size] → [num_rows, size]."""
        return self._own_gate(both) if self._activation is None else self._activation(*both.chunk(2, dim=-1))


def _take(module: Any, name: str, make_group: MakeGroup, *, halves: bool = False) -> list[LinearGroup]:
    """The layers of that name, one for each expert, whose weights the module no longer has.

    Args:
        halves: outputs that took turns lie in two halves.
    """
    weights, biases = getattr(module, name), getattr(module, f"{name}_bias", None)
    delattr(module, name)
    groups = []
    for expert, weight in enumerate(weights):
        weight = weight.T if module.is_transposed else weight
        bias = None if biases is None else biases[expert]
        if halves:
            weight, bias = (None if rows is None else torch.cat([rows[::2], rows[1::2]]) for rows in (weight, bias))
        groups.append(make_group([frozen_layer(weight, bias)], 0))
    return groups


def frozen_layer(weight: Tensor, bias: Tensor | None = None) -> nn.Linear:
    """A linear layer of weight [out_features, in_features] and bias [out_features]."""
    layer = nn.Linear(1, 1, bias=False)
    layer.weight = nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        layer.bias = nn.Parameter(bias, requires_grad=False)
    return layer


def _activation(module: Any) -> Activation | None:
    """The native activation that computes what the module's gate computes, by its values."""
    x = Activation.inputs(129)
    gate, up = (part.reshape(-1, 1) for part in torch.meshgrid(x, x, indexing="ij"))
    return Activation.that_gives(module._apply_gate(torch.cat([gate, up], dim=1)), gate, up)

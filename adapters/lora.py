"""Low-rank adaptation of linear layers, for training.

A layer `y = W x`, with `W` of shape [out, in], is frozen and gets a bypass of two narrow maps, which alone learn:

    y = W x + s · B A x        A [rank, in]    B [out, rank]    s = alpha / rank, or alpha / √rank for rsLoRA

`A` starts Gaussian and `B` at zero. So the layer starts out as the base, yet has gradients: with both at zero neither
would ever move. After training `W + s · B A` is one plain matrix again, which is what `merge` makes.

Sources: Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models" (arXiv:2106.09685); Kalajdzievski 2023,
"A Rank Stabilization Scaling Factor for Fine-Tuning with LoRA" (arXiv:2312.03732).
"""

import math
import re
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from adapters.format import LoRAWeights

ALL_LINEAR = "all-linear"

Target = str | re.Pattern[str] | type[nn.Module]
Targets = Target | Sequence[Target]


class LoRALinear(nn.Module):
    """A frozen linear layer and its trainable bypass.

    Args:
        base: the layer to adapt: `nn.Linear`, or transformers' `Conv1D`, whose weight is [in, out].
        generator: source of the initial `A`, on the CPU.
    """

    def __init__(
        self,
        base: nn.Linear | Conv1D,
        *,
        rank: int,
        alpha: float,
        dropout: float = 0.0,
        rslora: bool = False,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        self.transposed = isinstance(base, Conv1D)
        out_features, in_features = reversed(base.weight.shape) if self.transposed else base.weight.shape
        self.base = base.requires_grad_(False)
        self.dropout = nn.Dropout(dropout) if dropout else nn.Identity()
        # The bypass is float32 whatever the base is: an optimizer's small steps are lost in half precision.
        self.lora_a = nn.Linear(in_features, rank, bias=False, dtype=torch.float32)
        self.lora_b = nn.Linear(rank, out_features, bias=False, dtype=torch.float32)
        nn.init.normal_(self.lora_a.weight, std=1 / rank, generator=generator)
        nn.init.zeros_(self.lora_b.weight)
        self.to(base.weight.device).train(base.training)
        self.scaling = alpha / (math.sqrt(rank) if rslora else rank)
        self._pristine: tuple[Tensor] | None = None  # in a tuple, where nn.Module does not see a second parameter

    @property
    def merged(self) -> bool:
        return self._pristine is not None

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] to [..., out]."""
        y: Tensor = self.base(x)
        return y if self.merged else self.add_bypass(y, x)

    def add_bypass(self, y: Tensor, x: Tensor) -> Tensor:
        """y + s · B A x"""
        narrow: Tensor = self.lora_a(self.dropout(x.to(self.lora_a.weight.dtype)))
        bypass: Tensor = self.lora_b(self.scaling * narrow)  # scaled where there is least of it
        return y + bypass.to(y.dtype)

    @torch.no_grad()
    def delta_weight(self) -> Tensor:
        """`s · B A` in float32, in the layout of the base's weight."""
        delta = self.scaling * (self.lora_b.weight @ self.lora_a.weight)
        return delta.T if self.transposed else delta

    @torch.no_grad()
    def merge(self) -> None:
        """Puts `W + s · B A` in the place of `W`; nothing happens if that has been done.

        `W` itself is set aside, not changed: it may be shared with another layer, as tied embeddings are.
        """
        if not self.merged:
            weight = self.base.weight
            self._pristine = (weight,)
            self.base.weight = nn.Parameter((weight + self.delta_weight()).to(weight.dtype), requires_grad=False)

    def unmerge(self) -> None:
        """Puts `W` back, bit for bit; nothing happens if it is there."""
        if self._pristine is not None:
            (self.base.weight,) = self._pristine
            self._pristine = None

    def weights(self) -> LoRAWeights:
        return LoRAWeights(self.lora_a.weight.detach(), self.lora_b.weight.detach(), self.scaling)


def inject_lora(
    model: nn.Module,
    targets: Targets,
    *,
    rank: int,
    alpha: float,
    dropout: float = 0.0,
    rslora: bool = False,
    generator: torch.Generator | None = None,
) -> dict[str, LoRALinear]:
    """Replaces the targeted linear layers of any model, in place, and freezes everything else.

    A target is a layer class, a compiled pattern for the whole module path, a module path or its end (`"q_proj"`,
    `"self_attn.q_proj"`), or `"all-linear"`: every linear layer but the output head.

    Returns:
        The new layers by module path, in the model's order.

    Raises:
        ValueError: a target matches no linear layer, or the model has been injected before.
    """
    if any(isinstance(module, LoRALinear) for module in model.modules()):
        raise ValueError("the model has LoRA layers already")
    linear_layers = {name: module for name, module in model.named_modules() if name and _is_linear(module)}
    head = model.get_output_embeddings() if isinstance(model, PreTrainedModel) else None
    chosen: set[str] = set()
    for target in [targets] if isinstance(targets, str | re.Pattern | type) else targets:
        matching = {name for name, module in linear_layers.items() if _matches(target, name, module, head)}
        if not matching:
            ends = sorted({name.rpartition(".")[2] for name in linear_layers})
            raise ValueError(f"target {_describe(target)} matches no linear layer; their names end in {ends}")
        chosen |= matching
    model.requires_grad_(False)
    layers: dict[str, LoRALinear] = {}
    for name in filter(chosen.__contains__, linear_layers):
        parent, _, child = name.rpartition(".")
        layers[name] = LoRALinear(
            linear_layers[name], rank=rank, alpha=alpha, dropout=dropout, rslora=rslora, generator=generator
        )
        setattr(model.get_submodule(parent), child, layers[name])
    return layers


def remove_lora(model: nn.Module, layers: Mapping[str, LoRALinear]) -> None:
    """Puts the frozen layers back in the place of those that `inject_lora` gave."""
    for name, layer in layers.items():
        model.set_submodule(name, layer.base)


def target_modules(model: nn.Module, layers: Mapping[str, LoRALinear]) -> tuple[str, ...]:
    """What to write as an adapter's target modules: the last names of `layers` where they select these layers and no
    other module of `model`, else the full paths."""
    ends = {name.rpartition(".")[2] for name in layers}
    inside = tuple(f"{name}." for name in layers)
    reached = {
        name for name, _ in model.named_modules() if name.rpartition(".")[2] in ends and not name.startswith(inside)
    }
    return tuple(sorted(ends)) if reached == layers.keys() else tuple(layers)


def trainable_share(model: nn.Module) -> tuple[int, int]:
    """Number of parameters that train, and of all; shared ones count once."""
    sizes = [(parameter.numel(), parameter.requires_grad) for parameter in model.parameters()]
    return sum(size for size, trains in sizes if trains), sum(size for size, _ in sizes)


def _is_linear(module: nn.Module) -> bool:
    # nn.MultiheadAttention reads the weight of its output layer instead of calling it: a bypass there would be ignored.
    return isinstance(module, nn.Linear | Conv1D) and not isinstance(module, NonDynamicallyQuantizableLinear)


def _matches(target: Target, name: str, module: nn.Module, head: nn.Module | None) -> bool:
    if isinstance(target, type):
        return isinstance(module, target)
    if isinstance(target, re.Pattern):
        return target.fullmatch(name) is not None
    if target == ALL_LINEAR:
        return module is not head
    return name == target or name.endswith(f".{target}")


def _describe(target: Target) -> str:
    return target.__name__ if isinstance(target, type) else repr(target)

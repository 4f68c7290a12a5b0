"""The operations of a step that Loraplex brings itself: their interface, and what passes through it.

`torch_ops` is the plain reference and runs everywhere; `cpu` is the native one, `onednn` what a CPU without it has.
`server.device` chooses.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple, Protocol

import torch
from torch import Tensor, nn

Storage = Literal["float32", "bfloat16", "int8"]


class Segment(NamedTuple):
    """Rows `start` to `end` (not included) of a step take the bypass of adapter slot `slot`, times `scale`."""

    slot: int
    start: int
    end: int
    scale: float = 1.0


Pass = Sequence[Segment]  # disjoint segments


@dataclass(frozen=True, slots=True)
class LayerWeights:
    """One layer's part of an adapter, as the kernels take it; without the extras `y += scaling · x · lora_aᵀ · lora_b`.

    With them, for the layer's own output y:

        y = gain ⊙ (y + scaling · (x · lora_aᵀ) · lora_b) + bias
    """

    lora_a: Tensor  # [rank, in_features]; the rank may be 0
    lora_b: Tensor  # [rank, out_features]: PEFT's B transposed, so that both are read along their rows
    scaling: float
    gain: Tensor | None = None  # [out_features] float32: DoRA's magnitudes over norms; None: ones
    bias: Tensor | None = None  # [out_features] float32; None: zeros

    @property
    def changes_weight(self) -> bool:
        """Whether a layer into which these weights are merged has another weight than before: a bias alone does not."""
        return len(self.lora_a) > 0 or self.gain is not None

    def tensors(self) -> Iterator[Tensor]:
        for tensor in (self.lora_a, self.lora_b, self.gain, self.bias):
            if tensor is not None:
                yield tensor

    def inverse(self) -> "LayerWeights":
        """Weights that give the layer's own output y back from y' of these, when they follow with a factor of −1:

        y = 1 / gain ⊙ (y' − scaling · (x · lora_aᵀ) · (gain ⊙ lora_b)) − bias / gain
        """
        if self.gain is None:
            return replace(self, bias=None if self.bias is None else -self.bias)
        bias = None if self.bias is None else -self.bias / self.gain
        return LayerWeights(self.lora_a.float(), self.lora_b.float() * self.gain, self.scaling, 1 / self.gain, bias)

    def merged_bias(self, own: Tensor | None) -> Tensor | None:
        """The bias of a layer into which these weights are merged, whose own is `own`."""
        if own is not None and self.gain is not None:
            own = self.gain * own
        if own is None or self.bias is None:
            return self.bias if own is None else own
        return own + self.bias

    def to(self, device: torch.device) -> "LayerWeights":
        extras = [None if extra is None else extra.to(device, non_blocking=True) for extra in (self.gain, self.bias)]
        lora_a, lora_b = (factor.to(device, non_blocking=True) for factor in (self.lora_a, self.lora_b))
        return LayerWeights(lora_a, lora_b, self.scaling, *extras)


class LinearGroup(Protocol):
    """Frozen linear layers that read the same input, each with a bypass per adapter slot."""

    def set_slot(self, layer: int, slot: int, weights: LayerWeights | None) -> None:
        """Fills or empties a slot of the group's n-th layer."""

    def merge(self, weights: Sequence[LayerWeights | None]) -> int:
        """Computes with the layers' outputs as `LayerWeights` has them from here on, for each layer that has weights.

        The base's own weights are never written: the sums lie beside them. Returns their size in bytes.
        """

    def unmerge(self) -> None:
        """Computes with the base's own weights again."""

    def __call__(self, x: Tensor, passes: Sequence[Any]) -> list[Tensor]:
        """Every layer's output [..., out_features] for x [..., in_features]: base, plus the bypass within segments.

        First y = base(x), then in every pass, for each of its segments `(s, start, end, scale)` and each layer whose
        slot s holds weights, of the rows start to end:

            y = gain ⊙ (y + scale · scaling · (x @ lora_aᵀ) @ lora_b) + bias

        A pass comes from `Kernels.prepare_segments`; within one, segments are disjoint. A row that takes several
        bypasses has them in the order of the passes.
        """

    def base_rows(self, layer: int, start: int, end: int) -> Tensor:
        """Rows of the n-th layer's weight [out_features, in_features], in float32 as it multiplies; from any thread."""

    def base_bias(self, layer: int) -> Tensor | None:
        """The n-th layer's bias [out_features] in float32; from any thread."""


class EmbeddingBypass(Protocol):
    """What adapters add to the output of a frozen embedding, by slot."""

    def set_slot(self, slot: int, weights: LayerWeights | None) -> None:
        """Fills or empties a slot; `lora_a` is [rank, num_tokens of the vocabulary]."""

    def __call__(self, y: Tensor, token_ids: Tensor, segments: Any) -> None:
        """One pass over y [num_tokens, hidden_size], the embeddings of token_ids [num_tokens], in place.

        Rows of a segment `(s, start, end, scale)` whose slot s holds weights become

            y = gain ⊙ (y + scale · scaling · lora_a[:, token_ids]ᵀ @ lora_b) + bias
        """


class FixedSegments(Protocol):
    """A prepared pass in memory that stays, for captured CUDA graphs to read."""

    def write(self, segments: Sequence[Segment]) -> None:
        """Puts other segments in place of those that are there."""


@dataclass(frozen=True, slots=True)
class Kernels:
    """One implementation of every operation."""

    name: str
    linear_group: Callable[[Sequence[nn.Module], int], LinearGroup]  # frozen layers, number of slots
    prepare_segments: Callable[[Sequence[Segment]], Any]  # one pass, made once a step for all its groups
    embedding_bypass: Callable[[int, int, int], EmbeddingBypass]  # sizes of vocabulary and rows, number of slots
    groups_layers: bool  # whether layers that share their input are better computed in one call
    keep_passes: Callable[[Sequence[Any]], Sequence[Any]] = tuple  # a step's prepared passes, for all its groups
    no_merge: str = ""  # why no adapter can be added to the weights; empty: it can
    storage: torch.dtype | None = None  # what linear_group rounds weights to; None: their own dtype
    # An embedding that shares the group's weight, whose rows it multiplies by the number.
    tied_embedding: Callable[[LinearGroup, float], nn.Module] | None = None
    pack: Callable[[nn.Module], nn.Module] | None = None  # a layer in the form that a group likes best, alone in memory
    fixed_segments: Callable[[int], FixedSegments] | None = None  # of as many rows; None: a graph cannot hold them

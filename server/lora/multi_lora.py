"""The modules that stand in a model where adapters may be: linear layers and the embedding. Engine thread only."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from adapters.tensors import LinearShape
from server.kernels import Kernels, LayerWeights, LinearGroup, Segment


class Rows:
    """The running step's passes, as the kernels want them; shared by layers that see the same rows."""

    def __init__(self, passes: Sequence[Any]) -> None:
        self.passes = passes


class SharedInput:
    """Layers that read one input, computed together when the first of them is called."""

    def __init__(self, kernel: LinearGroup, size: int, rows: Rows) -> None:
        self._kernel = kernel
        self._size = size
        self._rows = rows
        self._x: Tensor | None = None
        self._outputs: dict[int, Tensor] = {}  # that nobody has asked for yet

    def output(self, index: int, x: Tensor) -> Tensor:
        if self._size == 1:
            return self._kernel(x, self._rows.passes)[0]
        if x is not self._x or index not in self._outputs:
            self._x, self._outputs = x, dict(enumerate(self._kernel(x, self._rows.passes)))
        y = self._outputs.pop(index)
        if not self._outputs:
            self._x = None
        return y


class MultiLoRALinear(nn.Module):
    """A frozen linear layer beside one LoRA bypass per adapter slot: `y = base(x) + scaling_s · B_s A_s x`, per token.

    See `LinearGroup` for what else an adapter may do to y.

    A batch without adapters costs what the base layer costs.
    """

    def __init__(self, shared: SharedInput, index: int) -> None:
        super().__init__()
        self._shared = shared
        self._index = index

    def forward(self, x: Tensor) -> Tensor:
        return self._shared.output(self._index, x)


class MultiLoRAEmbedding(nn.Module):
    """The frozen embedding beside one LoRA bypass per adapter slot."""

    def __init__(self, base: nn.Module, shape: LinearShape, num_slots: int, kernels: Kernels, rows: Rows) -> None:
        super().__init__()
        self._base = base
        self._merged_slot = num_slots  # of one more, beyond the others
        self._bypass = kernels.embedding_bypass(shape.in_features, shape.out_features, num_slots + 1)
        self._prepare = kernels.prepare_segments
        self._is_merged = False
        self._rows = rows
        self._scale = embed_scale(base)

    def set_slot(self, slot: int, weights: LayerWeights | None) -> None:
        if weights is not None:
            weights = replace(weights, scaling=weights.scaling * self._scale)
        self._bypass.set_slot(slot, weights)

    def merge(self, weights: LayerWeights | None) -> None:
        """Every token takes these weights first from here on: a sum of whole tables would save no matrix product."""
        self.set_slot(self._merged_slot, weights)
        self._is_merged = weights is not None

    def forward(self, token_ids: Tensor) -> Tensor:
        """[1, num_tokens] ids → [1, num_tokens, hidden_size]."""
        y: Tensor = self._base(token_ids)
        if self._is_merged:
            everybody = Segment(self._merged_slot, 0, token_ids.shape[1])
            self._bypass(y[0], token_ids[0], self._prepare([everybody]))
        for segments in self._rows.passes:
            self._bypass(y[0], token_ids[0], segments)
        return y


def embed_scale(embedding: nn.Module) -> float:
    """What an embedding multiplies its rows by."""
    return float(getattr(embedding, "embed_scale", 1.0))

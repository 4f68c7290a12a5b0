"""The layers that serve many adapters at once, and what is in their slots. Engine thread only."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from adapters.tensors import LinearShape
from server.errors import MergeRefused
from server.kernels import FixedSegments, Kernels, LayerWeights, LinearGroup, Pass, Segment
from server.lora.adapter import Adapter
from server.lora.base_weights import BaseWeights


class _Rows:
    """The running step's passes, as the kernels want them; shared by layers that see the same rows."""

    def __init__(self, passes: Sequence[Any]) -> None:
        self.passes = passes


class _SharedInput:
    """Layers that read one input, computed together when the first of them is called."""

    def __init__(self, kernel: LinearGroup, size: int, rows: _Rows) -> None:
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

    def __init__(self, shared: _SharedInput, index: int) -> None:
        super().__init__()
        self._shared = shared
        self._index = index

    def forward(self, x: Tensor) -> Tensor:
        return self._shared.output(self._index, x)


class MultiLoRAEmbedding(nn.Module):
    """The frozen embedding beside one LoRA bypass per adapter slot."""

    def __init__(self, base: nn.Module, shape: LinearShape, num_slots: int, kernels: Kernels, rows: _Rows) -> None:
        super().__init__()
        self._base = base
        self._merged_slot = num_slots  # of one more, beyond the others
        self._bypass = kernels.embedding_bypass(shape.in_features, shape.out_features, num_slots + 1)
        self._prepare = kernels.prepare_segments
        self._is_merged = False
        self._rows = rows
        self._scale = _scale(base)

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


class LoRALayers:
    """Owns every layer that adapters may target, by the module path that adapters use."""

    def __init__(
        self,
        model: PreTrainedModel,
        shapes: Mapping[str, LinearShape],
        groups: Sequence[Sequence[str]],
        head: str,
        num_slots: int,
        kernels: Kernels,
    ) -> None:
        """Puts a `MultiLoRALinear` in place of each linear layer, a `MultiLoRAEmbedding` in place of the embedding.

        Args:
            shapes: the layers' sizes by module path.
            groups: module paths of the linear layers, those together that read the same input.
            head: the layer that makes the logits; its rows are the sampled ones.
        """
        self.kernels_name = kernels.name
        self.merged: Adapter | None = None
        self.merged_bytes = 0
        self.merged_slot = num_slots  # beyond the others: holds what tokens of other adapters take away again
        self.no_merge = kernels.no_merge
        self.prepare = kernels.prepare_segments
        self._fixed_segments = kernels.fixed_segments
        self._device = next(model.parameters()).device
        self._keep_passes = kernels.keep_passes
        self._no_passes = self._keep_passes(())
        self._tokens, self._logits = _Rows(self._no_passes), _Rows(self._no_passes)
        self.groups: list[tuple[Sequence[str], LinearGroup]] = []
        self.base_weights = BaseWeights(shapes, kernels.storage or model.dtype)
        embedding = model.get_input_embeddings()
        embedding_rows: Callable[[int, int], Tensor] = partial(_rows, embedding)
        tied = shapes[head].kind == "tied head"
        parts = groups if kernels.groups_layers else [[name] for group in groups for name in group]
        for names in parts:
            layers = [model.get_submodule(name) for name in names]
            if kernels.pack and not (tied and names == [head]):  # the embedding keeps a tied weight: no second copy
                layers = [kernels.pack(layer) for layer in layers]
            kernel = kernels.linear_group(layers, num_slots + 1)
            shared = _SharedInput(kernel, len(names), self._logits if names == [head] else self._tokens)
            for index, name in enumerate(names):
                _replace(model, name, MultiLoRALinear(shared, index))
                self.base_weights.add(name, partial(kernel.base_rows, index), kernel.base_bias(index))
            self.groups.append((names, kernel))
            scales = hasattr(embedding, "embed_scale")
            if names == [head] and tied and kernels.tied_embedding and (scales or type(embedding) is nn.Embedding):
                model.set_input_embeddings(kernels.tied_embedding(kernel, _scale(embedding)))
                embedding_rows = partial(kernel.base_rows, 0)
        self._embeddings: dict[str, MultiLoRAEmbedding] = {}
        for name, shape in shapes.items():
            if shape.kind == "embedding":
                base = model.get_input_embeddings()
                self._embeddings[name] = MultiLoRAEmbedding(base, shape, num_slots + 1, kernels, self._tokens)
                _replace(model, name, self._embeddings[name])
                self.base_weights.add(name, embedding_rows)

    def write(self, slot: int, adapter: Adapter | None) -> None:
        """Puts an adapter's weights into a slot, in place of whatever was there; None empties the slot.

        On the CPU the slot shares the host's tensors: a resident adapter is in memory once.
        """
        self._write(slot, self._weights_of(adapter))

    def _write(self, slot: int, weights: Mapping[str, LayerWeights]) -> None:
        for names, kernel in self.groups:
            for index, name in enumerate(names):
                kernel.set_slot(index, slot, weights.get(name))
        for name, embedding in self._embeddings.items():
            embedding.set_slot(slot, weights.get(name))

    def _weights_of(self, adapter: Adapter | None) -> dict[str, LayerWeights]:
        """By module path, on the device."""
        return {name: layer.to(self._device) for name, layer in adapter.weights.items()} if adapter is not None else {}

    def merge(self, adapter: Adapter | None) -> None:
        """Adds an adapter to the base's weights, in place of one that is merged; None: the base as it was.

        Tokens of everybody else take the bypass of `merged_slot` with a factor of −1.

        Raises:
            MergeRefused: these weights take no sum, or nobody else could be served. After any error nothing is merged.
        """
        if adapter is None:
            self._unmerge()
            return
        if reason := self.no_merge or adapter.no_merge:
            raise MergeRefused(f"adapter {adapter.name!r} cannot be merged: {reason}; it is served as a bypass")
        try:
            weights = self._weights_of(adapter)
            num_bytes = sum(kernel.merge([weights.get(name) for name in names]) for names, kernel in self.groups)
            for name, embedding in self._embeddings.items():
                embedding.merge(weights.get(name))
            self._write(self.merged_slot, {name: layer.inverse() for name, layer in weights.items()})
            self.merged, self.merged_bytes = adapter, num_bytes
        except BaseException:  # no memory, say: half of the layers must not stay behind
            self._unmerge()
            raise

    def _unmerge(self) -> None:
        for _, kernel in self.groups:
            kernel.unmerge()
        for embedding in self._embeddings.values():
            embedding.merge(None)
        self.merged, self.merged_bytes = None, 0
        self.write(self.merged_slot, None)

    def activate(self, passes: Sequence[Pass], logits_passes: Sequence[Pass]) -> AbstractContextManager[None]:
        """Within, every forward is a step whose tokens take the bypasses of `passes`, its logits `logits_passes`."""
        return self._active(self._prepared(passes), self._prepared(logits_passes))

    @property
    def passes(self) -> Sequence[Any]:
        """The running step's, over its tokens, as the kernels want them."""
        return self._tokens.passes

    def _prepared(self, passes: Sequence[Pass]) -> Sequence[Any]:
        return self._keep_passes([self.prepare(segments) for segments in passes])

    def fixed_segments(self, num_rows: int) -> FixedSegments:
        """Room on the device for one pass over so many rows."""
        assert self._fixed_segments is not None
        return self._fixed_segments(num_rows)

    def activate_fixed(self, segments: FixedSegments) -> AbstractContextManager[None]:
        """Within, every forward is a step of one pass, whose every token samples: the pass is what `segments` hold."""
        return self._active([segments], [segments])

    @contextmanager
    def _active(self, tokens: Sequence[Any], logits: Sequence[Any]) -> Iterator[None]:
        assert not self._tokens.passes, "a step is running already"
        self._tokens.passes, self._logits.passes = tokens, logits
        try:
            yield
        finally:
            self._tokens.passes = self._logits.passes = self._no_passes


def bytes_on_device(adapter: Adapter, device: torch.device) -> int:
    """What a slot holding the adapter takes of the device's memory, beyond the host's copy."""
    return 0 if device.type == "cpu" else adapter.num_bytes


def _replace(model: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, child = path.rpartition(".")
    setattr(model.get_submodule(parent), child, module)


def _scale(embedding: nn.Module) -> float:
    """What an embedding multiplies its rows by."""
    return float(getattr(embedding, "embed_scale", 1.0))


def _rows(embedding: nn.Module, start: int, end: int) -> Tensor:
    weight = embedding.weight
    assert isinstance(weight, Tensor)
    return weight[start:end].detach().float()

"""The layers that serve many adapters at once, and what is in their slots. Engine thread only."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from adapters.tensors import LinearShape
from server.errors import MergeRefused
from server.kernels import FixedSegments, Kernels, LayerWeights, LinearGroup, Pass
from server.lora.adapter import Adapter
from server.lora.base_weights import BaseWeights
from server.lora.merge_guard import MergeGuard
from server.lora.multi_lora import MultiLoRAEmbedding, MultiLoRALinear, Rows, SharedInput, embed_scale


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
        self.merged_bytes = 0  # that it takes because it is merged: sums, and what the slot beside them holds
        self.merged_slot = num_slots  # beyond the others: holds what tokens of other adapters take away again
        self.no_merge = kernels.no_merge
        self.prepare = kernels.prepare_segments
        self._fixed_segments = kernels.fixed_segments
        self._device = next(model.parameters()).device
        self._keep_passes = kernels.keep_passes
        self._no_passes = self._keep_passes(())
        self._tokens, self._logits = Rows(self._no_passes), Rows(self._no_passes)
        self.groups: list[tuple[Sequence[str], LinearGroup]] = []
        self.base_weights = BaseWeights(shapes, kernels.storage or model.dtype)
        self._guard = MergeGuard(self.base_weights)
        embedding = model.get_input_embeddings()
        embedding_rows: Callable[[int, int], Tensor] = partial(_rows, embedding)
        tied = shapes[head].kind == "tied head"
        parts = groups if kernels.groups_layers else [[name] for group in groups for name in group]
        for names in parts:
            layers = [model.get_submodule(name) for name in names]
            if kernels.pack and not (tied and names == [head]):  # the embedding keeps a tied weight: no second copy
                layers = [kernels.pack(layer) for layer in layers]
            kernel = kernels.linear_group(layers, num_slots + 1)
            shared = SharedInput(kernel, len(names), self._logits if names == [head] else self._tokens)
            for index, name in enumerate(names):
                _replace(model, name, MultiLoRALinear(shared, index))
                self.base_weights.add(name, partial(kernel.base_rows, index), kernel.base_bias(index))
            self.groups.append((names, kernel))
            scales = hasattr(embedding, "embed_scale")
            if names == [head] and tied and kernels.tied_embedding and (scales or type(embedding) is nn.Embedding):
                model.set_input_embeddings(kernels.tied_embedding(kernel, embed_scale(embedding)))
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

    def why_no_merge(self, adapter: Adapter) -> str:
        """The reason why an adapter cannot be merged; empty: it can."""
        return self.no_merge or self._guard.why_not(adapter)

    def merge(self, adapter: Adapter | None) -> None:
        """Adds an adapter to the base's weights, in place of one that is merged; None: the base as it was.

        Tokens of everybody else take the bypass of `merged_slot` with a factor of −1.

        Raises:
            MergeRefused: these weights take no sum, or nobody else could be served; what was merged stays. After any
                other error nothing is merged.
        """
        if adapter is None:
            self._unmerge()
            return
        if reason := self.why_no_merge(adapter):
            raise MergeRefused(f"adapter {adapter.name!r} cannot be merged: {reason}; it is served as a bypass")
        try:
            weights = self._weights_of(adapter)
            num_bytes = sum(kernel.merge([weights.get(name) for name in names]) for names, kernel in self.groups)
            for name, embedding in self._embeddings.items():
                embedding.merge(weights.get(name))
            inverse = {name: layer.inverse() for name, layer in weights.items()}
            self._write(self.merged_slot, inverse)
            self.merged, self.merged_bytes = adapter, num_bytes + _bytes_besides(adapter.weights, inverse)
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


def _bytes_besides(weights: Mapping[str, LayerWeights], others: Mapping[str, LayerWeights]) -> int:
    """Of the tensors in `others` that are not those of `weights`."""
    known = {tensor.data_ptr() for layer in weights.values() for tensor in layer.tensors()}
    return sum(
        tensor.nbytes for layer in others.values() for tensor in layer.tensors() if tensor.data_ptr() not in known
    )


def _replace(model: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, child = path.rpartition(".")
    setattr(model.get_submodule(parent), child, module)


def _rows(embedding: nn.Module, start: int, end: int) -> Tensor:
    weight = embedding.weight
    assert isinstance(weight, Tensor)
    return weight[start:end].detach().float()

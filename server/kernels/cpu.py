"""The native CPU kernels as `LinearGroup`s: weights packed once, adapters read where they lie in host memory."""

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from server.kernels import Kernels, LayerWeights, LinearGroup, Storage, native, native_linear, native_lora
from server.kernels.memory import Arena

_NO_PASSES = native_lora.Passes(())  # a recorded call holds its address


class CpuLinearGroup:
    """Packs its layers into `arena`, their own weights can go after that; bit-identical rows in any batch."""

    def __init__(self, storage: Storage, arena: Arena, layers: Sequence[nn.Module], num_slots: int) -> None:
        packed = [_pack(layer, storage, arena) for layer in layers]
        self._base = native_linear.LinearGroup(packed)
        self._slots = [native_lora.LoRASlots(layer.in_features, layer.out_features, num_slots) for layer in packed]
        self._group = native_lora.AdaptedGroup(self._base, native_lora.LoRAGroup(self._slots))

    @property
    def packed(self) -> Sequence[native_linear.PackedLinear]:
        return self._base.layers

    def set_slot(self, layer: int, slot: int, weights: LayerWeights | None) -> None:
        _fill(self._slots[layer], slot, weights)

    def base_rows(self, layer: int, start: int, end: int) -> Tensor:
        return self._base.layers[layer].unpack(start, end)

    def base_bias(self, layer: int) -> Tensor | None:
        return self._base.layers[layer].own_bias

    def merge(self, weights: Sequence[LayerWeights | None]) -> int:
        layers, num_bytes = list(self._base.layers), 0
        for index, (base, current, lora) in enumerate(
            zip(self._base.layers, self._group.linear.layers, weights, strict=True)
        ):
            if lora is not None:
                memory = current.data if current.data is not base.data else None  # of the last sum
                layers[index] = merged = base.merged(lora, out=memory)
                num_bytes += merged.data.nbytes if merged.data is not base.data else 0
        self._group.compute_with(native_linear.LinearGroup(layers))
        return num_bytes

    def unmerge(self) -> None:
        self._group.compute_with(self._base)

    def __call__(self, x: Tensor, passes: Sequence[native_lora.Segments]) -> list[Tensor]:
        if not isinstance(passes, native_lora.Passes):
            passes = native_lora.Passes(passes) if passes else _NO_PASSES
        return self._group(x, passes)


class CpuEmbeddingBypass:
    """Adapters of the embedding, read where they lie in host memory; bit-identical rows in any batch."""

    def __init__(self, vocab_size: int, hidden_size: int, num_slots: int) -> None:
        self._slots = native_lora.LoRASlots(vocab_size, hidden_size, num_slots)

    def set_slot(self, slot: int, weights: LayerWeights | None) -> None:
        _fill(self._slots, slot, weights)

    def __call__(self, y: Tensor, token_ids: Tensor, segments: native_lora.Segments) -> None:
        native_lora.add_embedding_lora(y, token_ids, self._slots, segments)


class PackedEmbedding(nn.Module):
    """The embedding of a model whose head has the same weight: reads its rows from the packed head.

    Some models' embeddings multiply their rows, by `embed_scale`.
    """

    def __init__(self, packed: native_linear.PackedLinear, embed_scale: float) -> None:
        super().__init__()
        self._packed = packed
        self.embed_scale = embed_scale

    def forward(self, token_ids: Tensor) -> Tensor:
        """[...] ids → [..., hidden_size] in float32."""
        rows = self._packed.rows(token_ids)
        return rows if self.embed_scale == 1 else rows * self.embed_scale


def cpu_kernels(storage: Storage) -> Kernels:
    return Kernels(
        f"native {native.isa()}",
        partial(CpuLinearGroup, storage, Arena()),
        native_lora.Segments,
        CpuEmbeddingBypass,
        keep_passes=native_lora.Passes,
        groups_layers=True,
        no_merge="the base is quantized (--quantization int8)" if storage == "int8" else "",
        storage=getattr(torch, storage),
        tied_embedding=_tied_embedding,
    )


def _fill(slots: native_lora.LoRASlots, slot: int, weights: LayerWeights | None) -> None:
    if weights is None:
        slots.clear(slot)
    else:
        slots.set(slot, weights)


def _tied_embedding(head: LinearGroup, embed_scale: float) -> nn.Module:
    assert isinstance(head, CpuLinearGroup)
    return PackedEmbedding(head.packed[0], embed_scale)


def _pack(layer: nn.Module, storage: Storage, arena: Arena) -> native_linear.PackedLinear:
    weight, bias = layer.weight, layer.bias
    assert isinstance(weight, Tensor)
    assert bias is None or isinstance(bias, Tensor)
    return native_linear.pack_linear(weight.T if isinstance(layer, Conv1D) else weight, bias, storage, arena)

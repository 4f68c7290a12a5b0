"""The native CPU kernels as `LinearGroup`s: weights packed once, adapters read where they lie in host memory."""

from collections.abc import Sequence
from functools import partial

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from server.kernels import Kernels, LayerWeights, LinearGroup, Storage, native
from server.kernels.memory import Arena


class CpuLinearGroup:
    """Packs its layers into `arena`, their own weights can go after that; bit-identical rows in any batch."""

    def __init__(self, storage: Storage, arena: Arena, layers: Sequence[nn.Module], num_slots: int) -> None:
        packed = [_pack(layer, storage, arena) for layer in layers]
        self._base = self._linear = native.LinearGroup(packed)
        self._slots = [native.LoRASlots(layer.in_features, layer.out_features, num_slots) for layer in packed]
        self._lora = native.LoRAGroup(self._slots)

    @property
    def packed(self) -> Sequence[native.PackedLinear]:
        return self._base.layers

    def set_slot(self, layer: int, slot: int, weights: LayerWeights | None) -> None:
        if weights is None:
            self._slots[layer].clear(slot)
        else:
            self._slots[layer].set(slot, weights.lora_a, weights.lora_b, weights.scaling)

    def merge(self, weights: Sequence[LayerWeights | None]) -> int:
        layers, num_bytes = list(self._base.layers), 0
        for index, (current, lora) in enumerate(zip(self._linear.layers, weights, strict=True)):
            if lora is not None:
                memory = current.data if current is not layers[index] else None
                layers[index] = layers[index].merged(lora.lora_a, lora.lora_b, lora.scaling, out=memory)
                num_bytes += layers[index].data.nbytes
        self._linear = native.LinearGroup(layers)
        return num_bytes

    def unmerge(self) -> None:
        self._linear = self._base

    def __call__(self, x: Tensor, passes: Sequence[native.Segments]) -> list[Tensor]:
        outputs = native.linear_many(x, self._linear)
        for segments in passes:
            native.add_lora(outputs, x, self._lora, segments)
        return outputs


class PackedEmbedding(nn.Module):
    """The embedding of a model whose head has the same weight: reads its rows from the packed head."""

    def __init__(self, packed: native.PackedLinear) -> None:
        super().__init__()
        self._packed = packed

    def forward(self, token_ids: Tensor) -> Tensor:
        """[...] ids → [..., hidden_size] in float32."""
        return self._packed.rows(token_ids)


def cpu_kernels(storage: Storage) -> Kernels:
    return Kernels(
        f"native {native.isa()}",
        partial(CpuLinearGroup, storage, Arena()),
        native.Segments,
        groups_layers=True,
        no_merge="the base is quantized (--quantization int8)" if storage == "int8" else "",
        tied_embedding=_tied_embedding,
    )


def _tied_embedding(head: LinearGroup) -> nn.Module:
    assert isinstance(head, CpuLinearGroup)
    return PackedEmbedding(head.packed[0])


def _pack(layer: nn.Module, storage: Storage, arena: Arena) -> native.PackedLinear:
    weight, bias = layer.weight, layer.bias
    assert isinstance(weight, Tensor)
    assert bias is None or isinstance(bias, Tensor)
    return native.pack_linear(weight.T if isinstance(layer, Conv1D) else weight, bias, storage, arena)

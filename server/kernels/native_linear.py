"""Frozen linear layers as the native CPU kernels want them: weights packed once, layers of one input together."""

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from server.kernels import LayerWeights, Storage
from server.kernels.memory import Arena, lazy_zeros
from server.kernels.native import INT, PANEL, POINTER, pointer

_KINDS = {torch.float32: 0, torch.bfloat16: 4, torch.int8: 3}
_STORAGE: dict[Storage, torch.dtype] = {"float32": torch.float32, "bfloat16": torch.bfloat16, "int8": torch.int8}


class _LinearStruct(ctypes.Structure):
    _fields_ = (
        ("data", POINTER),
        ("scale", POINTER),
        ("bias", POINTER),
        ("in_features", INT),
        ("out_features", INT),
        ("kind", INT),
    )


class PackedLinear:
    """A frozen weight [out, in] (and bias [out]) as panels [ceil(out / 16), in, 16]; int8 with one scale per output.

    bfloat16 lies in pairs of input features, [ceil(out / 16), ceil(in / 2), 16, 2].
    """

    def __init__(
        self, data: Tensor, scale: Tensor | None, bias: Tensor | None, in_features: int, out_features: int
    ) -> None:
        assert data.is_contiguous()
        self.data, self.scale, self.bias = data, scale, bias
        self.in_features, self.out_features = in_features, out_features
        self.struct = _LinearStruct(
            data.data_ptr(), pointer(scale), pointer(bias), in_features, out_features, _KINDS[data.dtype]
        )

    def _panels(self, first: int = 0, end: int | None = None) -> Tensor:
        """Panels `first` to `end`, [n, in, 16]: a view of the data, or a copy of what lies in pairs."""
        data = self.data[first:end]
        if data.dtype != torch.bfloat16:
            return data
        return data.transpose(2, 3).flatten(1, 2)[:, : self.in_features]

    def merged(self, lora: LayerWeights, out: Tensor | None = None) -> "PackedLinear":
        """The layer that gives the outputs of `lora`, summed in float32, in the memory of `out` if given.

        Where only a bias comes in, the weight is this layer's own.
        """
        assert self.scale is None, "8-bit weights cannot take a sum"
        data = self._sum(lora, out) if lora.changes_weight else self.data
        bias = lora.merged_bias(self.own_bias)
        bias = None if bias is None else _padded(bias, len(data) * PANEL)
        return PackedLinear(data, None, bias, self.in_features, self.out_features)

    def _sum(self, lora: LayerWeights, out: Tensor | None) -> Tensor:
        """The data of gain ⊙ (W + scaling · B A), added up in place; bfloat16 takes a float32 copy meanwhile."""
        panels, rank = len(self.data), len(lora.lora_b)
        b = torch.zeros(rank, panels * PANEL)
        b[:, : self.out_features] = lora.lora_b
        b = b.view(rank, panels, PANEL).transpose(0, 1)
        a = lora.lora_a.float().T.expand(panels, -1, -1)
        data = lazy_zeros(tuple(self.data.shape), self.data.dtype) if out is None else out
        total = data.copy_(self.data) if data.dtype == torch.float32 else self._panels().float()
        total.baddbmm_(a, b, alpha=lora.scaling)
        if lora.gain is not None:
            total *= _padded(lora.gain, panels * PANEL).view(panels, 1, PANEL)
        return data if total is data else data.copy_(_pairs(total))

    @property
    def own_bias(self) -> Tensor | None:
        """[out], without the padding."""
        return None if self.bias is None else self.bias[: self.out_features]

    def unpack(self, start: int = 0, end: int | None = None) -> Tensor:
        """Rows `start` to `end` of the weight [out, in] in float32 (int8: as rounded)."""
        end = self.out_features if end is None else end
        first = start // PANEL
        rows = self._panels(first, -(-end // PANEL)).transpose(1, 2).reshape(-1, self.in_features)
        weight = rows[start - first * PANEL : end - first * PANEL].float()
        return weight if self.scale is None else weight * self.scale[start:end, None]

    def rows(self, outputs: Tensor) -> Tensor:
        """The weights [..., in] of some outputs [...], in float32."""
        rows: Tensor = (
            self.data[outputs // PANEL, :, outputs % PANEL].flatten(outputs.dim())[..., : self.in_features].float()
        )
        return rows if self.scale is None else rows * self.scale[outputs][..., None]


class LinearGroup:
    """Packed layers that read the same x."""

    def __init__(self, layers: Sequence[PackedLinear]) -> None:
        self.layers = tuple(layers)
        self.in_features = self.layers[0].in_features
        self.outs = [layer.out_features for layer in self.layers]
        if any(layer.in_features != self.in_features for layer in self.layers):
            raise ValueError(f"layers of a group read the same x: in_features {[a.in_features for a in self.layers]}")
        if any(layer.data.dtype != self.layers[0].data.dtype for layer in self.layers):
            raise ValueError(f"layers of a group are stored alike: {[layer.data.dtype for layer in self.layers]}")
        self._structs = (POINTER * len(self.outs))(*(ctypes.addressof(layer.struct) for layer in self.layers))
        self.pointers = ctypes.addressof(self._structs)


def pack_linear(
    weight: Tensor, bias: Tensor | None = None, storage: Storage = "float32", arena: Arena | None = None
) -> PackedLinear:
    """Packs weight [out, in] and bias [out], in memory of `arena` if there is one.

    int8 rounds symmetrically with scale = absmax / 127 of each output row.
    """
    weight = weight.detach()
    out_features, in_features = weight.shape
    padded = -(-out_features // PANEL) * PANEL
    scale = None
    if storage == "int8":
        weight = weight.float()
        scale = weight.abs().amax(dim=1) / 127
        scale = torch.where(scale > 0, scale, 1.0)
        weight = (weight / scale[:, None]).round()
        scale = _padded(scale, padded)
    data = torch.zeros(padded // PANEL, in_features, PANEL, dtype=_STORAGE[storage])
    whole = out_features // PANEL
    data[:whole] = weight[: whole * PANEL].unflatten(0, (whole, PANEL)).transpose(1, 2)
    if padded > out_features:
        data[whole, :, : out_features - whole * PANEL] = weight[whole * PANEL :].t()
    if storage == "bfloat16":
        data = _pairs(data)
    data = data.contiguous() if arena is None else arena.zeros(data.shape, data.dtype).copy_(data)
    return PackedLinear(
        data, scale, None if bias is None else _padded(bias.detach(), padded), in_features, out_features
    )


def _pairs(panels: Tensor) -> Tensor:
    """[panels, in, 16] → [panels, ceil(in / 2), 16, 2]"""
    if panels.shape[1] % 2:
        panels = functional.pad(panels, (0, 0, 0, 1))
    return panels.view(len(panels), -1, 2, PANEL).transpose(2, 3)


def _padded(vector: Tensor, size: int) -> Tensor:
    padded = torch.zeros(size)
    padded[: vector.numel()] = vector
    return padded

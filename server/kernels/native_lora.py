"""Linear layers with LoRA bypasses by the native CPU kernels, over adapters where the host has them; see `native`."""

import ctypes
from collections.abc import Sequence
from typing import overload

import torch
from torch import Tensor

from server.kernels import LayerWeights, Segment
from server.kernels.native import FLOAT, INT, KINDS, POINTER, Function, contiguous, pointer
from server.kernels.native_linear import LinearGroup

_linear_group = Function("linear_group")
_add_embedding_lora = Function("add_embedding_lora")


class _SlotsStruct(ctypes.Structure):
    _fields_ = (
        ("a", POINTER),
        ("b", POINTER),
        ("gains", POINTER),
        ("biases", POINTER),
        ("ranks", POINTER),
        ("kinds", POINTER),
        ("scalings", POINTER),
        ("in_features", INT),
        ("out_features", INT),
    )


class LoRASlots:
    """The adapter weights of one linear layer by slot: the tensors themselves, no copies; empty slots add nothing."""

    def __init__(self, in_features: int, out_features: int, num_slots: int) -> None:
        self.in_features, self.out_features = in_features, out_features
        self.weights: list[LayerWeights | None] = [None] * num_slots
        self._a, self._b = (POINTER * num_slots)(), (POINTER * num_slots)()
        self._gains, self._biases = (POINTER * num_slots)(), (POINTER * num_slots)()
        self._ranks, self._kinds = (INT * num_slots)(), (INT * num_slots)()
        self._scalings = (FLOAT * num_slots)()
        tables = (self._a, self._b, self._gains, self._biases, self._ranks, self._kinds, self._scalings)
        self.struct = _SlotsStruct(*(ctypes.addressof(table) for table in tables), in_features, out_features)

    def set(self, slot: int, weights: LayerWeights) -> None:
        """Factors of float32, bfloat16 or float16, extras of float32."""
        lora_a, lora_b = weights.lora_a, weights.lora_b
        rank = lora_a.shape[0]
        if lora_a.shape != (rank, self.in_features) or lora_b.shape != (rank, self.out_features):
            raise ValueError(f"lora_a {tuple(lora_a.shape)} and lora_b {tuple(lora_b.shape)} do not fit the layer")
        if lora_a.dtype != lora_b.dtype or lora_a.dtype not in KINDS or lora_a.dtype == torch.int8:
            raise ValueError(f"lora_a is {lora_a.dtype}, lora_b is {lora_b.dtype}")
        for extra in (weights.gain, weights.bias):
            if extra is not None and (extra.shape != (self.out_features,) or extra.dtype != torch.float32):
                raise ValueError(f"an extra is {extra.dtype} of shape {tuple(extra.shape)}")
        if not all(tensor.is_contiguous() for tensor in weights.tensors()):
            raise ValueError("adapter weights must be contiguous")
        self.weights[slot] = weights
        self._a[slot], self._b[slot] = lora_a.data_ptr(), lora_b.data_ptr()
        self._gains[slot], self._biases[slot] = pointer(weights.gain), pointer(weights.bias)
        self._ranks[slot], self._kinds[slot], self._scalings[slot] = rank, KINDS[lora_a.dtype], weights.scaling

    def clear(self, slot: int) -> None:
        self._ranks[slot] = 0
        self._gains[slot] = self._biases[slot] = None
        self.weights[slot] = None


class LoRAGroup:
    """The slots of layers that read the same x."""

    def __init__(self, layers: Sequence[LoRASlots]) -> None:
        self.layers = tuple(layers)
        self.in_features = self.layers[0].in_features
        if any(layer.in_features != self.in_features for layer in self.layers):
            raise ValueError(f"layers of a group read the same x: in_features {[a.in_features for a in self.layers]}")
        self._structs = (POINTER * len(self.layers))(*(ctypes.addressof(layer.struct) for layer in self.layers))
        self._strides = (INT * len(self.layers))(*(layer.out_features for layer in self.layers))
        self.pointers = ctypes.addressof(self._structs)
        self.strides = ctypes.addressof(self._strides)


class _SegmentStruct(ctypes.Structure):
    _fields_ = (("slot", INT), ("start", INT), ("end", INT), ("scale", FLOAT))


class Segments:
    """Which rows of a pass use which slot: disjoint (slot, start, end, scale) with rows start .. end - 1."""

    def __init__(self, segments: Sequence[Segment]) -> None:
        self.count = len(segments)
        self._table = (_SegmentStruct * self.count)(*(_SegmentStruct(*segment) for segment in segments))
        self.pointer = ctypes.addressof(self._table)


class _PassStruct(ctypes.Structure):
    _fields_ = (("num_segments", INT), ("segments", POINTER))


class _PassesStruct(ctypes.Structure):
    _fields_ = (("count", INT), ("passes", POINTER))


class Passes(Sequence[Segments]):
    """The passes of a step, as a table for all its groups."""

    def __init__(self, passes: Sequence[Segments]) -> None:
        self._passes = tuple(passes)
        self._table = (_PassStruct * len(passes))(*(_PassStruct(each.count, each.pointer) for each in passes))
        self._struct = _PassesStruct(len(passes), ctypes.addressof(self._table))
        self.pointer = ctypes.addressof(self._struct)

    def __len__(self) -> int:
        return len(self._passes)

    @overload
    def __getitem__(self, index: int) -> Segments: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Segments]: ...
    def __getitem__(self, index: int | slice) -> Segments | Sequence[Segments]:
        return self._passes[index]


class _AdaptedGroupStruct(ctypes.Structure):
    _fields_ = (("count", INT), ("weights", POINTER), ("slots", POINTER), ("strides", POINTER))


class AdaptedGroup:
    """Packed layers that read the same x with their adapter slots, applied in one call."""

    def __init__(self, linear: LinearGroup, lora: LoRAGroup) -> None:
        self.linear, self._lora = linear, lora
        self._struct = _AdaptedGroupStruct(len(linear.layers), linear.pointers, lora.pointers, lora.strides)
        self._pointer = ctypes.addressof(self._struct)

    def compute_with(self, linear: LinearGroup) -> None:
        """Puts other weights of the same shapes in place of those that are there; replayed calls take them too."""
        self.linear, self._struct.weights = linear, linear.pointers

    def __call__(self, x: Tensor, passes: Passes) -> list[Tensor]:
        """y [..., out] = x [..., in] @ weight.T + bias for each layer; then in each pass, for each row t of a segment

            y[t] += scale * scaling[s] * (x[t] @ lora_a[s].T) @ lora_b[s]

        Where the slot has them, y is multiplied by its `gain` and gets its `bias` after that. A row outside every
        segment, or in one whose slot is empty, stays as it is.
        """
        in_features = self.linear.in_features
        assert x.shape[-1] == in_features
        x = contiguous(x)
        rows = x.numel() // in_features
        outputs = [torch.empty((*x.shape[:-1], out)) for out in self.linear.outs]
        table = (POINTER * len(outputs))(*[y.data_ptr() for y in outputs])
        if _linear_group(x.data_ptr(), rows, self._pointer, passes.pointer, table):
            raise MemoryError(f"no scratch memory for {rows} rows")
        return outputs


def add_embedding_lora(y: Tensor, token_ids: Tensor, slots: LoRASlots, segments: Segments) -> None:
    """y[t] += scale * scaling[s] * lora_a[s][:, token_ids[t]].T @ lora_b[s], and the extras, for row t of a segment.

    y is [num_tokens, out], the slots' in_features are the vocabulary.
    """
    assert y.dtype == torch.float32
    assert y.is_contiguous()
    assert token_ids.dtype == torch.int64
    assert token_ids.is_contiguous()
    assert y.shape == (len(token_ids), slots.out_features)
    _add_embedding_lora(
        token_ids.data_ptr(), ctypes.addressof(slots.struct), y.data_ptr(), segments.count, segments.pointer
    )

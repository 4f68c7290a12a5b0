"""Where adapters lie in device memory: tables by which a kernel finds what a slot holds. Engine thread only."""

import torch
from torch import Tensor

from server.kernels import LayerWeights

EMPTY = -1  # the rank of an empty slot


class SlotTables:
    """Owns the tensors in the slots of a few layers, and tables [num_layers, num_slots] with their addresses.

    The tables stay in place: a captured CUDA graph sees later writes. They lie side by side and are written in a mirror
    on the host, which goes to the device as one copy.
    """

    def __init__(self, device: torch.device, dtype: torch.dtype, num_layers: int, num_slots: int) -> None:
        """`dtype`: what factors are held in."""
        self._dtype = dtype
        self._kept: list[list[LayerWeights | None]] = [[None] * num_slots for _ in range(num_layers)]
        self._mirror = torch.zeros(5, num_layers, num_slots, dtype=torch.int64)
        self._mirrored = [table.numpy() for table in _tables(self._mirror)]
        self._mirrored[4].fill(EMPTY)
        self._memory = self._mirror.to(device, copy=True)
        # Addresses are 0 where there is no such tensor.
        self.a_ptrs, self.b_ptrs, self.gain_ptrs, self.bias_ptrs, self.ranks, self.scalings = _tables(self._memory)

    @property
    def shape(self) -> tuple[int, int]:
        """Layers, slots."""
        return self.ranks.shape[0], self.ranks.shape[1]

    def set(self, layer: int, slot: int, weights: LayerWeights | None) -> None:
        device, kept = self._memory.device, None
        entry: tuple[float, ...] = (0, 0, 0, 0, EMPTY, 0.0)
        if weights is not None:
            lora_a, lora_b = (
                factor.to(device, self._dtype).contiguous() for factor in (weights.lora_a, weights.lora_b)
            )
            assert lora_a.data_ptr() % 16 == lora_b.data_ptr() % 16 == 0, "the kernels read 16 bytes at once"
            extras = [None if extra is None else extra.to(device) for extra in (weights.gain, weights.bias)]
            kept = LayerWeights(lora_a, lora_b, weights.scaling, *extras)
            addresses = (0 if tensor is None else tensor.data_ptr() for tensor in (lora_a, lora_b, *extras))
            entry = (*addresses, len(lora_a), weights.scaling)
        for table, value in zip(self._mirrored, entry, strict=True):
            table[layer, slot] = value
        self._memory.copy_(self._mirror, non_blocking=True)
        self._kept[layer][slot] = kept


def _tables(memory: Tensor) -> tuple[Tensor, ...]:
    """Addresses of A, B, gain and bias in int64, ranks in int32, scalings in float32: [num_layers, num_slots] each, of
    `memory` [5, num_layers, num_slots] int64.
    """
    ranks, scalings = memory[4].view(-1).view(torch.int32).view(2, *memory.shape[1:])
    return *memory[:4], ranks, scalings.view(torch.float32)

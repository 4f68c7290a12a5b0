"""Where adapters lie in device memory: tables by which a kernel finds what a slot holds. Engine thread only."""

import torch

from server.kernels import LayerWeights

EMPTY = -1  # the rank of an empty slot


class SlotTables:
    """Owns the tensors in the slots of a few layers, and tables [num_layers, num_slots] with their addresses.

    The tables stay in place: a captured CUDA graph sees later writes.
    """

    def __init__(self, device: torch.device, dtype: torch.dtype, num_layers: int, num_slots: int) -> None:
        """`dtype`: what factors are held in."""
        self._dtype = dtype
        self._kept: list[list[LayerWeights | None]] = [[None] * num_slots for _ in range(num_layers)]
        addresses = torch.zeros(4, num_layers, num_slots, dtype=torch.int64, device=device)
        self.a_ptrs, self.b_ptrs, self.gain_ptrs, self.bias_ptrs = addresses  # 0: there is no such tensor
        self.ranks = torch.full((num_layers, num_slots), EMPTY, dtype=torch.int32, device=device)
        self.scalings = torch.zeros(num_layers, num_slots, dtype=torch.float32, device=device)

    @property
    def shape(self) -> tuple[int, int]:
        """Layers, slots."""
        return self.ranks.shape[0], self.ranks.shape[1]

    def set(self, layer: int, slot: int, weights: LayerWeights | None) -> None:
        if weights is None:
            self.ranks[layer, slot] = EMPTY
            self._kept[layer][slot] = None
            return
        device = self.ranks.device
        lora_a, lora_b = (matrix.to(device, self._dtype).contiguous() for matrix in (weights.lora_a, weights.lora_b))
        assert lora_a.data_ptr() % 16 == lora_b.data_ptr() % 16 == 0, "the kernels read 16 bytes at once"
        extras = [None if extra is None else extra.to(device) for extra in (weights.gain, weights.bias)]
        self._kept[layer][slot] = LayerWeights(lora_a, lora_b, weights.scaling, *extras)
        tables = self.a_ptrs, self.b_ptrs, self.gain_ptrs, self.bias_ptrs
        for table, tensor in zip(tables, (lora_a, lora_b, *extras), strict=True):
            table[layer, slot] = 0 if tensor is None else tensor.data_ptr()
        self.ranks[layer, slot] = len(lora_a)
        self.scalings[layer, slot] = weights.scaling

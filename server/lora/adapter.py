"""An adapter in host memory. Immutable, so it may be seen from any thread."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from adapters.format import AdapterFiles
from server.kernels import LayerWeights


@dataclass(frozen=True, slots=True, eq=False)
class Adapter:
    """One generation of an adapter's weights. Its identity is the object: a name is only a pointer to it."""

    name: str
    version: str
    generation: int  # counts loads on this server; never reused
    digest: str
    rank: int  # the largest of its layers
    target_modules: tuple[str, ...]  # last parts of the module paths
    weights: Mapping[str, LayerWeights] = field(repr=False)  # by module path
    num_bytes: int  # of the weights
    num_bytes_disk: int

    @classmethod
    def from_files(cls, files: AdapterFiles, name: str, version: str, generation: int) -> "Adapter":
        """Copies the weights into one block of memory, which goes back to the system whole when the adapter goes."""
        tensors = [tensor for layer in files.weights.values() for tensor in (layer.lora_a, layer.lora_b)]
        memory = torch.empty(sum(tensor.nbytes for tensor in tensors), dtype=torch.uint8)
        used = 0

        def place(tensor: Tensor) -> Tensor:
            nonlocal used
            placed = memory[used : used + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
            used += tensor.nbytes
            return placed.copy_(tensor)

        weights = {
            module: LayerWeights(place(layer.lora_a), place(layer.lora_b.T), layer.scaling)
            for module, layer in files.weights.items()
        }
        return cls(
            name=name,
            version=version,
            generation=generation,
            digest=files.digest,
            rank=max(layer.lora_a.shape[0] for layer in weights.values()),
            target_modules=tuple(sorted({module.rpartition(".")[2] for module in weights})),
            weights=weights,
            num_bytes=memory.nbytes,
            num_bytes_disk=files.num_bytes,
        )


class WeightedAdapter(NamedTuple):
    """One part of what a request runs on: its bypass is taken times `weight`."""

    adapter: Adapter
    weight: float = 1.0

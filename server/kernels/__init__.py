"""The operations of a step that Loraplex brings itself, behind one small interface."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from adapters.format import LoRAWeights
from server.kernels import torch_ops
from server.kernels.segments import Segment

AddLoRA = Callable[[Tensor, Tensor, Sequence[LoRAWeights | None], Sequence[Segment]], None]


@dataclass(frozen=True, slots=True)
class Kernels:
    """One implementation of every operation; `server.device` chooses which."""

    name: str
    add_lora: AddLoRA


def torch_kernels() -> Kernels:
    return Kernels("torch", torch_ops.add_lora)

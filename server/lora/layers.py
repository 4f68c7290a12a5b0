"""The linear layers that serve many adapters at once, and the tensors in their slots. Engine thread only."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from adapters.format import LinearShape, LoRAWeights
from server.kernels import Kernels
from server.kernels.segments import Segment
from server.lora.adapter import Adapter


@dataclass(slots=True)
class _Active:
    """The segments of the running step; empty between steps. Shared by all layers that see the same rows."""

    segments: Sequence[Segment] = ()


class MultiLoRALinear(nn.Module):
    """A frozen linear layer beside one LoRA bypass per adapter slot: `y = base(x) + scaling_s · B_s A_s x`, per token.

    A batch without adapters costs what the base layer costs.
    """

    def __init__(self, base: nn.Module, shape: LinearShape, num_slots: int, active: _Active, kernels: Kernels) -> None:
        super().__init__()
        self.base = base
        self.shape = shape
        self.slots: list[LoRAWeights | None] = [None] * num_slots
        self._active = active
        self._add_lora = kernels.add_lora

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.base(x)
        if self._active.segments:
            self._add_lora(
                y.view(-1, self.shape.out_features),
                x.reshape(-1, self.shape.in_features),
                self.slots,
                self._active.segments,
            )
        return y


class LoRALayers:
    """Owns every `MultiLoRALinear` of a model, by the module path that adapters use."""

    def __init__(
        self, model: nn.Module, shapes: dict[str, LinearShape], head: str, num_slots: int, kernels: Kernels
    ) -> None:
        """Puts a `MultiLoRALinear` in place of each layer in `shapes`; `head` is the one that makes the logits."""
        self.kernels_name = kernels.name
        self._tokens = _Active()
        self._logits = _Active()
        self._device = next(model.parameters()).device
        self._layers: dict[str, MultiLoRALinear] = {}
        for name, shape in shapes.items():
            active = self._logits if name == head else self._tokens
            layer = MultiLoRALinear(model.get_submodule(name), shape, num_slots, active, kernels)
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, layer)
            self._layers[name] = layer

    def write(self, slot: int, adapter: Adapter | None) -> None:
        """Puts an adapter's weights into a slot, in place of whatever was there; None empties the slot.

        On the CPU the slot shares the host's tensors: a resident adapter is in memory once.
        """
        for name, layer in self._layers.items():
            weights = adapter.weights.get(name) if adapter is not None else None
            if weights is not None:
                weights = LoRAWeights(
                    weights.lora_a.to(self._device, non_blocking=True),
                    weights.lora_b.to(self._device, non_blocking=True),
                    weights.scaling,
                )
            layer.slots[slot] = weights

    @contextmanager
    def activate(self, segments: Sequence[Segment], logits_segments: Sequence[Segment]) -> Iterator[None]:
        """Within, every forward is a step whose tokens belong to adapters as `segments` say."""
        assert not self._tokens.segments, "a step is running already"
        self._tokens.segments, self._logits.segments = segments, logits_segments
        try:
            yield
        finally:
            self._tokens.segments = self._logits.segments = ()


def bytes_on_device(adapter: Adapter, device: torch.device) -> int:
    """What a slot holding the adapter takes of the device's memory, beyond the host's copy."""
    return 0 if device.type == "cpu" else adapter.num_bytes

"""Several adapters in training on one frozen model: a batch holds examples of all, each example with its own bypass."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from adapters.lora import LoRALinear, remove_lora


class Rows:
    """Which adapter the rows of a batch belong to. Set before a forward, and read by every shared layer in it."""

    def __init__(self) -> None:
        self._counts: dict[int, int] = {}

    def give(self, counts: Mapping[int, int]) -> None:
        """Adapter → number of its rows, in the order of the batch."""
        self._counts = dict(counts)

    def give_all(self, adapter: int) -> None:
        """To one adapter, however many they are."""
        self._counts = {adapter: 0}

    def split(self, x: Tensor) -> list[tuple[int, Tensor]]:
        """Each adapter and its rows of x.

        Raises:
            ValueError: x has another number of rows, as in a model that mixes or sorts the rows of a batch.
        """
        if len(self._counts) == 1:
            return [(adapter, x) for adapter in self._counts]
        if len(x) != sum(self._counts.values()):
            raise ValueError(
                f"a layer sees {len(x)} rows of a batch of {sum(self._counts.values())}: adapters on this model can "
                "only be trained one at a time"
            )
        return list(zip(self._counts, x.split(list(self._counts.values())), strict=True))


class SharedLinear(nn.Module):
    """A frozen linear layer with a bypass for each adapter that has one: y = W x + s · B A x on its own rows."""

    def __init__(self, layers: Mapping[int, LoRALinear], rows: Rows) -> None:
        super().__init__()
        self.base = next(iter(layers.values())).base
        self.layers = nn.ModuleList(layers.values())
        self._of_adapter = dict(layers)
        self._rows = rows

    def forward(self, x: Tensor) -> Tensor:
        """[num_examples, ..., in] to [num_examples, ..., out]."""
        y: Tensor = self.base(x)
        parts = []
        for (adapter, x_rows), (_, y_rows) in zip(self._rows.split(x), self._rows.split(y), strict=True):
            layer = self._of_adapter.get(adapter)
            parts.append(y_rows if layer is None else layer.add_bypass(y_rows, x_rows))
        return parts[0] if len(parts) == 1 else torch.cat(parts)


@contextmanager
def shared_layers(model: nn.Module, adapters: Sequence[Mapping[str, LoRALinear]]) -> Iterator[Rows]:
    """Puts the layers of several adapters into their model, which holds none of them, and takes them out in the end."""
    rows = Rows()
    for name in dict.fromkeys(name for layers in adapters for name in layers):
        owners = {index: layers[name] for index, layers in enumerate(adapters) if name in layers}
        model.set_submodule(name, SharedLinear(owners, rows))
    try:
        yield rows
    finally:
        for layers in adapters:
            remove_lora(model, layers)

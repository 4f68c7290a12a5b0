"""What an adapter needs to know of the base's own weights when it is loaded. Worker threads."""

from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor

from adapters.errors import AdapterIncompatibleError
from adapters.format import LoRAWeights
from adapters.tensors import LinearShape

_CHUNK_ELEMENTS = 1 << 23  # of a weight that are looked at together: 32 MiB of scratch, whatever its size

# What storing a value changes at most: a share of the value, and where the steps are even a share of the largest of
# its row.
_ROUNDING = {torch.float32: 0.0, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
_ROUNDING_OF_ROW = {torch.int8: 0.501 / 127, torch.float16: 2.0**-24}


class BaseWeights:
    """The frozen weights of the layers that adapters may target, as the model multiplies by them. Any thread.

    Rows of a linear layer's weight are its outputs [out_features, in_features], rows of an embedding its tokens.
    """

    def __init__(self, shapes: Mapping[str, LinearShape], storage: torch.dtype) -> None:
        """`storage`: what the weights were rounded to."""
        self.shapes = shapes
        self.storage = storage
        self._rows: dict[str, Callable[[int, int], Tensor]] = {}
        self._biases: dict[str, Tensor] = {}

    def add(self, module: str, rows: Callable[[int, int], Tensor], bias: Tensor | None = None) -> None:
        """Says where a layer's rows are read, as `rows` has them, and its bias [out_features] in float32."""
        self._rows[module] = rows
        if bias is not None:
            self._biases[module] = bias.cpu()

    def rows(self, module: str, start: int, end: int) -> Tensor:
        """Rows `start` to `end` (not included) in float32."""
        return self._rows[module](start, end)

    def bias(self, module: str) -> Tensor | None:
        """[out_features] in float32, on the host."""
        return self._biases.get(module)


def adapted_norms(base: BaseWeights, module: str, lora: LoRAWeights) -> Tensor:
    """The norm of every output's weights with the adapter in them, `‖W + scaling · B A‖` by row: [out_features]."""
    a, b = lora.lora_a.float(), lora.scaling * lora.lora_b.float()
    is_embedding = base.shapes[module].kind == "embedding"
    norms = []
    squares = torch.zeros(len(b))
    for start, rows in _chunks(base, module):
        a, b = a.to(rows.device), b.to(rows.device)
        if is_embedding:
            squares += (rows + (b @ a[:, start : start + len(rows)]).T).square().sum(dim=0).cpu()
        else:
            norms.append(torch.linalg.vector_norm(rows + b[start : start + len(rows)] @ a, dim=1).cpu())
    return squares.sqrt() if is_embedding else torch.cat(norms)


def check_own(base: BaseWeights, module: str, weight: Tensor) -> None:
    """Holds a weight that came with an adapter against the base's own, up to what storing them may have changed.

    Raises:
        AdapterIncompatibleError: they differ.
    """
    relative = _ROUNDING[weight.dtype] + _ROUNDING.get(base.storage, 0.0)
    of_row = max(_ROUNDING_OF_ROW.get(dtype, 0.0) for dtype in (weight.dtype, base.storage))
    for start, rows in _chunks(base, module):
        given = weight[start : start + len(rows)].to(rows.device, torch.float32)
        allowed = relative * given.abs() + of_row * given.abs().amax(dim=1, keepdim=True)
        if not ((given - rows).abs() <= allowed).all():
            raise AdapterIncompatibleError(
                f"{module} was trained whole, or on another base model: the weight that comes with the adapter is not "
                f"the base's own. A copy of {module} per adapter is not served; train LoRA on it instead",
                "UNSUPPORTED_ADAPTER",
            )


def _chunks(base: BaseWeights, module: str) -> Iterator[tuple[int, Tensor]]:
    shape = base.shapes[module]
    num_rows, size = shape.out_features, shape.in_features
    if shape.kind == "embedding":
        num_rows, size = size, num_rows
    step = max(1, _CHUNK_ELEMENTS // size)
    for start in range(0, num_rows, step):
        yield start, base.rows(module, start, min(start + step, num_rows))

"""Why an adapter cannot be merged into the base's weights. Engine thread only."""

import torch
from torch import Tensor
from torch.linalg import vector_norm

from server.kernels import LayerWeights
from server.lora.adapter import Adapter
from server.lora.base_weights import BaseWeights

# A gain scales the outputs of a merged layer, and they are scaled back for everybody else: within bounds that is exact.
MIN_GAIN, MAX_GAIN = 0.01, 100.0
# What is added to a layer and taken away again leaves its rounding behind, in proportion to its size. So it may be this
# many times as large as the layer's own weights, by what the sums are rounded to: some units in the fifth digit of an
# output, or a few times what the weights' own rounding has cost.
MAX_CHANGE = {torch.float32: 100.0, torch.bfloat16: 8.0, torch.float16: 8.0}
MAX_BIAS = 100.0  # in the same units: inputs of a layer are about 1
_SAMPLED_ROWS = 64  # of a layer's weights, from its middle, tell how large they are


class MergeGuard:
    """Knows how large the base's weights are, and holds adapters against them.

    While an adapter is merged all others take its effect away again. That must give what they get without it, up to
    rounding: nothing on the way may overflow, and nothing may be so large that the rest is lost beside it.
    """

    def __init__(self, base: BaseWeights) -> None:
        self._base = base
        self._norms: dict[str, float] = {}

    def why_not(self, adapter: Adapter) -> str:
        """The reason why others could not be served while the adapter is merged; empty: they can.

        Takes the factors' norms and no product of theirs: some milliseconds for a whole adapter.
        """
        return next(filter(None, (self._fault(*layer) for layer in adapter.weights.items())), "")

    def _fault(self, module: str, weights: LayerWeights) -> str:
        gain, storage = weights.gain, self._base.storage
        if gain is not None and not gain.abs().min() >= MIN_GAIN:
            return f"it all but erases an output of {module}, which other requests need"
        if gain is not None and not gain.abs().max() <= MAX_GAIN:
            return f"it makes an output of {module} {gain.abs().max():.3g} times as large; the limit is {MAX_GAIN:g}"
        largest = float(vector_norm(weights.lora_a, dim=1, dtype=torch.float64).amax()) if len(weights.lora_a) else 0.0
        largest *= max(1.0, abs(weights.scaling))
        if not largest <= torch.finfo(storage).max ** 0.5:  # so an input may be as large again
            return f"with values up to {largest:.3g} after the first factor of {module} it could overflow"
        norm = self._norm(module)
        change = _largest_change(weights, is_embedding=self._base.shapes[module].kind == "embedding")
        if not change <= MAX_CHANGE[storage] * norm:
            return (
                f"it changes {module} by up to {change:.3g} where the base's weights are about {norm:.3g}; beyond "
                f"{MAX_CHANGE[storage]:g} times as much its rounding would show in other requests' answers"
            )
        if weights.bias is not None and not (bias := float(weights.bias.abs().max())) <= MAX_BIAS * norm:
            return (
                f"it adds up to {bias:.3g} to outputs of {module}, where the base's weights are about {norm:.3g}; "
                f"beyond {MAX_BIAS:g} times as much its rounding would show in other requests' answers"
            )
        return ""

    def _norm(self, module: str) -> float:
        """Of a typical row of the layer's weights: what an output is for an input of length 1."""
        if module not in self._norms:
            shape = self._base.shapes[module]
            num_rows = shape.in_features if shape.kind == "embedding" else shape.out_features
            start = max(0, (num_rows - _SAMPLED_ROWS) // 2)
            rows = self._base.rows(module, start, min(start + _SAMPLED_ROWS, num_rows))
            self._norms[module] = float(rows.square().sum(dim=1).mean().sqrt())
        return self._norms[module]


def _largest_change(weights: LayerWeights, *, is_embedding: bool) -> float:
    """The largest norm that a row of `scaling · B A` may have: `|scaling| · Σ_r |B_ir| · ‖A_r‖`, over all rows i.

    It also bounds the terms of that sum, which may be large and cancel. Rows of an embedding are its tokens.
    """
    along, across = (weights.lora_b, weights.lora_a) if is_embedding else (weights.lora_a, weights.lora_b)
    sizes: Tensor = vector_norm(along, dim=1, dtype=torch.float64) @ across.double().abs()  # [rows]
    return abs(weights.scaling) * float(sizes.amax())

"""Which experts a mixture's routers choose: noted in one forward, taken again in another that is rounded otherwise.

A router whose scores nearly tie sends a token elsewhere for the last bit of its input, and what comes out has little to
do with what would have: forwards are compared under the same choices. Engine thread, once at start.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

_TOPK = (torch.topk, Tensor.topk)  # by which routers choose, experts and groups of them


class Choices(TorchFunctionMode):
    """Notes what is chosen within, one entry for each `topk`."""

    def __init__(self, num_tokens: int) -> None:
        super().__init__()
        self._num_tokens = num_tokens
        self.noted: list[Tensor | None] = []  # indices [num_tokens, ..., chosen]; None: it was no choice of each token

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        own = func(*args, **(kwargs or {}))
        if func in _TOPK:
            self.noted.append(own.indices if len(own.indices) == self._num_tokens else None)
        return own


class SameChoices(TorchFunctionMode):
    """Lets routers within choose as noted, where that scores as high as their own choice but for rounding.

    Scores are the routers' own, and so are the shares that they give to experts: one that is wrong still shows.
    """

    def __init__(self, noted: Sequence[Tensor | None], positions: Tensor, tolerance: float) -> None:
        """
        Args:
            noted: see `Choices`.
            positions: which of the noted tokens each row is, [num_rows].
            tolerance: what is rounding of a score, as a share of its row's largest.
        """
        super().__init__()
        self._noted = iter(noted)
        self._positions = positions
        self._tolerance = tolerance

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        own = func(*args, **(kwargs or {}))
        if func not in _TOPK or (noted := next(self._noted, None)) is None:
            return own
        scores, indices = args[0], noted[self._positions]
        values = scores.gather(-1, indices)
        lacking = own.values.amin(-1, keepdim=True) - values.amin(-1, keepdim=True)
        largest = scores.where(scores.isfinite(), 0).abs().amax(-1, keepdim=True)  # groups may be masked by -inf
        as_high = lacking <= 2 * self._tolerance * largest  # the score of either may be off by that
        return type(own)((values.where(as_high, own.values), indices.where(as_high, own.indices)))

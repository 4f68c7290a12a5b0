"""Routers of mixtures by the kernels of linear layers: a token's experts hang on the last bit of its scores.

A router multiplies by a bare parameter, with whatever its model's class does before and after; so do the layers of
experts that all tokens share, which adapters do not reach either. Engine thread, once at start.
"""

from collections.abc import Callable, Sequence
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from torch.overrides import TorchFunctionMode

from server.engine.experts import MakeGroup, frozen_layer


@torch.inference_mode()
def pack_routers(model: nn.Module, run: Callable[[], Any], make_group: MakeGroup) -> int:
    """Packs what the model still multiplies by beside its linear layers, as routers do; says how many.

    Args:
        run: computes a forward of the model.
        make_group: of weights that are not rounded: which experts a token takes hangs on the last bit.
    """
    calls = _LinearCalls()
    with calls:
        run()
    found = [module for module in model.modules() if module._parameters.get("weight") in calls.weights]
    return _packed(found, run, make_group) if found else 0


def _packed(modules: Sequence[Any], run: Callable[[], Any], make_group: MakeGroup) -> int:
    """Packs the weights of all these modules if the model runs with that, else those of either half that it can."""
    weights = [module.weight for module in modules]
    for module, weight in zip(modules, weights, strict=True):
        del module.weight
        module.weight = _Weight(weight, make_group)
    try:
        run()
        return len(modules)
    except (AttributeError, TypeError, RuntimeError):  # more is done with one of them
        for module, weight in zip(modules, weights, strict=True):
            del module.weight
            module.weight = weight
    half = len(modules) // 2
    return sum(_packed(some, run, make_group) for some in (modules[:half], modules[half:]) if half)


class _Weight:
    """Stands for a weight in `F.linear`, which a group computes; it is float32, to which many routers cast theirs."""

    dtype = torch.float32

    def __init__(self, weight: Tensor, make_group: MakeGroup) -> None:
        self._group = make_group([frozen_layer(weight)], 0)

    def to(self, dtype: torch.dtype) -> Self:
        if dtype != self.dtype:
            raise TypeError(f"a packed weight is {self.dtype}, not {dtype}")
        return self

    type = to

    def float(self) -> Self:
        return self

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not linear or not isinstance(args[1], cls):
            return NotImplemented
        x, weight, *bias = args
        (y,) = weight._group(x, ())
        return y + bias[0] if bias and bias[0] is not None else y


class _LinearCalls(TorchFunctionMode):
    """Notes the parameters that `F.linear` multiplies by."""

    def __init__(self) -> None:
        super().__init__()
        self.weights: set[Tensor] = set()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is linear and isinstance(args[1], nn.Parameter):
            self.weights.add(args[1])
        return func(*args, **(kwargs or {}))

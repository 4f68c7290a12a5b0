"""Sigmoids by the native kernel: the last bit of torch's hangs on where in a tensor an element lies.

Routers score experts by them, and gates of shared experts are ones. Engine thread.
"""

from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from server.engine.recorded_forward import Forward
from server.kernels.native_fused import Activation

_SIGMOID = (torch.sigmoid, Tensor.sigmoid)


class NativeSigmoids(TorchFunctionMode):
    """Within, sigmoids of float32 rows have the same bits whatever rows are beside them."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _SIGMOID and args[0].dtype is torch.float32 and args[0].dim() > 1:
            return Activation.SIGMOID(args[0].contiguous())
        return func(*args, **(kwargs or {}))


def with_native_sigmoids(forward: Forward) -> Forward:
    def computed(*args: Any, **kwargs: Any) -> Any:
        with NativeSigmoids():
            return forward(*args, **kwargs)

    return computed

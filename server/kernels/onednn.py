"""Linear layers packed for oneDNN, which torch brings: for the CPU, where the native kernels are missing."""

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from server.kernels import Kernels
from server.kernels.torch_ops import TorchEmbeddingBypass, TorchLinearGroup

_ROWS = 16  # of a step, as the layout is chosen for; any number is served


def available(dtype: torch.dtype) -> bool:
    """Whether this torch packs weights of a dtype, and this processor computes in it."""
    if not torch.backends.mkldnn.is_available():
        return False
    return dtype is torch.float32 or (dtype is torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported())


class PackedLinear(nn.Module):
    """A frozen linear layer, its weight once in oneDNN's own layout: y [..., out] = x [..., in] @ weightᵀ + bias."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        weight, bias = layer.weight, layer.bias
        assert isinstance(weight, Tensor)
        assert bias is None or isinstance(bias, Tensor)
        weight = weight.detach().T if isinstance(layer, Conv1D) else weight.detach()
        self.weight = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), _ROWS)
        self.bias = None if bias is None else bias.detach()

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")
        return y


def onednn_kernels() -> Kernels:
    return Kernels(
        "oneDNN",
        TorchLinearGroup,
        tuple,
        TorchEmbeddingBypass,
        groups_layers=False,
        pack=PackedLinear,
        no_merge="weights packed for oneDNN take no sum (--kernels torch)",
    )

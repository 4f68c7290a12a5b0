"""Which base model an adapter was trained on: a digest that training writes down and serving holds against its own."""

import hashlib

import torch
from torch import nn

METADATA_KEY = "base_fingerprint"  # in the header of the adapter's safetensors file, where PEFT reads past it
_SAMPLES = 64  # values of each parameter


@torch.no_grad()
def base_fingerprint(model: nn.Module) -> str:
    """A digest of every parameter's name, shape and some of its values; empty if the model's dtype allows none.

    Values count as bfloat16, so that a model is the same whether it is loaded in float32 or in bfloat16. Through
    float16 they would be rounded twice, and not always to the same.
    """
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        if parameter.dtype not in (torch.float32, torch.bfloat16):
            return ""
        values = parameter.detach().reshape(-1)
        sample = values[:: max(1, len(values) // _SAMPLES)].to("cpu", torch.bfloat16).contiguous()
        digest.update(f"{name} {tuple(parameter.shape)}".encode())
        digest.update(sample.view(torch.uint8).numpy().data)
    return digest.hexdigest()

"""Fused parts of other shapes than Llama's: adapters on them are PEFT's, and every bit is the same in any batch."""

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from server.engine.fusion import fuse
from server.engine.probe import Probe
from server.kernels import native
from tests.conftest import EOS, VOCAB_SIZE, save_adapter, save_base
from tests.server.engine.conftest import Engine, peft_logits
from tests.server.engine.test_model import COMMON, SERVED

pytestmark = pytest.mark.skipif(not native.available(), reason="the native kernels are not built")

SHAPES: dict[str, dict[str, Any]] = {
    "qwen3": {},  # a norm on each head of q and k
    "olmo2": {},  # norms on whole rows of q and k, and after attention and feed-forward
    "gemma2": {"sliding_window": 20},  # four norms a layer
    "gemma3_text": {"sliding_window": 20},  # both
    "phi3": {"sliding_window": 20, "head_dim": 8, "partial_rotary_factor": 0.5},  # q, k, v as one, gate and up as one
    "phi": {"partial_rotary_factor": 0.5, "qk_layernorm": True},  # other norms, attention and feed-forward side by side
    "granite": {},  # sums with a multiplier
    "olmo": {"clip_qkv": None},  # norms without weights
    "cohere": {"use_qk_norm": True},  # norms with weights for each head, rotary embedding of neighbours
    "cohere2": {"sliding_window": 20},  # a layer without rotary embedding
    "glm4": {},  # rotary embedding of neighbours by another table
    "starcoder2": {"sliding_window": 20},  # feed-forwards without gates
    "gpt_neox": {},  # q, k and v of one head after the other
    "gpt2": {"n_positions": 256},
    "opt": {},  # a layer that has the feed-forward's layers itself, and scales q
    "mixtral": {},  # experts
    "qwen3_moe": {},
    "gpt_oss": {"sliding_window": 20},  # tables of half the width, experts with a gate of their own
    "glm4_moe": {  # scores that are sigmoids, experts in groups
        "num_local_experts": 16, "num_experts_per_tok": 6, "n_group": 4, "topk_group": 2, "use_qk_norm": True,
    },
    "qwen2_moe": {},  # a shared expert behind a sigmoid
    "hunyuan_v1_dense": {},  # norms after the rotary embedding
}  # fmt: skip
_ATTENTION = {"target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"]}  # PEFT would adapt the experts too
TARGETS: dict[str, dict[str, Any]] = {
    "gpt2": {"target_modules": "all-linear", "fan_in_fan_out": True},
    "mixtral": _ATTENTION,
    "qwen3_moe": _ATTENTION,
    "gpt_oss": _ATTENTION,
    "glm4_moe": _ATTENTION,
    "qwen2_moe": _ATTENTION,
}


def varied(model_type: str) -> PreTrainedModel:
    """A model whose norms differ from each other and from 1, and whose logits stand clear of rounding."""
    torch.manual_seed(0)
    wide = {"vocab_size": VOCAB_SIZE, "max_position_embeddings": 256, "initializer_range": 0.2, "eos_token_id": EOS}
    config = AutoConfig.for_model(model_type, **{**COMMON, **SERVED[model_type], **wide, **SHAPES[model_type]})
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config).eval()
    for name, parameter in model.named_parameters():
        if "norm" in name:
            parameter.data += 0.3 * torch.randn_like(parameter)
    return model


@pytest.mark.parametrize("model_type", SHAPES)
def test_adapters_and_bits(model_type: str, tmp_path: Path, prompts: list[list[int]]) -> None:
    folder = save_base(varied(model_type), tmp_path / "base")
    settings = TARGETS.get(model_type, {"target_modules": "all-linear"})
    save_adapter(varied(model_type), tmp_path / "adapter", seed=1, r=4, **settings)
    reference = peft.PeftModel.from_pretrained(varied(model_type), str(tmp_path / "adapter")).eval()

    def logits(**settings: int) -> list[torch.Tensor]:
        engine = Engine(folder, **settings)
        model: Any = engine.parts.base.model
        for layer in next(module for module in model.modules() if isinstance(module, nn.ModuleList)):
            assert "forward" in vars(layer)
            assert any("forward" in vars(part) for part in layer.children() if hasattr(part, "layer_idx"))
        adapter = engine.load(tmp_path / "adapter")
        rows: dict[int, list[torch.Tensor]] = {}
        engine.watch_logits(lambda request_id, row: rows.setdefault(request_id, []).append(row.clone()))
        work = [(prompt, adapter if index % 2 else None) for index, prompt in enumerate(prompts)]
        for items in [[item] for item in work] if settings.get("max_num_seqs") == 1 else [work]:
            engine.generate(items, max_tokens=4)
        return [torch.stack(rows[request_id]) for request_id in range(len(work))]

    alone = logits(max_num_seqs=1)
    for index, (prompt, row) in enumerate(zip(prompts, alone, strict=True)):
        with nullcontext() if index % 2 else reference.disable_adapter():
            expected = peft_logits(reference, prompt, None)[-1]
        assert torch.allclose(row[0], expected, atol=1e-4), index
    for settings in ({}, {"max_num_batched_tokens": 16, "max_num_seqs": 16}):
        assert all(map(torch.equal, logits(**settings), alone)), settings


class RMSNorm(nn.Module):
    """Keeps what it adds to the variance under a name that nobody knows."""

    def __init__(self, added: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(64))
        self.added = added

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.added))


@torch.inference_mode()
@pytest.mark.parametrize("size", [1, 1e5])
@pytest.mark.parametrize(("added", "fused"), [(1e-6, {"RMS norm": 1}), (1e-3, {})])
def test_a_norm_is_known_by_what_it_adds_to_the_variance(size: float, added: float, fused: dict[str, int]) -> None:
    """However large the recorded inputs are, beside which it does not show."""
    model, x = nn.Sequential(RMSNorm(added)), size * torch.randn(1, 12, 64)
    assert fuse(model, lambda _: model(x), Probe()) == fused

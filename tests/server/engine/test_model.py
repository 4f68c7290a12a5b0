"""Which transformers architectures are base models: the one attention function serves them, or they are refused."""

import weakref
from collections import Counter
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from server.engine.cpu_kv_cache import CpuKVCache
from server.engine.kv_cache import TorchKVCache
from server.engine.model import BaseModel, prepare_base_model
from server.engine.model_runner import ModelRunner
from server.errors import ConfigError
from server.kernels import Kernels, native, onednn
from server.kernels.cpu import cpu_kernels
from server.kernels.onednn import onednn_kernels
from server.kernels.torch_ops import torch_kernels

CPU = torch.device("cpu")
COMMON: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
WINDOW = {"sliding_window": 5, "layer_types": ["sliding_attention", "full_attention"]}
EXPERTS = {"num_local_experts": 4, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
SERVED: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"sliding_window": 5},
    "ministral": {"head_dim": 8, **WINDOW},
    "qwen2": {"use_sliding_window": True, **WINDOW},
    "qwen3": {"head_dim": 8},
    "gemma": {"head_dim": 8},
    "gemma2": {"head_dim": 8, "query_pre_attn_scalar": 16, **WINDOW},
    "gemma3_text": {"head_dim": 8, "query_pre_attn_scalar": 16, **WINDOW},
    "phi": {},
    "phi3": {"sliding_window": 5},
    "ministral3": {"head_dim": 8},
    "olmo": {"clip_qkv": 8.0},
    "olmo2": {},
    "granite": {"attention_multiplier": 0.3, "residual_multiplier": 0.5, "logits_scaling": 2.0},
    "smollm3": {"no_rope_layers": [1, 0]},
    "starcoder2": {"sliding_window": 5},
    "cohere": {},
    "cohere2": {"head_dim": 8, **WINDOW},
    "glm4": {"head_dim": 8},
    "exaone4": WINDOW,
    "gpt_neox": {},
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64},
    "mixtral": EXPERTS,
    "qwen3_moe": {"head_dim": 8, **EXPERTS},
    "olmoe": EXPERTS,
    "gpt_oss": {"head_dim": 8, **EXPERTS, **WINDOW},
    "glm4_moe": {"head_dim": 8, **EXPERTS, "first_k_dense_replace": 1},
    "qwen2_moe": {**EXPERTS, "shared_expert_intermediate_size": 16},
    "hunyuan_v1_dense": {"head_dim": 8},
}
# What a model of two layers has fused: a norm before and after the layers' parts, and on q and k, where it has them.
LAYERS = {"rotary attention": 2, "decoder layer": 2}
GATED_LAYERS = {"gated feed-forward": 2, **LAYERS}
PLAIN_LAYERS = {"feed-forward": 2, **LAYERS}
MIXTURES = {"experts": 2, "other weight": 2, **LAYERS}
WITHOUT_ROTARY = {"rotary attention": 1, "attention": 1}  # one layer of the two
FUSED: dict[str, dict[str, int]] = {
    "llama": {"RMS norm": 5, **GATED_LAYERS},
    "mistral": {"RMS norm": 5, **GATED_LAYERS},
    "ministral": {"RMS norm": 5, **GATED_LAYERS},
    "qwen2": {"RMS norm": 5, **GATED_LAYERS},
    "qwen3": {"RMS norm": 9, **GATED_LAYERS},
    "gemma": {"RMS norm": 5, **GATED_LAYERS},
    "gemma2": {"RMS norm": 9, **GATED_LAYERS},
    "gemma3_text": {"RMS norm": 13, **GATED_LAYERS},
    "phi": {"layer norm": 3, **PLAIN_LAYERS},
    "phi3": {"RMS norm": 5, **GATED_LAYERS},
    # A factor on q that grows from some position on, and a clamp: neither does anything to the reference prompt.
    "ministral3": {"RMS norm": 5, "gated feed-forward": 2, "decoder layer": 2},
    "olmo": {"layer norm": 5, "gated feed-forward": 2, "decoder layer": 2},
    "olmo2": {"RMS norm": 9, **GATED_LAYERS},
    "granite": {"RMS norm": 5, **GATED_LAYERS},
    "smollm3": {"RMS norm": 5, **GATED_LAYERS, **WITHOUT_ROTARY},
    "starcoder2": {"layer norm": 5, **PLAIN_LAYERS},
    "cohere": {"layer norm": 3, **GATED_LAYERS},
    "cohere2": {"layer norm": 3, **GATED_LAYERS, **WITHOUT_ROTARY},
    "glm4": {"RMS norm": 9, **GATED_LAYERS},
    "exaone4": {"RMS norm": 9, **GATED_LAYERS, **WITHOUT_ROTARY},
    "gpt_neox": {"layer norm": 5, **PLAIN_LAYERS},
    "opt": {"layer norm": 5, "attention": 2, "decoder layer": 2},
    "gpt2": {"layer norm": 5, "feed-forward": 2, "attention": 2, "decoder layer": 2},
    "mixtral": {"RMS norm": 5, **MIXTURES},
    "qwen3_moe": {"RMS norm": 9, **MIXTURES},
    "olmoe": {"RMS norm": 9, **MIXTURES},
    "gpt_oss": {"RMS norm": 5, **MIXTURES},
    # Experts in the second layer alone; a router whose scores are sigmoids.
    "glm4_moe": {"RMS norm": 5, **GATED_LAYERS, "experts": 1, "other weight": 1, "sigmoid": 1},
    # A shared expert, which sees its rows without the first dimension, and a gate before it.
    "qwen2_moe": {"RMS norm": 5, **MIXTURES, "other weight": 10, "gated feed-forward": 2, "sigmoid": 2},
    "hunyuan_v1_dense": {"RMS norm": 9, **GATED_LAYERS},
}
# Parts that are replayed, where it is not one of each layer (itself or its attention).
REPLAYED: dict[str, int] = {"glm4_moe": 3}
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "bloom": ({"n_layer": 2, "n_head": 4}, "attention interface"),
    "stablelm": ({}, "keyword arguments"),
    "nemotron": ({}, "keyword arguments"),
    "deepseek_v3": (
        {
            "q_lora_rank": None, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 12,
            "n_group": 1, "topk_group": 1, "first_k_dense_replace": 2, "num_key_value_heads": 4,
            "moe_intermediate_size": 16, "n_routed_experts": 4, "num_experts_per_tok": 2,
        },
        "different head sizes",
    ),
    "phi3": (
        {"rope_parameters": {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 4,
                             "long_factor": [2.0] * 4, "original_max_position_embeddings": 32}},
        "longrope",
    ),
    "lfm2": ({"layer_types": ["conv", "full_attention"], "block_multiple_of": 8}, "layers of type conv"),
}  # fmt: skip


def tiny(model_type: str, settings: dict[str, Any]) -> Any:
    torch.manual_seed(0)
    config = AutoConfig.for_model(model_type, **{**COMMON, **settings})
    return AutoModelForCausalLM.from_config(config)


def torch_runner(base: BaseModel, kernels: Kernels | None = None) -> ModelRunner:
    cache = TorchKVCache(base.kv_shape, num_blocks=8, block_size=4, dtype=base.dtype, device=CPU)
    return ModelRunner(base, kernels or torch_kernels(), cache, num_adapter_slots=1)


@pytest.mark.parametrize("model_type", SERVED)
def test_served(model_type: str) -> None:
    """Packed, chunked and decoded steps give the logits of the model's own forward."""
    base = prepare_base_model(tiny(model_type, SERVED[model_type]), model_type, CPU)
    runner = torch_runner(base)
    assert runner.verify("float32") <= 5e-7 * max(1, float(base.reference.logits.abs().max()))
    assert any(name.endswith(("q_proj", "qkv_proj", "query_key_value", "c_attn")) for name in base.linear_layers)
    assert not any(parameter.requires_grad for parameter in base.model.parameters())


@pytest.mark.skipif(not onednn.available(torch.float32), reason="torch was built without oneDNN")
@pytest.mark.parametrize("model_type", SERVED)
def test_served_by_onednn(model_type: str) -> None:
    """Packed weights change the logits by rounding only, and no weight is in memory twice."""
    base = prepare_base_model(tiny(model_type, SERVED[model_type]), model_type, CPU)
    tied = base.linear_layers[base.head].kind == "tied head"
    names = [name for names in base.linear_groups for name in names]
    weights = {name: weakref.ref(base.model.get_submodule(name).weight) for name in names}
    runner = torch_runner(base, onednn_kernels())
    assert runner.verify("float32") <= 5e-6 * max(1, float(base.reference.logits.abs().max()))
    assert {name for name, weight in weights.items() if weight() is not None} == ({base.head} if tied else set())


@pytest.mark.skipif(not native.available(), reason="the native kernels are not built")
@pytest.mark.parametrize("model_type", SERVED)
def test_served_by_the_native_kernels(model_type: str) -> None:
    """Packed weights, native attention and whatever could be fused change the logits by rounding only.

    No weight is in memory twice.
    """
    base = prepare_base_model(tiny(model_type, SERVED[model_type]), model_type, CPU)
    names = [name for names in base.linear_groups for name in names]
    weights = {name: weakref.ref(base.model.get_submodule(name).weight) for name in names}
    runner = ModelRunner(base, cpu_kernels("float32"), CpuKVCache(base.kv_shape, num_blocks=4), num_adapter_slots=1)
    fused = runner.fuse()
    assert runner.verify("float32") <= 5e-6 * max(1, float(base.reference.logits.abs().max()))
    assert [name for name, weight in weights.items() if weight() is not None] == []
    assert fused == Counter({**FUSED[model_type], "replay": REPLAYED.get(model_type, 2)})


@pytest.mark.skipif(not native.available(), reason="the native kernels are not built")
def test_half_width_weights_fuse_the_same_parts() -> None:
    """Where x is rounded for them, and K and V in their cache, a last bit of one part's output is much more after."""
    fused = []
    for storage in ("float32", "bfloat16"):
        wide = {"hidden_size": 512, "num_attention_heads": 8, "num_hidden_layers": 8, "initializer_range": 0.1}
        base = prepare_base_model(tiny("llama", wide), "llama", CPU)
        cache = CpuKVCache(base.kv_shape, num_blocks=4, dtype=getattr(torch, storage))
        fused.append(ModelRunner(base, cpu_kernels(storage), cache, num_adapter_slots=1).fuse())
    assert fused[0] == fused[1]
    assert fused[0]["decoder layer"] == 8


def test_soft_caps_and_sinks_are_noticed() -> None:
    special = {
        model_type
        for model_type in ("llama", "mistral", "gemma2", "gemma3_text", "gpt_oss")
        if not prepare_base_model(tiny(model_type, SERVED[model_type]), model_type, CPU).kv_shape.plain_attention
    }
    assert special == {"gemma2", "gpt_oss"}


@pytest.mark.parametrize("model_type", REFUSED)
def test_refused_with_the_reason(model_type: str) -> None:
    settings, reason = REFUSED[model_type]
    with pytest.raises(ConfigError, match=reason):
        prepare_base_model(tiny(model_type, settings), model_type, CPU)


def test_an_attention_that_is_wrong_does_not_serve() -> None:
    """The self-check is real: a model whose weights change after its reference was taken is caught."""
    base = prepare_base_model(tiny("llama", {}), "llama", CPU)
    runner = torch_runner(base)
    runner.verify("float32")
    base.model.get_parameter("model.layers.0.input_layernorm.weight").mul_(1.5)
    with pytest.raises(ConfigError, match="logits differ"):
        runner.verify("float32")


def test_the_digest_covers_every_weight() -> None:
    model = tiny("llama", {})
    digest = prepare_base_model(model, "llama", CPU).digest
    assert prepare_base_model(tiny("llama", {}), "llama", CPU).digest == digest
    changed = tiny("llama", {})
    with torch.no_grad():
        changed.model.layers[1].mlp.down_proj.weight[0, 0] += 1e-6
    assert prepare_base_model(changed, "llama", CPU).digest != digest

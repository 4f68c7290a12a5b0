"""Mixtures of experts in 16 bits: rounding that flips a router's choice is no fault, and every fault still is one."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from server.engine.choices import Choices, SameChoices
from server.engine.cpu_kv_cache import CpuKVCache
from server.engine.model import prepare_base_model
from server.engine.model_runner import ModelRunner
from server.errors import ConfigError
from server.kernels import Storage, native
from server.kernels.cpu import cpu_kernels
from server.kernels.native_fused import Activation
from tests.server.engine.test_model import COMMON, CPU, SERVED

MIXTURES = ("mixtral", "qwen3_moe", "olmoe", "gpt_oss", "glm4_moe")
needs_native = pytest.mark.skipif(not native.available(), reason="the native kernels are not built")


def mixture(model_type: str, seed: int) -> Any:
    """A model with many experts far from each other, so that some nearly tie and each flip shows in the logits."""
    torch.manual_seed(seed)
    many = {"num_experts": 16, "num_local_experts": 16, "norm_topk_prob": True, "initializer_range": 0.2}
    settings = {**COMMON, **SERVED[model_type], **many, "num_hidden_layers": 4, "layer_types": None}
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **settings))


def checked(model: Any, storage: Storage, damage: Callable[[Any], None] = lambda _: None) -> float:
    """What the self-check finds, after the model's own answers were taken and something was done to it."""
    base = prepare_base_model(model, "mixture", CPU)
    damage(base.model)
    dtype = torch.bfloat16 if storage == "bfloat16" else torch.float32
    cache = CpuKVCache(base.kv_shape, num_blocks=4, dtype=dtype)
    runner = ModelRunner(base, cpu_kernels(storage), cache, num_adapter_slots=1)
    runner.fuse()
    return runner.verify(storage)


@needs_native
@pytest.mark.parametrize("seed", [4, 5, 6])
@pytest.mark.parametrize("model_type", MIXTURES)
def test_mixtures_start_in_16_bits(model_type: str, seed: int) -> None:
    assert checked(mixture(model_type, seed), "bfloat16") > 0


def _experts(model: Any) -> Any:
    return next(module for module in model.modules() if hasattr(module, "is_transposed"))


def _broken_experts(model: Any) -> None:
    _experts(model).down_proj[::2] *= -1


def _swapped_experts(model: Any) -> None:
    experts = _experts(model)
    experts.gate_up_proj.copy_(experts.gate_up_proj.roll(1, dims=0))


def _broken_router(model: Any) -> None:
    for name, parameter in model.named_parameters():
        if name.endswith(("gate.weight", "router.weight")):
            parameter.copy_(parameter.roll(2, dims=0))


def _broken_norm(model: Any) -> None:
    model.model.layers[1].post_attention_layernorm.weight.mul_(1.5)


@needs_native
@torch.inference_mode()
@pytest.mark.parametrize("damage", [_broken_experts, _swapped_experts, _broken_router, _broken_norm])
@pytest.mark.parametrize("model_type", MIXTURES)
def test_a_fault_is_refused(model_type: str, damage: Callable[[Any], None]) -> None:
    with pytest.raises(ConfigError, match="logits differ"):
        checked(mixture(model_type, seed=4), "bfloat16", damage)


@needs_native
def test_a_wrong_kernel_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("server.engine.experts._activation", lambda module: Activation.RELU)
    with pytest.raises(ConfigError, match="logits differ"):
        checked(mixture("mixtral", seed=4), "bfloat16")


def chosen(scores: list[list[float]], noted: list[list[int]], tolerance: float) -> tuple[list[Any], list[Any]]:
    choices = Choices(num_tokens=len(noted))
    with choices:
        torch.zeros(len(noted), 3).scatter(1, torch.tensor(noted), 1.0).topk(len(noted[0]), dim=-1)
    with SameChoices(choices.noted, torch.tensor([1, 0]), tolerance):
        values, indices = torch.tensor(scores).topk(len(noted[0]), dim=-1)
    return values.tolist(), indices.tolist()


def test_what_nearly_ties_is_chosen_as_noted() -> None:
    """Row by row; the scores are those of this time."""
    values, indices = chosen([[4.0, 3.5, 0.0], [4.0, 1.0, 0.0]], noted=[[1], [1]], tolerance=0.1)
    assert values == [[3.5], [4.0]]
    assert indices == [[1], [0]]


def test_rows_are_found_by_their_positions() -> None:
    _, indices = chosen([[1.0, 1.0, 1.0], [1.0, 1.0, 1.0]], noted=[[2], [1]], tolerance=0.2)
    assert indices == [[1], [2]]


def test_experts_of_masked_groups_are_never_near() -> None:
    _, indices = chosen([[-float("inf"), 1.0, 0.9], [1.0, -float("inf"), -float("inf")]], [[1], [0]], tolerance=0.2)
    assert indices == [[1], [0]]


def test_a_choice_of_something_else_is_left_alone() -> None:
    choices = Choices(num_tokens=2)
    with choices:
        torch.eye(3).topk(1)
    with SameChoices(choices.noted, torch.tensor([0, 1]), tolerance=1):
        assert torch.eye(2).topk(1).indices.tolist() == [[0], [1]]

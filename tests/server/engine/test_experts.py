"""Packed experts against the model's own, on every kind of mixture: values, bits, and no weight in memory twice."""

import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from server.engine.experts import pack_experts
from server.kernels import native
from server.kernels.cpu import cpu_kernels
from tests.server.engine.test_model import SERVED, tiny

pytestmark = pytest.mark.skipif(not native.available(), reason="the native kernels are not built")

MIXTURES = ("mixtral", "qwen3_moe", "olmoe", "gpt_oss")


def mixture(model_type: str) -> Any:
    """The experts of a model's first layer; biases are drawn like weights, so that each shows."""
    model = tiny(model_type, SERVED[model_type])
    experts = next(module for module in model.modules() if hasattr(module, "is_transposed"))
    for parameter in experts.parameters():
        nn.init.normal_(parameter, std=0.5)
    return experts


def routed(num_tokens: int) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens [num_tokens, 32] with two of four experts each, and their shares."""
    scores = torch.randn(num_tokens, 4)
    weights, index = scores.softmax(dim=-1).topk(2, dim=-1)
    return torch.randn(num_tokens, 32), index, weights


@torch.inference_mode()
@pytest.mark.parametrize("model_type", MIXTURES)
def test_values_bits_and_memory(model_type: str) -> None:
    experts = mixture(model_type)
    tokens = routed(37)
    expected = experts(*tokens)
    weights = [weakref.ref(experts.gate_up_proj), weakref.ref(experts.down_proj)]
    assert pack_experts(experts, cpu_kernels("float32").linear_group) == 1
    assert all(weight() is None for weight in weights)
    got = experts(*tokens)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    alone = [experts(*(part[row : row + 1] for part in tokens)) for row in range(37)]
    assert torch.equal(torch.cat(alone), got)


@torch.inference_mode()
def test_a_gate_that_is_not_known_is_computed_by_the_model() -> None:
    experts = mixture("gpt_oss")
    experts.limit = 0.5  # as no native activation has it
    tokens = routed(9)
    expected = experts(*tokens)
    pack_experts(experts, cpu_kernels("float32").linear_group)
    torch.testing.assert_close(experts(*tokens), expected, rtol=1e-5, atol=1e-5)


@torch.inference_mode()
@pytest.mark.parametrize("storage", ["bfloat16", "int8"])
def test_experts_are_stored_as_all_layers_are(storage: Any) -> None:
    experts = mixture("mixtral")
    tokens = routed(9)
    expected = experts(*tokens)
    pack_experts(experts, cpu_kernels(storage).linear_group)
    got = experts(*tokens)
    difference = float((got - expected).abs().max() / expected.abs().max())
    assert 0 < difference < 0.05


@torch.inference_mode()
def test_a_gate_that_is_clamped_far_out_is_not_taken_for_one_that_is_not() -> None:
    experts = mixture("mixtral")
    apply_gate = experts._apply_gate
    experts._apply_gate = lambda both: apply_gate(both.clamp(max=30))
    hidden_states, *choice = routed(9)
    tokens = (40 * hidden_states, *choice)
    expected = experts(*tokens)
    pack_experts(experts, cpu_kernels("float32").linear_group)
    torch.testing.assert_close(experts(*tokens), expected, rtol=1e-4, atol=1e-4)

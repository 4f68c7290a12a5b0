"""What becomes of an adapter's files beside the base's weights."""

from typing import Any

import pytest
import torch
from torch import Tensor

from adapters.config import AdapterConfig
from adapters.errors import AdapterFormatError, AdapterIncompatibleError
from adapters.format import AdapterFiles, LoRAWeights
from adapters.tensors import LinearShape
from server.lora.adapter import Adapter, CheckedAdapter
from server.lora.base_weights import BaseWeights

WEIGHT = torch.randn(3, 5, generator=torch.Generator().manual_seed(0))


def made(
    weights: dict[str, LoRAWeights],
    biases: dict[str, Tensor] | None = None,
    dtype: torch.dtype | None = None,
    **settings: Any,
) -> Adapter:
    """On a base of two layers, of which the second has a bias of ones."""
    base = BaseWeights({name: LinearShape(5, 3) for name in "ab"}, torch.float32)
    base.add("a", lambda start, end: WEIGHT[start:end])
    base.add("b", lambda start, end: WEIGHT[start:end], torch.ones(3))
    config = AdapterConfig(rank=1, alpha=2, target_modules=("a", "b"), **settings)
    return Adapter.from_files(
        AdapterFiles(config, weights, {}, "", 0, base_biases=biases or {}), "adapter", "1", 1, base, dtype
    )


def lora(dtype: torch.dtype = torch.float32, magnitude: Tensor | None = None) -> LoRAWeights:
    return LoRAWeights(torch.ones(1, 5, dtype=dtype), torch.ones(3, 1, dtype=dtype), 2.0, magnitude=magnitude)


def test_factors_of_any_width_lie_beside_float32_extras() -> None:
    adapter = made({"a": lora(torch.bfloat16)}, {"b": torch.tensor([1.0, 3.0, 1.0])})
    assert adapter.num_bytes == 2 * (5 + 3) + 4 * 3
    assert adapter.weights["a"].lora_b.dtype is torch.bfloat16
    assert adapter.weights["b"].lora_a.shape == (0, 5)
    assert adapter.weights["b"].bias is not None
    assert adapter.weights["b"].bias.tolist() == [0.0, 2.0, 0.0]
    assert adapter.no_mix == "it adds biases"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_factors_are_held_in_another_format_if_asked(dtype: torch.dtype) -> None:
    third = LoRAWeights(torch.full((1, 5), 1 / 3), torch.full((3, 1), 1 / 3), 2.0, magnitude=torch.ones(3))
    adapter = made({"b": third}, dtype=dtype)
    assert adapter.num_bytes == 2 * (5 + 3) + 2 * 4 * 3
    layer = adapter.weights["b"]
    assert layer.lora_a.dtype is layer.lora_b.dtype is dtype
    assert torch.equal(layer.lora_a, third.lora_a.to(dtype))
    assert layer.gain is not None
    assert layer.gain.dtype is torch.float32


def test_factors_that_the_asked_format_does_not_reach_are_refused() -> None:
    large = LoRAWeights(torch.full((1, 5), 65536.0), torch.ones(3, 1), 2.0)
    made({"a": large}, dtype=torch.bfloat16)
    with pytest.raises(AdapterFormatError, match=r"a has values up to 6.55e\+04, and float16 ends at .*--dtype") as e:
        made({"a": large}, dtype=torch.float16)
    assert e.value.reason == "NON_FINITE_WEIGHTS"


def test_a_copy_of_the_bases_own_weight_takes_no_room() -> None:
    base = BaseWeights({"a": LinearShape(5, 3)}, torch.float32)
    base.add("a", lambda start, end: WEIGHT[start:end])
    config = AdapterConfig(rank=1, alpha=2, target_modules=("a",))
    files = AdapterFiles(config, {"a": lora()}, {}, "", 10_000, base_weights={"a": WEIGHT.clone()})
    assert CheckedAdapter.from_files(files, base).num_bytes == 4 * (5 + 3)


def test_a_bias_that_is_the_bases_own_is_nothing() -> None:
    adapter = made({"a": lora()}, {"b": torch.ones(3)})
    assert adapter.weights.keys() == {"a"}
    assert not adapter.no_mix


def test_dora_is_a_gain_on_the_layers_own_output() -> None:
    magnitude = torch.tensor([1.0, 2.0, -3.0])
    layer = made({"b": lora(magnitude=magnitude)}).weights["b"]
    gain = magnitude / (WEIGHT + 2.0).norm(dim=1)
    torch.testing.assert_close(layer.gain, gain)
    torch.testing.assert_close(layer.bias, 1 - gain)  # the base's bias is not rescaled


def test_what_follows_from_a_layer_that_lacks_something() -> None:
    with pytest.raises(AdapterIncompatibleError, match="the bias of a was trained, and the base model has none"):
        made({"b": lora()}, {"a": torch.ones(3)})
    cancelled = LoRAWeights(torch.ones(1, 5), torch.zeros(3, 1), 1.0, magnitude=torch.zeros(3))
    base = BaseWeights({"a": LinearShape(5, 3)}, torch.float32)
    base.add("a", lambda start, end: torch.zeros(end - start, 5))
    files = AdapterFiles(AdapterConfig(rank=1, alpha=1, target_modules=("a",)), {"a": cancelled}, {}, "", 0)
    with pytest.raises(AdapterIncompatibleError, match="norm of a's weights, and some of them are zero"):
        Adapter.from_files(files, "adapter", "1", 1, base)


def test_where_an_invoked_adapter_begins() -> None:
    plain, invoked = made({"a": lora()}), made({"a": lora()}, invocation_tokens=(7, 9))
    prompts: list[list[int]] = [[7, 9, 7, 7, 9, 7], [7, 9], [9, 7], [7], []]
    assert [invoked.first_token(prompt) for prompt in prompts] == [3, 0, None, None, None]
    assert [plain.first_token(prompt) for prompt in prompts] == [0] * 5


@pytest.mark.parametrize("bias", ["lora_only", "all"])
def test_biases_that_would_work_before_the_invocation_are_refused(bias: str) -> None:
    """Only what was trained; a bias of B works from the invocation on, like B itself."""
    biases = {"b": torch.tensor([1.0, 3.0, 1.0])}
    with pytest.raises(AdapterIncompatibleError, match=rf"bias='{bias}' .*alora_invocation_tokens"):
        made({"b": lora()}, biases, bias=bias, invocation_tokens=(7, 9))
    made({"b": lora()}, biases, bias=bias)
    made({"a": lora()}, bias=bias, invocation_tokens=(7, 9))  # no layer of it has a bias
    of_b = LoRAWeights(torch.ones(1, 5), torch.ones(3, 1), 2.0, lora_bias=torch.ones(3))
    assert made({"b": of_b}, invocation_tokens=(7, 9), lora_bias=True).weights["b"].bias is not None

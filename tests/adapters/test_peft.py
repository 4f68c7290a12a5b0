"""An adapter trained here is the same adapter in PEFT."""

from collections.abc import Callable
from pathlib import Path

import peft
import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaForCausalLM

from adapters.lora import inject_lora, target_modules
from adapters.train import save_adapter
from adapters.train_config import TrainConfig
from tests.adapters.conftest import logits, randomize


@pytest.mark.parametrize("rslora", [False, True])
def test_same_answers_as_peft(make_model: Callable[[], LlamaForCausalLM], tmp_path: Path, rslora: bool) -> None:
    model = make_model()
    config = TrainConfig(rank=4, alpha=6, rslora=rslora, targets=("all-linear",))
    layers = inject_lora(model, config.targets, rank=4, alpha=6, rslora=rslora)
    randomize(layers)
    expected = logits(model)

    wrapped = peft.get_peft_model(
        make_model(), peft.LoraConfig(r=4, lora_alpha=6, target_modules="all-linear", use_rslora=rslora)
    )
    with torch.no_grad():
        for name, layer in layers.items():
            theirs = wrapped.get_submodule(f"base_model.model.{name}")
            theirs.get_parameter("lora_A.default.weight").copy_(layer.lora_a.weight)
            theirs.get_parameter("lora_B.default.weight").copy_(layer.lora_b.weight)
    torch.testing.assert_close(logits(wrapped), expected, rtol=1e-5, atol=1e-5)

    save_adapter(tmp_path / "adapter", model, layers, config, "tiny")
    loaded = peft.PeftModel.from_pretrained(make_model(), str(tmp_path / "adapter"))
    torch.testing.assert_close(logits(loaded), expected, rtol=1e-5, atol=1e-5)


def test_conv1d_is_written_as_peft_reads_it(tmp_path: Path) -> None:
    def make() -> GPT2LMHeadModel:
        torch.manual_seed(0)
        config = GPT2Config(n_layer=1, n_embd=16, n_head=2, vocab_size=32, bos_token_id=None, eos_token_id=0)
        model: GPT2LMHeadModel = GPT2LMHeadModel(config).eval()
        return model

    model = make()
    layers = inject_lora(model, "all-linear", rank=2, alpha=4)
    assert {name.rpartition(".")[2] for name in layers} == {"c_attn", "c_proj", "c_fc"}
    randomize(layers)
    save_adapter(tmp_path / "adapter", model, layers, TrainConfig(rank=2, alpha=4), "tiny")
    loaded = peft.PeftModel.from_pretrained(make(), str(tmp_path / "adapter"))
    torch.testing.assert_close(logits(loaded), logits(model), rtol=1e-5, atol=1e-5)


def test_saved_targets_are_paths_where_a_name_would_reach_too_far(
    make_model: Callable[[], LlamaForCausalLM], tmp_path: Path
) -> None:
    model = make_model()
    layers = inject_lora(model, "model.layers.1.self_attn.q_proj", rank=2, alpha=2)
    randomize(layers)
    assert target_modules(model, layers) == ("model.layers.1.self_attn.q_proj",)
    save_adapter(tmp_path / "adapter", model, layers, TrainConfig(rank=2, alpha=2), "tiny")
    loaded = peft.PeftModel.from_pretrained(make_model(), str(tmp_path / "adapter"))
    torch.testing.assert_close(logits(loaded), logits(model), rtol=1e-5, atol=1e-5)

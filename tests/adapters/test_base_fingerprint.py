"""What tells one base model from another, and how it travels with an adapter."""

from pathlib import Path

import peft
import pytest
import torch

from adapters.base_fingerprint import base_fingerprint
from adapters.format import read_adapter
from adapters.lora import inject_lora
from adapters.tensors import LinearShape
from adapters.train import save_adapter
from adapters.train_config import TrainConfig
from server.engine.model import load_base_model
from tests.conftest import tiny_llama


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_trainer_and_server_see_the_same_base(model_dir: Path, dtype: torch.dtype) -> None:
    base = load_base_model(str(model_dir), "tiny", torch.device("cpu"), dtype)
    assert base.fingerprint == base_fingerprint(tiny_llama()) != ""


def test_another_base_is_another() -> None:
    ours, theirs = tiny_llama(), tiny_llama()
    with torch.no_grad():
        theirs.model.norm.weight.mul_(1.01)
    assert base_fingerprint(theirs) != base_fingerprint(ours)


def test_through_float16_nothing_is_sure() -> None:
    assert base_fingerprint(tiny_llama().half()) == ""


def test_an_adapter_carries_it_and_peft_reads_past_it(tmp_path: Path) -> None:
    model = tiny_llama()
    fingerprint = base_fingerprint(model)
    layers = inject_lora(model, "q_proj", rank=2, alpha=4)
    save_adapter(tmp_path / "adapter", model, layers, TrainConfig(rank=2, alpha=4), "tiny", fingerprint)
    shapes = {name: LinearShape(layer.lora_a.in_features, layer.lora_b.out_features) for name, layer in layers.items()}
    assert read_adapter(tmp_path / "adapter", shapes, max_rank=2).base_fingerprint == fingerprint
    peft.PeftModel.from_pretrained(tiny_llama(), str(tmp_path / "adapter"))

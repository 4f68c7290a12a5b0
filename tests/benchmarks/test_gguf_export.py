"""GGUF files, read back, hold the numbers of the model folder and of PEFT's files."""

from pathlib import Path

import gguf
import numpy as np
import pytest
import safetensors.torch
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from benchmarks.gguf_export import export_model
from benchmarks.material import Material
from server.errors import ConfigError
from tests.conftest import VOCAB_SIZE

HEADS = {"attn_q": 4, "attn_k": 2}  # of the tiny Llama
NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


@pytest.fixture(scope="module")
def material(model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Material:
    return Material(model_dir, tmp_path_factory.mktemp("work"), progress=lambda text: None)


def read_gguf(path: Path) -> dict[str, Tensor]:
    return {
        tensor.name: torch.from_numpy(np.array(gguf.dequantize(tensor.data, tensor.tensor_type)))
        for tensor in gguf.GGUFReader(path).tensors
    }


def halves(weight: Tensor, heads: int) -> Tensor:
    """Rows of each head from pairs, as llama.cpp has them, to Hugging Face's two halves."""
    return torch.cat([part for head in weight.chunk(heads) for part in (head[0::2], head[1::2])])


def test_an_adapter_in_gguf_holds_pefts_numbers(material: Material) -> None:
    (folder,), (path,) = material.adapters((8,), 1), material.gguf_adapters((8,), 1)
    peft_tensors = safetensors.torch.load_file(folder / "adapter_model.safetensors")
    tensors = read_gguf(path)
    assert len(tensors) == len(peft_tensors) == 2 * 2 * len(NAMES)
    for layer in range(2):
        for module, name in NAMES.items():
            prefix = f"base_model.model.model.layers.{layer}.{module}"
            a, b = (tensors[f"blk.{layer}.{name}.weight.lora_{part}"] for part in "ab")
            assert torch.equal(a, peft_tensors[f"{prefix}.lora_A.weight"])
            assert torch.equal(halves(b, HEADS[name]) if name in HEADS else b, peft_tensors[f"{prefix}.lora_B.weight"])


def test_an_adapter_in_gguf_says_its_scale(material: Material) -> None:
    fields = gguf.GGUFReader(material.gguf_adapters((8,), 1)[0]).fields
    assert fields["adapter.lora.alpha"].contents() == 16
    assert fields["general.type"].contents() == "adapter"
    assert fields["adapter.type"].contents() == "lora"


@pytest.mark.parametrize(("quantization", "tolerance"), [("f32", 0.0), ("f16", 1e-3), ("q8_0", 1e-2)])
def test_a_model_in_gguf_holds_the_folders_numbers(material: Material, quantization: str, tolerance: float) -> None:
    tensors = read_gguf(material.gguf_model(quantization))
    state = AutoModelForCausalLM.from_pretrained(material.model, dtype=torch.float32).state_dict()
    assert len(tensors) == len(state)
    pairs = [("output.weight", "lm_head.weight"), ("token_embd.weight", "model.embed_tokens.weight")]
    pairs += [
        ("output_norm.weight", "model.norm.weight"),
        ("blk.1.ffn_norm.weight", "model.layers.1.post_attention_layernorm.weight"),
    ]
    pairs += [(f"blk.1.{name}.weight", f"model.layers.1.{module}.weight") for module, name in NAMES.items()]
    for name, original in pairs:
        heads = HEADS.get(name.split(".")[-2])
        restored = halves(tensors[name], heads) if heads else tensors[name]
        torch.testing.assert_close(restored, state[original], rtol=0, atol=tolerance)


def test_a_model_in_gguf_has_the_settings_of_the_folder(material: Material) -> None:
    fields = gguf.GGUFReader(material.gguf_model("f32")).fields
    config = AutoConfig.from_pretrained(material.model)
    assert fields["llama.attention.head_count_kv"].contents() == config.num_key_value_heads
    assert fields["llama.rope.freq_base"].contents() == config.rope_parameters["rope_theta"]
    assert fields["llama.vocab_size"].contents() == len(fields["tokenizer.ggml.tokens"].contents()) == VOCAB_SIZE


def test_a_model_of_another_architecture_is_refused(tmp_path: Path) -> None:
    from transformers import Qwen2Config, Qwen2ForCausalLM

    config = Qwen2Config(
        vocab_size=8,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
    )
    Qwen2ForCausalLM(config).save_pretrained(tmp_path / "other")
    with pytest.raises(ConfigError, match="other is a qwen2 model: only Llama models are written as GGUF"):
        export_model(tmp_path / "other", tmp_path / "other.gguf", "f32")


def test_a_failed_conversion_leaves_nothing_behind(material: Material) -> None:
    with pytest.raises(ConfigError, match="optimum-cli cannot be run"):
        material.openvino_model(material.folder / "no-python", "float32")
    assert not any((material.folder / "openvino").iterdir())

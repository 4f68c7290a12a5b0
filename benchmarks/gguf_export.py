"""A Llama model folder and PEFT adapters → GGUF files for llama.cpp.

llama.cpp rotates neighbouring pairs of a head where Hugging Face rotates its two halves, so the rows of the query and
key projections (of an adapter: the rows of B) change places. Else only the names differ.
"""

import json
from pathlib import Path
from typing import Any

import gguf
import safetensors.torch
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

from server.errors import ConfigError

QUANTIZATIONS = {
    "f32": (gguf.GGMLQuantizationType.F32, gguf.LlamaFileType.ALL_F32),
    "f16": (gguf.GGMLQuantizationType.F16, gguf.LlamaFileType.MOSTLY_F16),
    "q8_0": (gguf.GGMLQuantizationType.Q8_0, gguf.LlamaFileType.MOSTLY_Q8_0),
}

_PREFIX, _PARTS = "base_model.model.", {"lora_A": "lora_a", "lora_B": "lora_b"}


def export_model(folder: Path, target: Path, quantization: str) -> None:
    """Writes the model with its matrices in `quantization`; vectors stay float32.

    Raises:
        ConfigError: the model is no Llama.
    """
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    config = model.config
    if not isinstance(config, LlamaConfig):
        raise ConfigError(f"{folder.name} is a {config.model_type} model: only Llama models are written as GGUF")
    matrix_type, file_type = QUANTIZATIONS[quantization]
    writer = gguf.GGUFWriter(target, "llama")
    writer.add_file_type(file_type)
    _add_settings(writer, config)
    _add_vocabulary(writer, folder, config.vocab_size)
    tied = {"lm_head.weight"} if config.tie_word_embeddings else set()
    for name, tensor in model.state_dict().items():
        if name in tied:
            continue
        values = _reorder(name, tensor, config).numpy()
        if tensor.dim() == 1:
            writer.add_tensor(_gguf_name(name, config), values)
        else:
            writer.add_tensor(_gguf_name(name, config), gguf.quantize(values, matrix_type), raw_dtype=matrix_type)
    _write(writer)


def export_adapter(folder: Path, base: Path, target: Path) -> None:
    """Writes an adapter in float32. llama.cpp scales it by alpha over the rank that it finds, as PEFT does."""
    config = LlamaConfig.from_pretrained(base)
    writer = gguf.GGUFWriter(target, "llama")
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    alpha = json.loads((folder / "adapter_config.json").read_text())["lora_alpha"]
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, alpha)
    for name, tensor in safetensors.torch.load_file(folder / "adapter_model.safetensors").items():
        module, part, _ = name.removeprefix(_PREFIX).rsplit(".", 2)
        if part == "lora_B":
            tensor = _reorder(f"{module}.weight", tensor, config)
        writer.add_tensor(f"{_gguf_name(f'{module}.weight', config)}.{_PARTS[part]}", tensor.float().numpy())
    _write(writer)


def _gguf_name(name: str, config: LlamaConfig) -> str:
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    found: str | None = names.get_name(name, try_suffixes=(".weight",))
    if found is None:
        raise ConfigError(f"GGUF has no name for {name} of a Llama model")
    return found


def _reorder(name: str, weight: Tensor, config: LlamaConfig) -> Tensor:
    """Rows of a query or key head: [first half, second half] → [pair, pair, …]. Other weights stay as they are."""
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(name.split(".")[-2])
    if heads is None:
        return weight
    rows, columns = weight.shape
    return weight.view(heads, 2, rows // heads // 2, columns).transpose(1, 2).reshape(rows, columns)


def _add_settings(writer: Any, config: LlamaConfig) -> None:
    rope: dict[str, Any] = config.rope_parameters or {}  # type: ignore[assignment]
    if rope.get("rope_type", "default") != "default":
        raise ConfigError(f"rope_type {rope['rope_type']!r} is not written as GGUF: only the default one is")
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(rope["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)


def _add_vocabulary(writer: Any, folder: Path, vocab_size: int) -> None:
    """Every token by its id. Only ids travel in a comparison, so how llama.cpp would cut a text is left open."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokens = [f"[unused {index}]" for index in range(vocab_size)]
    types = [gguf.TokenType.UNUSED] * vocab_size
    for token, index in tokenizer.get_vocab().items():
        special = index in tokenizer.all_special_ids
        tokens[index], types[index] = token, gguf.TokenType.CONTROL if special else gguf.TokenType.NORMAL
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    gguf.SpecialVocab(folder, load_merges=True, n_vocab=vocab_size).add_to_gguf(writer, quiet=True)


def _write(writer: Any) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()

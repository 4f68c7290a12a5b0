"""A tiny random Llama with a byte-level tokenizer, and tiny adapters made by PEFT: all built on the spot."""

import os
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

torch.set_num_threads(1)  # tiny matrices, and the tests of a kernel choose for themselves

EOS = 256
VOCAB_SIZE = 264  # wider than the tokenizer, as real models are

ADAPTERS: dict[str, dict[str, Any]] = {
    "plain": {"r": 8, "lora_alpha": 16, "target_modules": "all-linear"},
    "attention": {"r": 4, "lora_alpha": 4, "target_modules": ["q_proj", "v_proj"]},
    "feed-forward": {"r": 3, "lora_alpha": 12, "target_modules": ["gate_proj", "up_proj", "down_proj"]},
    "rslora": {"r": 16, "lora_alpha": 8, "target_modules": ["q_proj", "o_proj", "up_proj"], "use_rslora": True},
    "rank-pattern": {"r": 2, "lora_alpha": 4, "target_modules": ["k_proj", "o_proj"], "rank_pattern": {"o_proj": 7}},
    "alpha-pattern": {
        "r": 5,
        "lora_alpha": 10,
        "target_modules": ["q_proj", "down_proj"],
        "alpha_pattern": {r"layers\.1\.mlp\.down_proj": 40},
    },
    "one-layer": {"r": 1, "lora_alpha": 2, "target_modules": ["q_proj", "gate_proj"], "layers_to_transform": [1]},
    "head": {"r": 6, "lora_alpha": 6, "target_modules": ["lm_head", "k_proj"]},
    "embedding": {"r": 4, "lora_alpha": 8, "target_modules": ["embed_tokens", "v_proj"]},
    "dora": {"r": 5, "lora_alpha": 10, "target_modules": ["q_proj", "o_proj", "up_proj"], "use_dora": True},
    "dora-ends": {"r": 3, "lora_alpha": 6, "target_modules": ["embed_tokens", "lm_head"], "use_dora": True},
    "lora-bias": {"r": 4, "lora_alpha": 8, "target_modules": ["k_proj", "down_proj", "lm_head"], "lora_bias": True},
}


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte, so that a character outside ASCII takes several."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {char: index for index, char in enumerate(alphabet)} | {"</s>": EOS}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>")
    fast.chat_template = "{% for message in messages %}[{{ message.role }}]{{ message.content }}{% endfor %}[assistant]"
    return fast


def tiny_llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=256,
        initializer_range=0.2,  # wide enough that the most likely token stands clear of the rest
        eos_token_id=EOS,
        bos_token_id=None,
        tie_word_embeddings=False,
    )
    model = LlamaForCausalLM(config)
    model.eval()
    return model


def save_adapter(
    model: torch.nn.Module,
    folder: Path,
    seed: int,
    std: float = 0.1,
    save_embedding_layers: bool | str = False,
    **config: Any,
) -> None:
    """Writes an adapter with random A and B as PEFT does; the model is left as it was, but for biases that train."""
    torch.manual_seed(seed)
    wrapped = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", **config))
    for name, parameter in wrapped.named_parameters():
        if "lora_magnitude" in name:
            parameter.data *= 1 + 2 * std * torch.rand_like(parameter)
        elif "lora_" in name:
            torch.nn.init.normal_(parameter, std=std)
        elif name.endswith(".bias") and parameter.requires_grad:
            parameter.data += std * torch.randn_like(parameter)
    wrapped.save_pretrained(str(folder), save_embedding_layers=save_embedding_layers)
    wrapped.unload()


def save_base(model: PreTrainedModel, folder: Path) -> Path:
    """A base model as a server finds it: weights, generation config and tokenizer."""
    model.generation_config = GenerationConfig(eos_token_id=EOS)
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def require_tool() -> Callable[[str], str]:
    """The path of a program; a test that lacks it is skipped, and fails in CI."""

    def find(name: str) -> str:
        if path := shutil.which(name):
            return path
        if os.environ.get("CI"):
            pytest.fail(f"{name} is not installed, and in CI no test may skip")
        pytest.skip(f"{name} is not installed")

    return find


@pytest.fixture
def opened() -> Iterator[list[str]]:
    """The files and folders that are opened meanwhile, in order; one with an opener of its own is named twice."""
    paths: list[str] = []
    listening = True

    def note(event: str, args: tuple[Any, ...]) -> None:
        if listening and event in ("open", "os.listdir", "os.scandir"):
            paths.append(str(args[0]))

    sys.addaudithook(note)  # for good: no hook is ever removed
    yield paths
    listening = False


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_base(tiny_llama(), tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="session")
def adapters_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One folder per entry of ADAPTERS; read only, shared by all tests."""
    root = tmp_path_factory.mktemp("adapters")
    model = tiny_llama()
    for seed, (name, config) in enumerate(ADAPTERS.items()):
        save_adapter(model, root / name, seed, **config)
    return root


@pytest.fixture
def make_adapter(tmp_path: Path) -> Callable[..., Path]:
    """Writes one adapter into a folder of the test's own."""

    def make(name: str = "fresh", seed: int = 0, root: Path = tmp_path, **config: Any) -> Path:
        save_adapter(tiny_llama(), root / name, seed, **{"r": 4, "target_modules": ["q_proj", "v_proj"], **config})
        return root / name

    return make

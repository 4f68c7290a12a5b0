import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from adapters.data import IGNORED, Example
from adapters.lora import LoRALinear
from tests.conftest import EOS, byte_tokenizer, tiny_llama

TOKENS = torch.arange(24).view(2, 12)
CHAT_TEMPLATE = (
    "{% for message in messages %}<{{ message.role }}>{{ message.content }}{{ eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.fixture
def model() -> LlamaForCausalLM:
    return tiny_llama()


@pytest.fixture
def make_model() -> Callable[[], LlamaForCausalLM]:
    return tiny_llama


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


@pytest.fixture
def write_lines(tmp_path: Path) -> Callable[..., Path]:
    """Writes records, or raw lines, to a file."""

    def write(*lines: Any, name: str = "train.jsonl") -> Path:
        path = tmp_path / name
        path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
        return path

    return write


def letters(count: int, seed: int = 0) -> list[Example]:
    """A task that a tiny model learns in a few steps: whatever token comes first, the answer is the same."""
    source = torch.Generator().manual_seed(seed)
    firsts: Sequence[int] = torch.randint(0, 64, (count,), generator=source).tolist()
    answer = (71, 72, EOS)
    return [Example((first, 70, *answer), (IGNORED, IGNORED, *answer)) for first in firsts]


def randomize(layers: dict[str, LoRALinear]) -> None:
    for layer in layers.values():
        nn.init.normal_(layer.lora_b.weight, std=0.1)


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        result: Tensor = model(input_ids=TOKENS).logits
    return result

"""Equality once on the real base model, with adapters of every kind that the tiny one has."""

import contextlib
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from server.base_models import cache_dir
from tests.conftest import ADAPTERS, save_adapter
from tests.server.engine.conftest import Engine

MODEL = cache_dir() / "smollm2-135m"
NUM_TOKENS = 5
NAMES = ["", *ADAPTERS]

pytestmark = pytest.mark.skipif(not MODEL.is_dir(), reason="run 'loraplex models fetch smollm2-135m' first")


@pytest.mark.timeout(600)
@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")
def test_tokens_and_logits_are_pefts(tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
    for seed, (name, config) in enumerate(ADAPTERS.items()):
        save_adapter(model, tmp_path / name, seed, std=0.02, **config)
    reference = peft.PeftModel.from_pretrained(model, str(tmp_path / NAMES[1]), adapter_name=NAMES[1])
    for name in NAMES[2:]:
        reference.load_adapter(str(tmp_path / name), adapter_name=name)
    reference.eval().double()  # PEFT's answer without its own rounding, which in float32 is as large as the tolerance

    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    topics = ("rain", "chess", "bread", "bees")
    texts = [f"{index}. Write a few words about {topics[index % len(topics)]}" for index in range(len(NAMES))]
    prompts = [tokenizer(text)["input_ids"] for text in texts]
    expected, expected_logits = [], []
    for prompt, name in zip(prompts, NAMES, strict=True):
        tokens, logits = _peft_generate(reference, prompt, name)
        expected.append(tokens)
        expected_logits.append(logits)

    engine = Engine(MODEL, max_model_len=256, max_num_batched_tokens=96)
    adapters = {name: engine.load(tmp_path / name) for name in ADAPTERS}
    work = [(prompt, adapters.get(name)) for prompt, name in zip(prompts, NAMES, strict=True)]
    seen: dict[int, list[torch.Tensor]] = {index: [] for index in range(len(prompts))}
    engine.watch_logits(lambda request_id, row: seen[request_id].append(row.clone()))

    assert engine.generate(work, max_tokens=NUM_TOKENS) == expected
    for index, rows in enumerate(expected_logits):
        assert torch.allclose(torch.stack(seen[index]).double(), rows.double(), atol=1e-4, rtol=0), NAMES[index]


def _peft_generate(model: Any, prompt: list[int], name: str) -> tuple[list[int], torch.Tensor]:
    """Greedy tokens and the logits [NUM_TOKENS, vocab_size] they were chosen from."""
    model.generation_config = GenerationConfig(do_sample=False, pad_token_id=0)
    model.set_adapter(name or NAMES[1])
    with contextlib.nullcontext() if name else model.disable_adapter():
        done = model.generate(
            input_ids=torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            max_new_tokens=NUM_TOKENS,
            output_logits=True,
            return_dict_in_generate=True,
        )
    return done.sequences[0, len(prompt) :].tolist(), torch.cat(done.logits)

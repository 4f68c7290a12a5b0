"""Where base models come from."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from server.base_models import cache_dir, fetch, resolve
from server.errors import ConfigError

MODEL = "smollm2-135m"


def test_folders_hub_names_and_embedded_models(
    model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LORAPLEX_CACHE", str(tmp_path))
    assert resolve(str(model_dir)) == str(model_dir)
    assert resolve("org/model") == "org/model"
    with pytest.raises(ConfigError, match=f"loraplex models fetch {MODEL}"):
        resolve(MODEL)
    (tmp_path / "models" / MODEL).mkdir(parents=True)
    assert resolve(MODEL) == str(tmp_path / "models" / MODEL)
    with pytest.raises(ConfigError, match="no such folder"):
        resolve("./nowhere")
    with pytest.raises(ConfigError, match=r"no config\.json"):
        resolve(str(tmp_path))


def test_an_unknown_embedded_model() -> None:
    with pytest.raises(ConfigError, match=MODEL):
        fetch("smollm3", print)


def test_a_second_fetch_finds_the_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORAPLEX_CACHE", str(tmp_path))
    folder = tmp_path / "models" / MODEL
    folder.mkdir(parents=True)
    said: list[str] = []
    assert fetch(MODEL, said.append) == folder
    assert said == [f"already there: {folder}"]


@pytest.mark.skipif(not (cache_dir() / MODEL).is_dir(), reason=f"run 'loraplex models fetch {MODEL}' first")
def test_the_fetched_model_speaks() -> None:
    folder = fetch(MODEL, print)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    prompt: Any = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France?"}], add_generation_prompt=True, return_tensors="pt"
    )
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    answer = model.generate(**prompt, max_new_tokens=12, do_sample=False)
    assert "Paris" in tokenizer.decode(answer[0])

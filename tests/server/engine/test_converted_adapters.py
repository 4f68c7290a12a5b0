"""Adapters whose start changed the base (PiSSA, OLoRA): served as PEFT converts them, mixed in one batch."""

from itertools import cycle
from pathlib import Path
from typing import Any

import peft
import pytest
import torch

from adapters.errors import AdapterIncompatibleError
from server.kernels import native
from tests.conftest import save_adapter, tiny_llama
from tests.server.engine.conftest import Engine, peft_greedy

NUM_TOKENS = 12
INITS = ["pissa", "olora"]


class Trained:
    """An adapter as PEFT made it, on a base of its own that PEFT changed; and its folders."""

    def __init__(self, init: Any, root: Path) -> None:
        config = peft.LoraConfig(
            task_type="CAUSAL_LM", r=4, target_modules=["q_proj", "up_proj"], init_lora_weights=init
        )
        wrapped: Any = peft.get_peft_model(tiny_llama(), config)
        self.raw, self.converted = root / "raw" / init, root / init
        wrapped.save_pretrained(str(self.raw))
        wrapped.peft_config["default"].init_lora_weights = True  # as PEFT wants it before it converts
        wrapped.save_pretrained(str(root / "start" / init))
        torch.manual_seed(len(init))
        for name, parameter in wrapped.named_parameters():
            if "lora_" in name:
                parameter.data += 0.2 * torch.randn_like(parameter)
        wrapped.save_pretrained(
            str(self.converted), path_initial_model_for_weight_conversion=str(root / "start" / init)
        )
        self.model = wrapped


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> list[Trained]:
    root = tmp_path_factory.mktemp("trained")
    return [Trained(init, root) for init in INITS]


def test_without_conversion_it_is_refused(model_dir: Path, trained: list[Trained]) -> None:
    engine = Engine(model_dir)
    for init, adapter in zip(INITS, trained, strict=True):
        with pytest.raises(AdapterIncompatibleError, match=rf"init_lora_weights='{init}'.*changed base model"):
            engine.load(adapter.raw)


@pytest.mark.parametrize("kernels", ["native", "torch"])
def test_converted_ones_answer_as_peft_does_beside_others_and_merged(
    model_dir: Path, tmp_path: Path, prompts: list[list[int]], trained: list[Trained], kernels: str
) -> None:
    if kernels == "native" and not native.available():
        pytest.skip("the native kernels are not built")
    save_adapter(tiny_llama(), tmp_path / "plain", 0, r=8, lora_alpha=16, target_modules="all-linear")
    engine = Engine(model_dir, kernels="torch" if kernels == "torch" else "auto")
    base: Any = tiny_llama()
    references = [adapter.model for adapter in trained]
    references += [peft.PeftModel.from_pretrained(tiny_llama(), str(tmp_path / "plain")).eval(), base]
    converted = [engine.load(adapter.converted) for adapter in trained]
    served = [*converted, engine.load(tmp_path / "plain"), None]
    work = list(zip(prompts[:8], cycle(served), strict=False))
    expected = [
        peft_greedy(model, prompt, None, NUM_TOKENS)
        for prompt, model in zip(prompts[:8], cycle(references), strict=False)
    ]
    for prompt, answer in zip(prompts, expected[: len(trained)], strict=False):
        assert answer != peft_greedy(base, prompt, None, NUM_TOKENS)
    assert engine.generate(work) == expected
    for adapter in converted:
        engine.merge(adapter)
        assert engine.generate(work) == expected

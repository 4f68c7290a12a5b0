"""A base that is stored in 8 or 16 bits: every adapter works with it as in PEFT on the weights that it rounds to."""

from pathlib import Path

import pytest
import torch
from torch import nn

from server.kernels import Storage, native, native_linear
from tests.conftest import tiny_llama
from tests.server.engine.conftest import Engine, peft_logits, peft_model
from tests.server.engine.test_equality import NAMES, mixed

pytestmark = pytest.mark.skipif(not native.available(), reason="the native kernels are not built")

SETTINGS: dict[Storage, dict[str, str]] = {
    "int8": {"quantization": "int8"},
    "bfloat16": {"dtype": "bfloat16", "kv_cache_dtype": "float32", "lora_dtype": "float32"},
}


@pytest.mark.parametrize("storage", SETTINGS)
def test_every_adapter_works_with_the_rounded_base(
    model_dir: Path, adapters_dir: Path, prompts: list[list[int]], storage: Storage
) -> None:
    rounded = tiny_llama()
    for layer in rounded.modules():
        if isinstance(layer, nn.Linear):
            layer.weight.data = native_linear.pack_linear(layer.weight, storage=storage).unpack()
    reference = peft_model(rounded, adapters_dir)

    logits: dict[int, torch.Tensor] = {}
    with native.float32_products():
        engine = Engine(model_dir, **SETTINGS[storage])
        engine.watch_logits(lambda request_id, row: logits.update({request_id: row.clone()}))
        engine.generate(mixed(engine, adapters_dir, prompts), max_tokens=1)

    assert len(logits) == len(prompts) >= len(NAMES)
    for index, prompt in enumerate(prompts):
        name = NAMES[index % len(NAMES)]
        expected = peft_logits(reference, prompt, name)[-1]
        assert torch.allclose(logits[index], expected, atol=1e-4), name

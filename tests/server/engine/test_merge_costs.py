"""What is measured before an adapter is merged unasked."""

from typing import Any

import pytest
import torch

from server.engine import merge_costs
from server.engine.merge_costs import measure_merge_costs
from server.engine.model import prepare_base_model
from tests.server.engine.test_model import CPU, tiny, torch_runner
from tests.server.kernels.interpreted import interpreted_triton_ops


def test_what_is_measured_fits_the_kernels_and_leaves_the_head_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(merge_costs, "STEP_TOKENS", (1, 4))
    monkeypatch.setattr(merge_costs, "ROUNDS", 1)
    base = prepare_base_model(tiny("llama", {}), "llama", CPU)

    def refuse(*_: Any) -> None:
        raise AssertionError("the head was computed")

    base.model.get_output_embeddings().register_forward_pre_hook(refuse)
    with interpreted_triton_ops() as module:
        runner = torch_runner(base, module.triton_kernels(CPU, torch.float32, max_rank=4))
        costs = measure_merge_costs(runner, max_rank=4)
    shapes = [shape for shape in base.linear_layers.values() if shape.kind == "linear"]
    assert costs.adapter_bytes == sum(4 * 4 * (shape.in_features + shape.out_features) for shape in shapes)
    assert [tokens for tokens, _ in costs.bypass_seconds] == [1, 4]
    assert costs.merge_seconds > 0
    assert runner.lora.merged is None

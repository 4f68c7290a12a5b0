"""The engine's thread beside the event loop's, with which it shares one interpreter."""

import time
from contextlib import aclosing
from pathlib import Path

import pytest
import torch
from prometheus_client import CollectorRegistry

from server.config import EngineConfig, ServerConfig
from server.engine.build import build_engine
from server.engine.forward_batch import ForwardBatch
from server.engine.request import SamplingParams
from server.metrics import Metrics
from server.serve import running_engine

KERNELS = 20  # of a step that are long enough for another thread to take the interpreter meanwhile
KERNEL_SECONDS = 0.0005
BUSY_SECONDS = 0.3
PYTHONS_OWN = 0.005  # seconds that a thread waits for the interpreter, unless told otherwise
ROUNDS = 8  # a machine that is busy itself may spoil some


async def test_a_busy_event_loop_does_not_hold_up_the_engine(
    model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While the loop computes, a request goes on making tokens, at a rate that Python's own 5 ms cannot reach."""
    engine_config = EngineConfig(model=str(model_dir), device="cpu", dtype="float32")
    parts, metrics = build_engine(engine_config), Metrics(CollectorRegistry())
    forward = parts.runner.forward

    def like_a_large_model(batch: ForwardBatch) -> torch.Tensor:
        for _ in range(KERNELS):
            time.sleep(KERNEL_SECONDS)  # without the interpreter, as a kernel
        return forward(batch)

    monkeypatch.setattr(parts.runner, "forward", like_a_large_model)

    def num_steps() -> float:
        return metrics.registry.get_sample_value("loraplex_step_seconds_count") or 0

    async with running_engine(engine_config, ServerConfig(adapters_dir=tmp_path), parts, metrics) as engine:
        params = SamplingParams(max_tokens=250, ignore_eos=True)
        async with aclosing(engine.generate([1, 2, 3], params, {})) as outputs:
            await anext(outputs)
            for _ in range(ROUNDS):
                before, until = num_steps(), time.monotonic() + BUSY_SECONDS
                while time.monotonic() < until:
                    pass
                made = num_steps() - before
                assert len((await anext(outputs)).token_ids) >= made - 1
                if made > 1.5 * BUSY_SECONDS / (KERNELS * PYTHONS_OWN):
                    break
            else:
                pytest.fail(f"{made} steps in {BUSY_SECONDS} s")

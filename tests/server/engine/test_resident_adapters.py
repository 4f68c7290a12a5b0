"""A device without memory for an adapter: its requests end, and nobody else's."""

from pathlib import Path
from typing import Any

import pytest
import torch

from server.errors import Overloaded
from server.lora.adapter import Adapter, WeightedAdapter
from tests.server.engine.conftest import Engine


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory"), MemoryError()], ids=["device", "host"])
def test_only_the_requests_of_an_adapter_without_memory_end(
    model_dir: Path,
    adapters_dir: Path,
    prompts: list[list[int]],
    monkeypatch: pytest.MonkeyPatch,
    error: Exception,
) -> None:
    engine = Engine(model_dir, adapter_slots=3, max_num_seqs=5)
    small, large, other = (engine.load(adapters_dir / name) for name in ("attention", "plain", "head"))
    good: list[tuple[list[int], Any]] = [(prompts[0], None), (prompts[1], small), (prompts[2], other)]
    expected = engine.generate(good)
    slots, blocks = engine.parts.scheduler.slots.adapters(), engine.parts.scheduler.allocator.num_free
    write = engine.parts.runner.lora.write
    memory = {"is_full": True}

    def writes_half(slot: int, adapter: Adapter | None) -> None:
        write(slot, adapter)
        if adapter is large and memory["is_full"]:
            raise error

    monkeypatch.setattr(engine.parts.runner.lora, "write", writes_half)
    bad = [
        engine.submit(prompts[3], large),
        engine.submit(prompts[4], [WeightedAdapter(large, 0.5), WeightedAdapter(small, 0.5)]),
    ]
    assert engine.generate(good) == expected
    for request_id in bad:
        [output] = engine.outputs[request_id]
        assert isinstance(output.error, Overloaded)
        assert f"'plain' takes {large.num_bytes:,} bytes on the device" in str(output.error)
        assert "--adapter-slots" in str(output.error)
    assert set(engine.parts.scheduler.slots.adapters()) == engine.core.resident == set(slots) - {large}
    assert engine.parts.scheduler.allocator.num_free == blocks

    memory["is_full"] = False
    engine.generate([(prompts[3], large)])
    assert large in engine.core.resident

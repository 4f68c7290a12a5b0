"""What the engine books, step by step, and what gateways read meanwhile."""

from collections.abc import Callable
from pathlib import Path

from server.engine.request import FinishReason
from server.metrics import FINISH_REASONS
from tests.server.engine.conftest import Engine


def sample(engine: Engine, name: str, **labels: str) -> float | None:
    return engine.metrics.registry.get_sample_value(name, labels)


def test_every_way_to_finish_has_a_series() -> None:
    assert {reason.value for reason in FinishReason} <= set(FINISH_REASONS)


def test_slots_that_are_taken_and_lost(model_dir: Path, make_adapter: Callable[..., Path]) -> None:
    engine = Engine(model_dir, adapter_slots=1)
    first, second = (engine.load(make_adapter(name, seed)) for seed, name in enumerate(("first", "second")))
    engine.submit([1, 2, 3], first, max_tokens=2)
    engine.submit([1, 2, 3], second, max_tokens=2)
    engine.core.step()
    assert sample(engine, "loraplex_num_requests_running") == 1
    assert sample(engine, "loraplex_num_requests_waiting") == 1
    gateway = {"max_lora": "1", "running_lora_adapters": "first", "waiting_lora_adapters": "second"}
    assert sample(engine, "vllm:lora_requests_info", **gateway)
    assert sample(engine, "vllm:num_requests_waiting") == 1
    engine.run()
    for name in ("first", "second"):
        assert sample(engine, "loraplex_adapter_loads_total", adapter=name, tier="device") == 1
        assert sample(engine, "loraplex_adapter_steps_total", adapter=name) == 2
        assert sample(engine, "loraplex_adapter_shared_steps_total", adapter=name) is None
    assert sample(engine, "loraplex_adapter_evictions_total", adapter="first", tier="device") == 1
    assert sample(engine, "loraplex_adapter_evictions_total", adapter="second", tier="device") is None
    assert sample(engine, "loraplex_adapter_resident", adapter="second", tier="device") == 1
    gateway = {"max_lora": "1", "running_lora_adapters": "second", "waiting_lora_adapters": ""}
    assert sample(engine, "vllm:lora_requests_info", **gateway)


def test_requests_that_wait_for_their_adapters_are_waiting(model_dir: Path) -> None:
    engine = Engine(model_dir)
    with engine.metrics.awaiting(["first@2", "second"]):
        assert sample(engine, "loraplex_num_requests_waiting") == sample(engine, "vllm:num_requests_waiting") == 1
        gateway = {"max_lora": "32", "running_lora_adapters": "", "waiting_lora_adapters": "first,second"}
        assert sample(engine, "vllm:lora_requests_info", **gateway)
    assert sample(engine, "loraplex_num_requests_waiting") == 0


def test_preemptions(model_dir: Path) -> None:
    engine = Engine(model_dir, kv_cache_bytes=1 << 17, prefix_cache=False)
    for _ in range(2):
        engine.submit(list(range(100)), max_tokens=100)
    engine.run()
    preempted = engine.parts.scheduler.num_preemptions
    assert preempted > 0
    assert sample(engine, "loraplex_num_preemptions_total") == preempted
    assert sample(engine, "loraplex_kv_cache_usage_ratio") == 0

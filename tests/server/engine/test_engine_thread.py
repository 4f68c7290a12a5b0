"""The engine's thread beside the event loop's: they share an interpreter, and neither waits for the other's work."""

import asyncio
import time
from contextlib import aclosing
from pathlib import Path

from prometheus_client import CollectorRegistry

from server.config import EngineConfig, ServerConfig
from server.engine.build import build_engine
from server.engine.request import SamplingParams
from server.metrics import Metrics
from server.serve import running_engine


async def test_a_busy_event_loop_does_not_hold_up_the_engine(model_dir: Path, tmp_path: Path) -> None:
    """While the loop computes for half a second, a request goes on making tokens, and delivers them afterwards."""
    engine_config = EngineConfig(model=str(model_dir), device="cpu", dtype="float32")
    config = ServerConfig(adapters_dir=tmp_path)
    parts, metrics = build_engine(engine_config), Metrics(CollectorRegistry())
    async with running_engine(engine_config, config, parts, metrics) as engine:
        params = SamplingParams(max_tokens=200, ignore_eos=True)
        async with aclosing(engine.generate([1, 2, 3], params, {})) as outputs:
            await anext(outputs)
            steps = metrics.registry.get_sample_value("loraplex_step_seconds_count") or 0
            import os, sys; sys.setswitchinterval(float(os.environ.get("SW", "0.005")))
            until = time.monotonic() + 0.5
            while time.monotonic() < until:
                pass
            steps = (metrics.registry.get_sample_value("loraplex_step_seconds_count") or 0) - steps
            print("STEPS", steps)
            assert steps > 20
            assert len((await anext(outputs)).token_ids) >= steps - 1

"""Many more adapters than slots, from disk to device beside the steps, against a few that stay where they are."""

import asyncio
import statistics
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
from prometheus_client import CollectorRegistry

from server.config import EngineConfig, ServerConfig
from server.engine.async_engine import AsyncEngine
from server.engine.build import EngineParts
from server.engine.request import SamplingParams
from server.metrics import Metrics
from server.serve import running_engine

TIERS = ("device", "host", "disk")


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """A closed loop: `concurrency` clients, each with one request at a time, until `num_requests` are done."""

    num_adapters: int
    alpha: float  # of the power law of popularity: 1 is uniform, less is more skewed (S-LoRA)
    num_requests: int
    concurrency: int
    prompt_tokens: int
    output_tokens: int
    seed: int

    def choices(self) -> list[int]:
        """The adapter of each request."""
        chance = np.random.default_rng(self.seed)
        return [int(share * self.num_adapters) for share in chance.power(self.alpha, self.num_requests)]


@dataclass(frozen=True, slots=True)
class Answer:
    """One request: where its adapter was when it came, and its times in seconds."""

    tier: str
    adapter_wait: float  # until the adapter was in host memory
    first_token: float  # from then on
    longest_gap: float  # between its tokens


@dataclass(frozen=True, slots=True)
class Spread:
    p50: float
    p99: float
    max: float
    count: int


@dataclass(frozen=True, slots=True)
class Measured:
    """One run under one load."""

    out_tok_s: float
    adapter_wait: Mapping[str, Spread]  # seconds, by tier
    first_token: Mapping[str, Spread]
    longest_gap: Spread
    device_loads: int
    host_loads: int
    host_evictions: int


def measure(
    engine_config: EngineConfig, config: ServerConfig, parts: EngineParts, adapters_dir: Path, load: Load
) -> Measured:
    """Runs a load on a fresh cache: at its start every adapter is on disk only."""
    return asyncio.run(
        _measure(engine_config, config, parts, sorted(path.name for path in adapters_dir.iterdir()), load)
    )


async def _measure(
    engine_config: EngineConfig, config: ServerConfig, parts: EngineParts, names: Sequence[str], load: Load
) -> Measured:
    metrics = Metrics(CollectorRegistry())
    async with running_engine(engine_config, config, parts, metrics) as engine:
        chance = np.random.default_rng(load.seed)
        prompts = chance.integers(parts.base.vocab_size, size=(load.num_requests, load.prompt_tokens)).tolist()
        work = iter([(names[index], prompt) for index, prompt in zip(load.choices(), prompts, strict=True)])
        started = time.perf_counter()
        clients = [_client(engine, work, load.output_tokens) for _ in range(load.concurrency)]
        answers = [answer for part in await asyncio.gather(*clients) for answer in part]
        wall = time.perf_counter() - started
    by_tier = defaultdict(list)
    for answer in answers:
        by_tier[answer.tier].append(answer)

    return Measured(
        out_tok_s=load.num_requests * load.output_tokens / wall,
        adapter_wait={
            tier: spread([answer.adapter_wait for answer in by_tier[tier]]) for tier in TIERS if by_tier[tier]
        },
        first_token={tier: spread([answer.first_token for answer in by_tier[tier]]) for tier in TIERS if by_tier[tier]},
        longest_gap=spread([answer.longest_gap for answer in answers]),
        device_loads=metrics.adapters.total("adapter_loads", "device"),
        host_loads=metrics.adapters.total("adapter_loads", "host"),
        host_evictions=metrics.adapters.total("adapter_evictions", "host"),
    )


async def _client(engine: AsyncEngine, work: Iterator[tuple[str, list[int]]], output_tokens: int) -> list[Answer]:
    params = SamplingParams(max_tokens=output_tokens, ignore_eos=True)
    answers = []
    for name, prompt in work:
        tier = await _tier(engine, name)
        arrived = time.perf_counter()
        async with engine.adapters.acquire(name):
            ready = time.perf_counter()
            times = [time.perf_counter() async for _ in engine.generate(prompt, params, {name: 1.0})]
        gaps = [later - earlier for earlier, later in pairwise(times)]
        answers.append(Answer(tier, ready - arrived, times[0] - ready, max(gaps, default=0.0)))
    return answers


async def _tier(engine: AsyncEngine, name: str) -> str:
    adapter = (await engine.adapters.get(name)).adapter
    if adapter is None:
        return "disk"
    return "device" if engine.is_on_device(adapter) else "host"


def spread(values: Sequence[float]) -> Spread:
    ordered = np.sort(values)
    p50, p99 = (float(ordered[int(share * (len(ordered) - 1))]) for share in (0.5, 0.99))
    return Spread(p50, p99, float(ordered[-1]), len(ordered))


def compare(few: Sequence[Measured], many: Sequence[Measured]) -> dict[str, object]:
    """Medians over the rounds, their ratio, and the waits of the many in the round in the middle."""
    middle = sorted(many, key=lambda measured: measured.out_tok_s)[len(many) // 2]
    few_rate, many_rate = (statistics.median(run.out_tok_s for run in runs) for runs in (few, many))
    return {"few_tok_s": few_rate, "many_tok_s": many_rate, "ratio": many_rate / few_rate, "many": asdict(middle)}

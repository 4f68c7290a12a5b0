"""Running streams while adapters are loaded and replaced beside them: what it costs the streams, and the newcomers."""

import asyncio
import itertools
import os
import time
from collections.abc import Sequence
from contextlib import aclosing
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from prometheus_client import CollectorRegistry

from adapters.config import CONFIG_FILE, WEIGHTS_FILE
from benchmarks.many_adapters import spread
from server.bench import check_length
from server.config import EngineConfig, ServerConfig
from server.engine.async_engine import AsyncEngine
from server.engine.build import EngineParts, build_engine
from server.engine.request import SamplingParams
from server.errors import ConfigError, ServingError
from server.metrics import Metrics
from server.serve import running_engine

PROBE_TOKENS = 4  # prompt of a request that only asks for its first token: next to nothing beside the streams' step


@dataclass(frozen=True, slots=True, kw_only=True)
class Streams:
    """Requests that start at once and are equally long; request i uses adapter i mod `num_adapters`."""

    count: int
    num_adapters: int
    prompt_tokens: int
    output_tokens: int


@dataclass(slots=True)
class Observed:
    """Times in seconds, over all runs of one kind."""

    gaps: list[float] = field(default_factory=list)  # between tokens of a stream, while all of them run
    loads: list[float] = field(default_factory=list)  # disk to host
    warm: list[float] = field(default_factory=list)  # first token on an adapter that is in host memory only
    hot: list[float] = field(default_factory=list)  # first token on an adapter that is in a slot


def measure_swap(
    config: EngineConfig, adapters_dir: Path, streams: Streams, *, every_ms: int, rounds: int
) -> dict[str, Any]:
    """Runs the streams in peace and with one load each `every_ms` milliseconds, in turn; see `report`.

    A load reads an adapter from the disk, past the system's page cache, and puts it in place of itself as a new
    generation: all adapters of the folder in turn, those that streams run on and others. Two small requests follow,
    the first finds the adapter in host memory, the second on the device.

    Raises:
        ConfigError: too few adapters, one that cannot be served, or requests that are too long.
    """
    names = sorted(path.parent.name for path in adapters_dir.glob(f"*/{CONFIG_FILE}"))
    if len(names) <= streams.num_adapters:
        raise ConfigError(
            f"--num-adapters {streams.num_adapters}: --adapters-dir {adapters_dir} holds {len(names)}; one more is "
            "needed, to be loaded beside them"
        )
    parts = build_engine(config)
    check_length(parts, streams.prompt_tokens, streams.output_tokens)
    return asyncio.run(_measure(config, parts, adapters_dir, names, streams, every_ms / 1000, rounds))


def report(quiet: Observed, swapped: Observed) -> dict[str, Any]:
    """Gaps and first tokens in steps, where a step is the median gap of the quiet runs; loads in milliseconds."""
    step = spread(quiet.gaps).p50
    hot, warm = _spread(swapped.hot, step), _spread(swapped.warm, step)
    return {
        "step_ms": step * 1e3,
        "gap_steps": {"quiet": _spread(quiet.gaps, step), "swapping": _spread(swapped.gaps, step)},
        "first_token_steps": {"hot": hot, "warm": warm, "warm_over_hot": warm["p50"] - hot["p50"]},
        "load_ms": _spread(swapped.loads, 1e-3),
    }


async def _measure(
    config: EngineConfig,
    parts: EngineParts,
    adapters_dir: Path,
    names: Sequence[str],
    streams: Streams,
    every: float,
    rounds: int,
) -> dict[str, Any]:
    quiet, swapped = Observed(), Observed()
    chance = np.random.default_rng(0)
    metrics = Metrics(CollectorRegistry())
    async with running_engine(config, ServerConfig(adapters_dir=adapters_dir), parts, metrics) as engine:
        try:
            for name in names:  # warm-up, and the check that all of them can be served
                await _first_token(engine, name, chance)
        except ServingError as error:
            raise ConfigError(f"--adapters-dir {adapters_dir}: {error}") from error
        for _ in range(rounds):
            await _run(engine, names, streams, chance, quiet, every=None)
            await _run(engine, names, streams, chance, swapped, every=every)
    if not (quiet.gaps and swapped.gaps and swapped.hot):
        raise ConfigError(
            f"--output-tokens {streams.output_tokens}: the streams are too short to load anything beside them all"
        )
    return report(quiet, swapped)


async def _run(
    engine: AsyncEngine,
    names: Sequence[str],
    streams: Streams,
    chance: np.random.Generator,
    observed: Observed,
    every: float | None,
) -> None:
    """All streams from start to end; while all of them run, a load every so many seconds, or none."""
    times: list[list[float]] = [[] for _ in range(streams.count)]
    all_run = asyncio.Event()

    async def stream(index: int) -> None:
        params = SamplingParams(max_tokens=streams.output_tokens, ignore_eos=True)
        prompt = _prompt(engine, streams.prompt_tokens, chance)
        async with aclosing(engine.generate(prompt, params, {names[index % streams.num_adapters]: 1.0})) as outputs:
            async for _ in outputs:
                times[index].append(time.perf_counter())
                if all(times):
                    all_run.set()

    async with asyncio.TaskGroup() as group:
        running = [group.create_task(stream(index)) for index in range(streams.count)]
        await all_run.wait()
        swapping = group.create_task(_swap(engine, names, chance, observed, every)) if every is not None else None
        await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
        if swapping is not None:
            swapping.cancel()
    started, ended = max(first for first, *_ in times), min(last for *_, last in times)
    for of_stream in times:
        within = [moment for moment in of_stream if started <= moment <= ended]
        observed.gaps += [later - earlier for earlier, later in pairwise(within)]


async def _swap(
    engine: AsyncEngine, names: Sequence[str], chance: np.random.Generator, observed: Observed, every: float
) -> None:
    """Loads one adapter after the other, for ever; the next is due `every` seconds after the last was."""
    due = time.perf_counter()
    for name in itertools.cycle(names):
        await asyncio.sleep(due - time.perf_counter())
        due += every
        _drop_from_page_cache(engine.adapters.store.root / name / WEIGHTS_FILE)
        asked = time.perf_counter()
        await engine.adapters.load(name, "", replace=True)
        loaded = time.perf_counter()
        warm = await _first_token(engine, name, chance)
        hot = await _first_token(engine, name, chance)
        observed.loads.append(loaded - asked)
        observed.warm.append(warm)
        observed.hot.append(hot)


async def _first_token(engine: AsyncEngine, name: str, chance: np.random.Generator) -> float:
    """Seconds from asking to the first token of a small request."""
    asked = time.perf_counter()
    params = SamplingParams(max_tokens=1, ignore_eos=True)
    async with aclosing(engine.generate(_prompt(engine, PROBE_TOKENS, chance), params, {name: 1.0})) as outputs:
        await anext(outputs)
    return time.perf_counter() - asked


def _prompt(engine: AsyncEngine, length: int, chance: np.random.Generator) -> list[int]:
    """Tokens that nobody asked for before: none of them is in the prefix cache."""
    tokens: list[int] = chance.integers(engine.base.vocab_size, size=length).tolist()
    return tokens


def _drop_from_page_cache(path: Path) -> None:
    with path.open("rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _spread(seconds: Sequence[float], unit: float) -> dict[str, float]:
    return asdict(spread([value / unit for value in seconds]))

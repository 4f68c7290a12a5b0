"""The engine through gRPC against the engine alone, in one process and in turn."""

import asyncio
import gc
import json
import os
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from prometheus_client import CollectorRegistry

from benchmarks.process import RunFailed, last_error
from server.bench import check_length, generate, load_adapters
from server.config import EngineConfig, ServerConfig
from server.engine.build import EngineParts, build_engine
from server.engine.core import EngineCore
from server.errors import ConfigError
from server.lora.adapter import Adapter
from server.metrics import Metrics
from server.model_info import model_info
from server.openmp import release_team
from server.rpc.event_loop import GrpcEventLoop
from server.rpc.server import RpcServer
from server.serve import running_engine

WARM_UP_TOKENS = 8  # of each request, before the clock: adapters come into their slots


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """Requests that come at once, each a stream, on adapters in turn."""

    num_adapters: int
    num_streams: int
    prompt_tokens: int
    output_tokens: int
    client_processors: tuple[int, ...] = ()  # for the client alone, if it is kept off the server's; none: it is not


def measure_front(config: EngineConfig, adapters_dir: Path, load: Load, rounds: int) -> dict[str, Any]:
    """Runs the load on the engine alone and through a server's front, `rounds` times each, and takes their ratios.

    The client is `loraplex loadtest run`, a process of its own on the same machine. Each run is warm: the front's as
    that of the engine alone.

    Raises:
        ConfigError: too few adapters, requests that are too long, or a processor that there is not.
        RunFailed: the client did not come to its end.
    """
    if load.client_processors:
        _try_processors(load.client_processors)
    config = replace(config, max_num_seqs=load.num_streams)
    parts = build_engine(config)
    release_team()  # each run brings its own
    check_length(parts, load.prompt_tokens, load.output_tokens)
    adapters = load_adapters(config, parts, str(adapters_dir), load.num_adapters)
    gc.collect()
    gc.freeze()  # as a server does
    try:
        with asyncio.Runner(loop_factory=GrpcEventLoop) as runner:
            pairs = runner.run(_measure(config, parts, adapters_dir, adapters, load, rounds))
    finally:
        gc.unfreeze()
    return summary(pairs)


def summary(pairs: Sequence[tuple[float, float]]) -> dict[str, Any]:
    """Medians of both, in tokens/s, and the ratios of the pairs, through the front over alone."""
    alone, front = zip(*pairs, strict=True)
    ratios = [through / without for without, through in pairs]
    return {
        "alone_tok_s": statistics.median(alone),
        "front_tok_s": statistics.median(front),
        "ratio": statistics.median(ratios),
        "ratios": [round(ratio, 3) for ratio in ratios],
    }


def _try_processors(processors: Sequence[int]) -> None:
    """Raises ConfigError if nothing can run on any of these."""
    before = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, processors)
    except OSError as error:
        raise ConfigError(f"--client-processor {processors[0]}: nothing can run there ({error.strerror})") from error
    os.sched_setaffinity(0, before)


async def _measure(
    config: EngineConfig,
    parts: EngineParts,
    adapters_dir: Path,
    adapters: Sequence[Adapter],
    load: Load,
    rounds: int,
) -> list[tuple[float, float]]:
    pairs = []
    for number in range(rounds):
        alone = await asyncio.to_thread(_alone, parts, adapters, load, number)
        pairs.append((alone, await _through_the_front(config, parts, adapters_dir, load, number)))
    return pairs


def _alone(parts: EngineParts, adapters: Sequence[Adapter], load: Load, seed: int) -> float:
    """Tokens/s."""
    core = EngineCore(parts.runner, parts.scheduler, Metrics(CollectorRegistry()), parts.merge_policy)
    chance = np.random.default_rng(seed)
    shape = (2, load.num_streams, load.prompt_tokens)
    warm_up, prompts = chance.integers(parts.base.vocab_size, size=shape).tolist()
    try:
        generate(core, warm_up, adapters, min(WARM_UP_TOKENS, load.output_tokens))
        started = time.perf_counter()
        generate(core, prompts, adapters, load.output_tokens)
        return load.num_streams * load.output_tokens / (time.perf_counter() - started)
    finally:
        release_team()


async def _through_the_front(
    config: EngineConfig, parts: EngineParts, adapters_dir: Path, load: Load, seed: int
) -> float:
    """Tokens/s."""
    server_config = ServerConfig(adapters_dir=adapters_dir, listen="127.0.0.1:0")
    async with running_engine(config, server_config, parts, Metrics(CollectorRegistry())) as engine:
        server = RpcServer(server_config, engine, model_info(config, server_config, parts))
        await server.start()
        try:
            warm_up = replace(load, output_tokens=min(WARM_UP_TOKENS, load.output_tokens))
            await _client(server.port, warm_up, 2 * seed)
            return await _client(server.port, load, 2 * seed + 1)
        finally:
            await server.drain(0)


async def _client(port: int, load: Load, seed: int) -> float:
    """Tokens/s that a load test sees."""
    with TemporaryDirectory() as folder:
        command = [str(Path(sys.executable).with_name("loraplex")), "loadtest", "run"]
        command += ["--address", f"127.0.0.1:{port}", "--output", folder, "--seed", str(seed)]
        command += ["--popularity", "distinct", "--num-adapters", str(load.num_adapters)]
        command += ["--concurrency", str(load.num_streams), "--num-requests", str(load.num_streams)]
        command += ["--prompt-tokens", f"{load.prompt_tokens}:{load.prompt_tokens + 1}"]
        command += ["--output-tokens", f"{load.output_tokens}:{load.output_tokens + 1}"]
        pipe = asyncio.subprocess.PIPE
        process = await asyncio.create_subprocess_exec(*command, stdout=pipe, stderr=pipe)
        if load.client_processors:  # it has only begun: the threads that it will start stay there too
            os.sched_setaffinity(process.pid, load.client_processors)
        _, errors = await process.communicate()
        if process.returncode:
            raise RunFailed(last_error(errors.decode()) or f"the load test ended with exit code {process.returncode}")
        (run,) = json.loads((Path(folder) / "report.json").read_text())["runs"]
        if run["completed"] != load.num_streams:
            raise RunFailed(f"{run['completed']} of {load.num_streams} streams came to their end: {run['first_error']}")
        return load.num_streams * load.output_tokens / float(run["wall_s"])

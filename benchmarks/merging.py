"""Merging unasked against never merging, in one process and in turn: what `--merge-policy auto` gains, and loses."""

import itertools
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from prometheus_client import CollectorRegistry

from server.bench import check_length, generate, load_adapters
from server.config import EngineConfig
from server.engine.build import build_engine
from server.engine.core import EngineCore
from server.engine.merge_policy import MergePolicy
from server.errors import ConfigError
from server.lora.adapter import Adapter
from server.metrics import Metrics

SKEW = 10  # of so many requests of the skewed load, all but one are on one adapter


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """Requests that come at once and are equally long."""

    num_adapters: int
    num_prompts: int
    prompt_tokens: int
    output_tokens: int


@dataclass(frozen=True, slots=True)
class Run:
    tokens_s: float
    merges: int


def measure_merging(config: EngineConfig, adapters_dir: str, load: Load, rounds: int) -> dict[str, Any]:
    """Runs three loads without and with the policy, `rounds` times each, and takes the ratio of each pair.

    Every run begins unmerged with a new policy, so it pays for its own merge. Who goes first changes each round.

    Raises:
        ConfigError: too few adapters, some that cannot be merged, or requests that are too long.
    """
    parts = build_engine(replace(config, merge_policy="auto"))
    policy = parts.merge_policy
    assert policy is not None
    check_length(parts, load.prompt_tokens, load.output_tokens)
    adapters = load_adapters(config, parts, adapters_dir, load.num_adapters)
    for adapter in adapters:
        if reason := parts.runner.lora.why_no_merge(adapter):
            raise ConfigError(f"--adapters-dir {adapters_dir}: {adapter.name} cannot be merged: {reason}")
    chance = np.random.default_rng(0)

    def run(of_requests: Sequence[Adapter], chosen: MergePolicy | None) -> Run:
        parts.runner.merge(None)
        metrics = Metrics(CollectorRegistry())
        core = EngineCore(parts.runner, parts.scheduler, metrics, chosen)
        prompts = chance.integers(parts.base.vocab_size, size=(load.num_prompts, load.prompt_tokens)).tolist()
        started = time.perf_counter()
        generate(core, prompts, of_requests, load.output_tokens)
        wall = time.perf_counter() - started
        return Run(load.num_prompts * load.output_tokens / wall, metrics.adapters.total("adapter_merges"))

    result: dict[str, Any] = {"merge_ms": 1000 * policy.costs.merge_seconds}
    for name, indices in loads(load.num_adapters).items():
        of_requests = [adapters[index] for index in indices]
        run(of_requests, None)
        pairs = []
        for number in range(rounds):
            order = (None, MergePolicy(policy.costs)) if number % 2 == 0 else (MergePolicy(policy.costs), None)
            first, second = (run(of_requests, chosen) for chosen in order)
            pairs.append((first, second) if number % 2 == 0 else (second, first))
        result[name] = summary(pairs)
    return result


def loads(num_adapters: int) -> dict[str, list[int]]:
    """The adapters of requests, to be repeated: all on the first, most on the first, evenly on all."""
    skewed = itertools.chain.from_iterable([0] * (SKEW - 1) + [other] for other in range(1, num_adapters))
    return {"alone": [0], "skewed": list(skewed), "mixed": list(range(num_adapters))}


def summary(pairs: Sequence[tuple[Run, Run]]) -> dict[str, Any]:
    """Medians of both, and the ratios of the pairs, auto over off."""
    off, auto = zip(*pairs, strict=True)
    ratios = sorted(with_policy.tokens_s / without.tokens_s for without, with_policy in pairs)
    return {
        "off_tok_s": statistics.median(run.tokens_s for run in off),
        "auto_tok_s": statistics.median(run.tokens_s for run in auto),
        "ratio": statistics.median(ratios),
        "ratios": [ratios[0], ratios[-1]],
        "merges": [run.merges for run in auto],
    }

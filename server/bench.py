"""`loraplex bench throughput`: the engine in this process, without gRPC, under a fixed load."""

import gc
import json
import resource
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from prometheus_client import CollectorRegistry

from adapters.config import CONFIG_FILE
from adapters.errors import AdapterFormatError
from adapters.format import read_adapter
from server.config import EngineConfig
from server.engine.build import EngineParts, build_engine
from server.engine.commands import Submit
from server.engine.core import EngineCore
from server.engine.request import Request, SamplingParams, TokenOutput
from server.errors import ConfigError
from server.lora.adapter import Adapter, WeightedAdapter
from server.metrics import Metrics
from server.openmp import bound_team


def measure_throughput(
    config: EngineConfig,
    *,
    adapters_dir: str | None,
    num_adapters: int,
    num_prompts: int,
    prompt_tokens: int,
    output_tokens: int,
    unused_adapters: bool = False,
    prompts_file: Path | None = None,
    choices_file: Path | None = None,
    tokens_file: Path | None = None,
) -> dict[str, Any]:
    """Runs the load once to warm up (eight tokens each) and once for the clock.

    With `unused_adapters` only the warm-up uses them: they sit in their slots while the base answers. The prompts of
    `prompts_file` take the place of random ones, the adapters of `choices_file`, by their places in name order, that of
    adapters in turn; `tokens_file` receives the tokens of every request. All are JSON.

    Raises:
        ConfigError: the adapters, prompts or choices cannot be had, or a request would be too long.
    """
    parts = build_engine(config)
    own_prompts = _read_prompts(prompts_file, parts.base.vocab_size) if prompts_file else None
    if own_prompts:
        num_prompts, prompt_tokens = len(own_prompts), max(map(len, own_prompts))
    check_length(parts, prompt_tokens, output_tokens)
    adapters = load_adapters(config, parts, adapters_dir, num_adapters)
    chosen = adapters
    if choices_file:
        chosen = [adapters[place] for place in _read_choices(choices_file, num_prompts, num_adapters)]
    prompts, other_prompts = _prompts(num_prompts, prompt_tokens, parts.base.vocab_size)
    core = EngineCore(parts.runner, parts.scheduler, Metrics(CollectorRegistry()), parts.merge_policy)

    generate(core, other_prompts, chosen, min(8, output_tokens))
    gc.collect()
    gc.freeze()  # as a server does
    started = time.perf_counter()
    outputs = generate(core, own_prompts or prompts, [] if unused_adapters else chosen, output_tokens)
    wall = time.perf_counter() - started
    gc.unfreeze()
    num_generated = sum(len(tokens) for tokens in outputs)
    assert num_generated == num_prompts * output_tokens
    if tokens_file:
        tokens_file.write_text(json.dumps(outputs))
    return {
        "out_tok_s": round(num_generated / wall, 2),
        "wall_s": round(wall, 3),
        "peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "num_adapters": num_adapters,
        "num_prompts": num_prompts,
        "prompt_tokens": prompt_tokens,
        "output_tokens": output_tokens,
        "adapter_bytes": sum(adapter.num_bytes for adapter in adapters),
        "model": parts.base.name,
        "device": str(parts.base.device),
        "dtype": parts.storage,
        "kv_cache_dtype": parts.kv_cache_dtype,
        "threads": torch.get_num_threads(),
        "version": version("loraplex"),
        "torch": torch.__version__,
    }


def check_length(parts: EngineParts, prompt_tokens: int, output_tokens: int) -> None:
    """Raises ConfigError if no request may be as long."""
    if prompt_tokens + output_tokens > parts.max_model_len:
        raise ConfigError(
            f"--prompt-tokens {prompt_tokens} and --output-tokens {output_tokens} are over the {parts.max_model_len} "
            "tokens of a request (--max-model-len)"
        )


def load_adapters(config: EngineConfig, parts: EngineParts, folder: str | None, count: int) -> list[Adapter]:
    """The first adapters of a folder, by name.

    Raises:
        ConfigError: it holds fewer, or one that cannot be served here.
    """
    if not count:
        return []
    paths = sorted(path.parent for path in Path(folder or "").glob(f"*/{CONFIG_FILE}")) if folder else []
    if len(paths) < count:
        raise ConfigError(f"--num-adapters {count}: --adapters-dir {folder} holds {len(paths)}")
    base = parts.runner.lora.base_weights
    try:
        adapters = [
            Adapter.from_files(
                read_adapter(path, base.shapes, config.max_lora_rank),
                path.name,
                "1",
                generation,
                base,
                parts.lora_dtype,
            )
            for generation, path in enumerate(paths[:count], start=1)
        ]
    except AdapterFormatError as error:
        raise ConfigError(f"--adapters-dir {folder}: {error}") from error
    for adapter in adapters:
        if adapter.invocation_tokens:
            raise ConfigError(f"--adapters-dir {folder}: {adapter.name} waits for its invocation (aLoRA)")
    return adapters


def generate(
    core: EngineCore, prompts: Sequence[list[int]], adapters: Sequence[Adapter], output_tokens: int
) -> list[list[int]]:
    """Submits everything at once and steps until nothing is left; the tokens of each request.

    Request i uses adapter i mod the number of them, or none of none.
    """
    outputs: list[list[int]] = [[] for _ in prompts]

    def collect(step: list[TokenOutput]) -> None:
        for output in step:
            if output.error is not None:
                raise output.error
            assert output.token_id is not None
            outputs[output.request_id].append(output.token_id)

    core.connect(collect)
    params = SamplingParams(max_tokens=output_tokens, ignore_eos=True)
    for index, prompt in enumerate(prompts):
        parts_of_request = [WeightedAdapter(adapters[index % len(adapters)])] if adapters else []
        core.put(Submit(Request(index, prompt, params, parts_of_request, frozenset())))
    with bound_team(core.runner.base.device.type):  # as the engine's own thread
        core.step()
        while core.scheduler.has_work:
            core.step()
    return outputs


def _read_prompts(path: Path, vocab_size: int) -> list[list[int]]:
    prompts = _read_json("--prompts-file", path)
    tokens = [token for prompt in prompts for token in prompt]
    if not tokens or not all(prompts) or not 0 <= min(tokens) <= max(tokens) < vocab_size:
        raise ConfigError(f"--prompts-file {path}: a list of prompts is needed, each of token ids below {vocab_size}")
    return prompts  # type: ignore[no-any-return]


def _read_choices(path: Path, num_prompts: int, num_adapters: int) -> list[int]:
    choices = _read_json("--choices-file", path)
    if len(choices) != num_prompts or not all(0 <= choice < num_adapters for choice in choices):
        raise ConfigError(f"--choices-file {path}: a list of {num_prompts} numbers below {num_adapters} is needed")
    return choices  # type: ignore[no-any-return]


def _read_json(flag: str, path: Path) -> Any:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ConfigError(f"{flag} {path}: {error}") from error


def _prompts(count: int, length: int, vocab_size: int) -> list[list[list[int]]]:
    """Two sets of random prompts: nothing of the warm-up may be in the prefix cache."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(vocab_size, (2, count, length), generator=generator).tolist()

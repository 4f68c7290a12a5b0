"""The commands that measure in this process: `loraplex bench adapters`, `swap`, `merge`, `front` and `kernels`."""

import json
from pathlib import Path
from typing import Any

import click

from benchmarks.cli import progress
from server.base_models import cache_dir, resolve
from server.config import EngineConfig, ServerConfig, options, take

_ADAPTERS_DIR = click.option(
    "--adapters-dir",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    required=True,
    help="Folder of PEFT adapters.",
)


@click.command("adapters")
@options(EngineConfig)
@click.option("--registered", type=click.IntRange(min=1), default=1000, show_default=True, help="Adapters on disk.")
@click.option("--few", type=click.IntRange(min=1), default=8, show_default=True, help="Adapters to compare with.")
@click.option("--alpha", type=click.FloatRange(min=0, min_open=True), default=0.3, show_default=True)
@click.option("--requests", type=click.IntRange(min=1), default=128, show_default=True, help="Of one run.")
@click.option("--concurrency", type=click.IntRange(min=1), default=32, show_default=True)
@click.option("--prompt-tokens", type=click.IntRange(min=1), default=64, show_default=True)
@click.option("--output-tokens", type=click.IntRange(min=1), default=64, show_default=True)
@click.option("--adapter-host-bytes", type=click.IntRange(min=1), default=2 << 30, show_default=True)
@click.option("--rounds", type=click.IntRange(min=1), default=3, show_default=True, help="The median counts.")
@click.option(
    "--work-dir",
    type=click.Path(file_okay=False, path_type=Path),
    default=lambda: cache_dir().parent / "compare",
    help="Where the adapters are kept: 10 MB each for the default base.  [default: in the cache folder]",
)
def adapters_command(
    registered: int,
    few: int,
    alpha: float,
    requests: int,
    concurrency: int,
    prompt_tokens: int,
    output_tokens: int,
    adapter_host_bytes: int,
    rounds: int,
    work_dir: Path,
    **values: Any,
) -> None:
    """Serve many adapters of skewed popularity, and a few, and compare.

    The many lie on disk at first; slots and --adapter-host-bytes hold only some of them. Each of --concurrency clients
    has one request at a time; its adapter is drawn from a power law. Prints JSON: tokens/s of both, their ratio, and
    how long requests waited for adapters on disk, in host memory and on the device.
    """
    config = take(EngineConfig, values)
    folder = Path(resolve(config.model))

    from benchmarks.many_adapters import Load, Measured, compare, measure
    from benchmarks.material import Material
    from benchmarks.report import machine
    from benchmarks.workload import UNIFORM_RANKS
    from server.engine.build import build_engine

    adapters_dir = Material(folder, work_dir, progress).adapters_dir(UNIFORM_RANKS, registered)
    server_config = ServerConfig(adapters_dir=adapters_dir, adapter_host_bytes=adapter_host_bytes)
    parts = build_engine(config)
    runs: dict[int, list[Measured]] = {few: [], registered: []}
    for number in range(1, rounds + 1):
        for count, measured in runs.items():
            load = Load(
                num_adapters=count,
                alpha=alpha,
                num_requests=requests,
                concurrency=concurrency,
                prompt_tokens=prompt_tokens,
                output_tokens=output_tokens,
                seed=number,
            )
            measured.append(measure(config, server_config, parts, adapters_dir, load))
            progress(f"round {number}, {count} adapters: {measured[-1].out_tok_s:.1f} tokens/s")
    click.echo(json.dumps({"machine": machine(), **compare(runs[few], runs[registered])}, indent=2))


@click.command("swap")
@options(EngineConfig)
@_ADAPTERS_DIR
@click.option(
    "--num-adapters", type=click.IntRange(min=1), default=8, show_default=True, help="Adapters that the streams use."
)
@click.option("--streams", type=click.IntRange(min=1), default=32, show_default=True)
@click.option("--prompt-tokens", type=click.IntRange(min=1), default=64, show_default=True)
@click.option("--output-tokens", type=click.IntRange(min=2), default=128, show_default=True)
@click.option("--every-ms", type=click.IntRange(min=0), default=250, show_default=True, help="Time between loads.")
@click.option("--rounds", type=click.IntRange(min=1), default=3, show_default=True)
def swap_command(
    adapters_dir: Path,
    num_adapters: int,
    streams: int,
    prompt_tokens: int,
    output_tokens: int,
    every_ms: int,
    rounds: int,
    **values: Any,
) -> None:
    """Load and replace adapters while streams run, in process, and time both.

    Prints JSON: the gaps between a stream's tokens in peace and beside the loads, in steps; the first token on an
    adapter in host memory and on the device, in steps; and how long loads from the disk take.
    """
    from benchmarks.swap import Streams, measure_swap

    load = Streams(count=streams, num_adapters=num_adapters, prompt_tokens=prompt_tokens, output_tokens=output_tokens)
    result = measure_swap(take(EngineConfig, values), adapters_dir, load, every_ms=every_ms, rounds=rounds)
    click.echo(json.dumps(result, indent=2))


@click.command("merge")
@options(EngineConfig)
@_ADAPTERS_DIR
@click.option("--num-adapters", type=click.IntRange(min=2), default=8, show_default=True)
@click.option("--num-prompts", type=click.IntRange(min=1), default=32, show_default=True)
@click.option("--prompt-tokens", type=click.IntRange(min=1), default=64, show_default=True)
@click.option("--output-tokens", type=click.IntRange(min=1), default=64, show_default=True)
@click.option("--rounds", type=click.IntRange(min=1), default=6, show_default=True, help="Pairs of runs of each load.")
def merge_command(
    adapters_dir: Path,
    num_adapters: int,
    num_prompts: int,
    prompt_tokens: int,
    output_tokens: int,
    rounds: int,
    **values: Any,
) -> None:
    """Hold merging unasked against never merging, in one process and in turn.

    Prints JSON for three loads: all requests on one adapter, nine in ten on one, evenly on all. For each the tokens/s
    of both policies, the median ratio of the pairs (auto over off), their range, and how often each run merged.
    """
    from benchmarks.merging import Load, measure_merging

    load = Load(
        num_adapters=num_adapters, num_prompts=num_prompts, prompt_tokens=prompt_tokens, output_tokens=output_tokens
    )
    click.echo(json.dumps(measure_merging(take(EngineConfig, values), str(adapters_dir), load, rounds), indent=2))


@click.command("front")
@options(EngineConfig)
@_ADAPTERS_DIR
@click.option("--num-adapters", type=click.IntRange(min=1), default=8, show_default=True)
@click.option("--streams", type=click.IntRange(min=1), default=64, show_default=True, help="Also --max-num-seqs.")
@click.option("--prompt-tokens", type=click.IntRange(min=1), default=64, show_default=True)
@click.option("--output-tokens", type=click.IntRange(min=1), default=64, show_default=True)
@click.option(
    "--client-processor",
    type=click.IntRange(min=0),
    multiple=True,
    help="Keeps the client on this processor; more than once for more of them (Linux).",
)
@click.option("--rounds", type=click.IntRange(min=1), default=6, show_default=True, help="Pairs of runs.")
def front_command(
    adapters_dir: Path,
    num_adapters: int,
    streams: int,
    prompt_tokens: int,
    output_tokens: int,
    rounds: int,
    client_processor: tuple[int, ...],
    **values: Any,
) -> None:
    """Hold streams through gRPC against the same work on the engine alone, in one process and in turn.

    The client is a load test in a process of its own, on the same machine, whose work counts too where both share
    processors: taskset -c 0 loraplex bench front --client-processor 1 has none of it in the ratio. Prints JSON:
    tokens/s of both, and the ratios of the pairs, through gRPC over alone.
    """
    from benchmarks.front import Load, measure_front
    from benchmarks.process import RunFailed

    load = Load(
        num_adapters=num_adapters,
        num_streams=streams,
        prompt_tokens=prompt_tokens,
        output_tokens=output_tokens,
        client_processors=client_processor,
    )
    try:
        result = measure_front(take(EngineConfig, values), adapters_dir, load, rounds)
    except RunFailed as error:
        raise click.ClickException(str(error)) from error
    click.echo(json.dumps(result, indent=2))


@click.command("kernels")
@click.option("--model", default="smollm2-135m", show_default=True, help="Whose sizes: a folder or a fetched model.")
@click.option("--threads", type=click.IntRange(min=1), help="[default: one per core]")
@click.option(
    "--rows", type=click.IntRange(min=1), multiple=True, default=[1, 8, 32, 128, 512, 2048], show_default=True
)
@click.option("--prompts", type=click.IntRange(min=1), multiple=True, default=[512, 2048], show_default=True)
@click.option("--contexts", type=click.IntRange(min=1), multiple=True, default=[512, 2048, 8192], show_default=True)
@click.option("--rounds", type=click.IntRange(min=1), default=21, show_default=True, help="The median counts.")
def kernels_command(
    model: str,
    threads: int | None,
    rows: tuple[int, ...],
    prompts: tuple[int, ...],
    contexts: tuple[int, ...],
    rounds: int,
) -> None:
    """Hold the native CPU kernels against torch's: linear layers, attention of a prompt and of one new token.

    The native ones sum every row in one fixed order, so that a request has the same bits in any batch. Prints JSON, in
    milliseconds: all linear layers in float32 at --rows, and one layer's attention over --prompts and --contexts.
    """
    import torch

    from benchmarks.kernels import Shape, measure_kernels

    if threads is not None:
        torch.set_num_threads(threads)
    click.echo(json.dumps(measure_kernels(Shape.of(resolve(model)), rows, prompts, contexts, rounds), indent=2))

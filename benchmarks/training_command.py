"""The command `loraplex bench train`."""

import json
import os
from dataclasses import asdict
from pathlib import Path

import click

from adapters.tasks import TASKS
from benchmarks.cli import peer_option, progress, warn_if_busy
from benchmarks.contenders import PEERS
from server.base_models import resolve
from server.errors import ConfigError


def _split_tasks(_: click.Context, __: click.Parameter, text: str) -> list[str]:
    names = [name.strip() for name in text.split(",")]
    for name in names:
        if name not in TASKS:
            raise click.BadParameter(f"{name!r} is not one of {', '.join(TASKS)}")
    return names


@click.command("train")
@click.option("--model", default="smollm2-135m", show_default=True, help="Base model: a folder or a fetched model.")
@click.option("--jobs", type=click.IntRange(min=1), default=1, show_default=True, help="Adapters, trained at once.")
@click.option(
    "--tasks",
    default="dates",
    show_default=True,
    callback=_split_tasks,
    help=f"What they learn, in turn, commas between: {', '.join(TASKS)}. Each has data of its own.",
)
@click.option("--rank", type=click.IntRange(min=1), default=8, show_default=True)
@click.option(
    "--batch-tokens", type=click.IntRange(min=1), default=256, show_default=True, help="Of each adapter's step."
)
@click.option("--steps", type=click.IntRange(min=2), default=16, show_default=True, help="The first one is not timed.")
@click.option("--rounds", type=click.IntRange(min=1), default=3, show_default=True, help="The median counts.")
@click.option("--threads", type=click.IntRange(min=0), default=0, show_default=True, help="0: one per core.")
@click.option("--timeout", type=click.IntRange(min=1), default=1800, show_default=True, help="Seconds of one run.")
@peer_option(PEERS["peft"])
def train_bench_command(
    model: str,
    jobs: int,
    tasks: list[str],
    rank: int,
    batch_tokens: int,
    steps: int,
    rounds: int,
    threads: int,
    timeout: int,
    peft: Path | None,
) -> None:
    """Train adapters on Loraplex and on PEFT with transformers' Trainer, and compare.

    Float32 on the CPU, all linear layers, AdamW, the same batches from the same first weights, so that losses are equal
    up to rounding. Loraplex trains all --jobs at once, the Trainer one after the other, which is all it does. Every run
    is a process of its own. Prints JSON: tokens/s of both without padding, their ratio, and first and last losses.
    """
    load_average = warn_if_busy()
    folder = Path(resolve(model))
    if not folder.is_dir():
        raise ConfigError(f"--model {model}: the peer reads it, so it must be a folder or a fetched model")
    from benchmarks.process import RunFailed
    from benchmarks.report import machine
    from benchmarks.training import Work, measure_training

    work = Work(tasks=tasks, jobs=jobs, rank=rank, batch_tokens=batch_tokens, steps=steps)
    threads = threads or os.cpu_count() or 1
    try:
        found = measure_training(
            folder,
            work,
            peft and peft.absolute(),
            rounds=rounds,
            threads=threads,
            timeout=timeout,
            progress=progress,
        )
    except RunFailed as error:
        raise click.ClickException(str(error)) from error
    header = {"load_average": round(load_average, 2), "model": folder.name, "threads": threads, "rounds": rounds}
    click.echo(json.dumps({"machine": machine(), **header, **asdict(work), **found}, indent=2))

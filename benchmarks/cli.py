"""The command `loraplex bench compare`."""

import json
import os
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

import click

from benchmarks.contenders import PEERS, Peer, select
from benchmarks.workload import Workload, parse_workload
from server.base_models import cache_dir, resolve
from server.errors import ConfigError

Command = TypeVar("Command", bound=Callable[..., Any])

QUIET_LOAD = 0.3  # load average above which something else had the cores


def peer_option(peer: Peer) -> Callable[[Command], Command]:
    """Where a peer is, or None."""
    return click.option(
        peer.flag,
        peer.identifier,
        metavar=peer.path,
        type=click.Path(exists=True, dir_okay=False, path_type=Path),
        envvar=peer.variable,
        show_envvar=True,
        help=f"Peer {peer.name}: {peer.install}.",
    )


def _peer_options(command: Command) -> Command:
    for peer in reversed(PEERS.values()):
        command = peer_option(peer)(command)
    return command


def _parse_workloads(_: click.Context, __: click.Parameter, text: str) -> list[Workload]:
    try:
        return [parse_workload(spec) for spec in text.split(",")]
    except ValueError as error:
        raise click.BadParameter(str(error)) from error


@click.command("compare")
@click.option("--model", default="smollm2-135m", show_default=True, help="Base model: a folder or a fetched model.")
@click.option(
    "--workloads",
    default="32x0,32x1,32x8,32x32",
    show_default=True,
    callback=_parse_workloads,
    help="REQUESTSxADAPTERS, commas between; ':ranks' gives the adapters ranks 8 to 64, ':skewed' asks "
    "for few of them most of the time, ':unused' leaves them idle.",
)
@click.option("--prompt-tokens", type=click.IntRange(min=1), default=64, show_default=True)
@click.option("--output-tokens", type=click.IntRange(min=1), default=64, show_default=True)
@click.option("--rounds", type=click.IntRange(min=1), default=3, show_default=True, help="The median counts.")
@click.option("--threads", type=click.IntRange(min=0), default=0, show_default=True, help="0: one per core.")
@_peer_options
@click.option("--contenders", default="", help="Only these, by name or program, commas between.")
@click.option(
    "--work-dir",
    type=click.Path(file_okay=False, path_type=Path),
    default=lambda: cache_dir().parent / "compare",
    help="Where adapters and converted models are kept.  [default: in the cache folder]",
)
@click.option("--timeout", type=click.IntRange(min=1), default=1800, show_default=True, help="Seconds of one run.")
@click.option("--json", "json_file", type=click.Path(dir_okay=False, path_type=Path), help="Write everything here too.")
def compare_command(
    model: str,
    workloads: list[Workload],
    prompt_tokens: int,
    output_tokens: int,
    rounds: int,
    threads: int,
    contenders: str,
    work_dir: Path,
    timeout: int,
    json_file: Path | None,
    **paths: Path | None,
) -> None:
    """Run the same work on Loraplex and on its peers, and print how they compare.

    All requests are there at once; request i uses adapter i mod K, or the one that a power law drew for it, the same
    for everybody; every one generates the same number of tokens, greedily. Every run is a process of its own, one at a
    time; each round runs everybody once. Peers whose flag is not given are left out. --json is rewritten after every
    run, so nothing measured is lost.
    """
    load_average = warn_if_busy()
    installed = {name: path.absolute() for name, peer in PEERS.items() if (path := paths[peer.identifier]) is not None}
    chosen = select([name.strip() for name in contenders.split(",") if name.strip()], installed)
    folder = Path(resolve(model))
    if not folder.is_dir():
        raise ConfigError(f"--model {model}: every peer reads it, so it must be a folder or a fetched model")

    from rich.console import Console

    from benchmarks.compare import Comparison, Settings
    from benchmarks.material import Material
    from benchmarks.report import Report, machine

    settings = Settings(
        prompt_tokens=prompt_tokens,
        output_tokens=output_tokens,
        threads=threads or os.cpu_count() or 1,
        timeout=timeout,
    )
    hardware = machine()
    header = {
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "load_average": round(load_average, 2),
        "model": folder.name,
        "rounds": rounds,
        "prompt_tokens": prompt_tokens,
        "output_tokens": output_tokens,
        "threads": settings.threads,
    }
    comparison = Comparison(Material(folder, work_dir, progress), installed, settings)
    report = Report(comparison.results, workloads, chosen)
    try:
        for _ in comparison.run(workloads, chosen, rounds, progress):
            if json_file:
                json_file.write_text(json.dumps({"machine": hardware, **header, **report.as_dict()}, indent=2) + "\n")
    finally:
        console = Console()
        for name, value in {**hardware, **header}.items():
            console.print(f"{name.replace('_', ' ')}: {value}", highlight=False, markup=False)
        report.print(console)


def warn_if_busy() -> float:
    """The load average; says so if something else has the cores."""
    load_average = os.getloadavg()[0]
    if load_average > QUIET_LOAD:
        progress(f"warning: the load average is {load_average:.2f}: figures of a busy machine mean little")
    return load_average


def progress(text: str) -> None:
    """A line beside the result, which goes to standard output."""
    click.echo(text, err=True)

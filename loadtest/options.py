"""The flags of a run and of a sweep, each with its environment variable; those of a workload are its YAML keys too.

Precedence: flag, then environment, then the workload's file, then the default.
"""

from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any, TypeVar

import click

from loadtest.measurement import Slo
from loadtest.workload import Numbers, Range, Workload

Command = TypeVar("Command", bound=Callable[..., Any])

_DEFAULT_SLO = Slo()
_POSITIVE = click.FloatRange(min=0, min_open=True)


def option(flag: str, *parameter: str, envvar: str = "", **settings: Any) -> Callable[[Command], Command]:
    """A flag with an environment variable; its help names both.

    Args:
        parameter: what the command calls it, if not like the flag.
        envvar: left out: LORAPLEX_LOADTEST_ and the flag.
    """
    twin = envvar or f"LORAPLEX_LOADTEST_{flag.removeprefix('--').replace('-', '_').upper()}"
    shows_default = settings.get("default") != ""  # empty: the help says what that means
    return click.option(flag, *parameter, envvar=twin, show_envvar=True, show_default=shows_default, **settings)


def run_options(command: Command) -> Command:
    """What a run and a sweep share: the server, the limits, the report, and every field of a workload."""
    options = [
        option("--address", default="127.0.0.1:50051", envvar="LORAPLEX_ADDRESS",
               help="Address of the server; https://HOST:PORT speaks TLS."),
        option("--ca", type=click.Path(exists=True, dir_okay=False), envvar="LORAPLEX_CA",
               help="PEM file of the authorities that sign the server's certificate; left out: those that gRPC comes "
               "with."),
        option("--workload", "workload_name", default="slora-short",
               help="A named workload or a YAML file; the flags below that are its keys go over both."),
        option("--adapters", default="", help="Names with commas between, the most popular first. Left out: the first "
               "of those that the server lists."),
        option("--metrics-url", default="", help="The server's Prometheus endpoint: its memory and queue."),
        option("--processes", type=click.IntRange(min=1), default=1, help="Split the load over this many processes."),
        option("--timeout", type=_POSITIVE, default=300.0, help="Deadline of a request in seconds."),
        option("--slo-first-token", type=_POSITIVE, default=_DEFAULT_SLO.first_token, help="Limit in seconds."),
        option("--slo-inter-token", type=_POSITIVE, default=_DEFAULT_SLO.inter_token,
               help="Limit in seconds for a request's mean gap."),
        option("--slo-end-to-end", type=_POSITIVE, default=_DEFAULT_SLO.end_to_end, help="Limit in seconds."),
        option("--output", type=click.Path(file_okay=False, path_type=Path), default=Path("build/loadtest"),
               help="Folder for report.html, report.json and the HDR histograms."),
        *[
            option(f"--{item.name.replace('_', '-')}", type=_type_of(item.type, item.metadata["choices"]),
                   help=f"{item.metadata['help']} YAML key: {item.name}.")
            for item in fields(Workload)
        ],
    ]  # fmt: skip
    for decorate in reversed(options):
        command = decorate(command)
    return command


def _type_of(kind: Any, choices: tuple[str, ...]) -> Any:
    return click.Choice(choices) if choices else {Range: str, Numbers: str}.get(kind, kind)

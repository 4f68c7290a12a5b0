"""The command `loadtest`: one run, a sweep over rates, the named workloads, and a server that does nothing."""

import asyncio
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, TypeVar

import click
import grpc
from rich.console import Console
from rich.table import Table

from loadtest.churn import ChurnError
from loadtest.console import fairness_line, table
from loadtest.measurement import Slo
from loadtest.named import WORKLOADS, load_workload
from loadtest.null_server import serve_null
from loadtest.observer import ServerUnreachable
from loadtest.output import Report
from loadtest.processes import LoadProcessError
from loadtest.run import Target, measure
from loadtest.sweep import RateSearch, passes
from loadtest.workload import Range, Workload, WorkloadError

Command = TypeVar("Command", bound=Callable[..., Any])

_INTERRUPTED = 130  # exit code, as shells have it for Ctrl-C
_DEFAULT_SLO = Slo()
_POSITIVE = click.FloatRange(min=0, min_open=True)


@click.group("loadtest")
def loadtest_command() -> None:
    """Load a running server and report its latencies."""


def _options(command: Command) -> Command:
    """What a run and a sweep share: the server, the limits, the report, and every field of a workload."""
    options = [
        click.option("--address", default="127.0.0.1:50051", show_default=True, envvar="LORAPLEX_ADDRESS",
                     show_envvar=True, help="Address of the server; https://HOST:PORT speaks TLS."),
        click.option("--ca", type=click.Path(exists=True, dir_okay=False), envvar="LORAPLEX_CA",
                     show_envvar=True, help="PEM file of the authorities that sign the server's certificate; left out: "
                     "those that gRPC comes with."),
        click.option("--workload", "workload_name", default="slora-short", show_default=True,
                     help="A named workload or a YAML file; the flags below that are its keys go over both."),
        click.option("--adapters", default="", help="Names with commas between, the most popular first. "
                     "Left out: the first of those that the server lists."),
        click.option("--metrics-url", default="", help="The server's Prometheus endpoint: its memory and queue."),
        click.option("--processes", type=click.IntRange(min=1), default=1, show_default=True,
                     help="Split the load over this many processes."),
        click.option("--timeout", type=_POSITIVE, default=300.0, show_default=True,
                     help="Deadline of a request in seconds."),
        click.option("--slo-first-token", type=_POSITIVE, default=_DEFAULT_SLO.first_token, show_default=True,
                     help="Limit in seconds."),
        click.option("--slo-inter-token", type=_POSITIVE, default=_DEFAULT_SLO.inter_token, show_default=True,
                     help="Limit in seconds for a request's mean gap."),
        click.option("--slo-end-to-end", type=_POSITIVE, default=_DEFAULT_SLO.end_to_end, show_default=True,
                     help="Limit in seconds."),
        click.option("--output", type=click.Path(file_okay=False, path_type=Path), default=Path("build/loadtest"),
                     show_default=True, help="Folder for report.html, report.json and the HDR histograms."),
        *[
            click.option(f"--{item.name.replace('_', '-')}", type=_flag_type(item.type, item.metadata["choices"]),
                         help=item.metadata["help"])
            for item in fields(Workload)
        ],
    ]  # fmt: skip
    for option in reversed(options):
        command = option(command)
    return command


def _flag_type(kind: Any, choices: tuple[str, ...]) -> Any:
    return click.Choice(choices) if choices else {Range: str}.get(kind, kind)


@loadtest_command.command()
@_options
def run(output: Path, **values: Any) -> None:
    """Send one workload."""
    with _one_line_errors():
        session = _Session(output, **values)
        asyncio.run(session.run())
    session.conclude()


@loadtest_command.command()
@_options
@click.option("--rates", default="", help="Requests per second with commas between. Left out: doubled from --rate "
              "until the limits break, then bisected.")  # fmt: skip
@click.option("--attainment", type=click.FloatRange(0, 1), default=0.9, show_default=True,
              help="Share of requests that must keep every limit.")  # fmt: skip
@click.option("--bisections", type=click.IntRange(min=0), default=3, show_default=True)
def sweep(output: Path, rates: str, attainment: float, bisections: int, **values: Any) -> None:
    """Send a workload at several rates: where is the knee, and what is the goodput?"""
    with _one_line_errors():
        session = _Session(output, attainment=attainment, **values)
        given = [_rate(text) for text in rates.split(",")] if rates else []
        asyncio.run(session.sweep(given, RateSearch(session.workload.rate, bisections)))
    session.conclude()


@loadtest_command.command()
def workloads() -> None:
    """List the named workloads."""
    listed = Table("name", "what it is")
    for name, (text, _) in WORKLOADS.items():
        listed.add_row(name, text)
    Console().print(listed)


@loadtest_command.command("null-server")
@click.option("--listen", default="127.0.0.1:50051", show_default=True)
def null_server(listen: str) -> None:
    """Answer every request at once: what it cannot be offered is the load test's own limit."""
    with _one_line_errors():
        asyncio.run(serve_null(listen))


class _Session:
    """One invocation: measures, writes the report after every run, and says how it ended."""

    def __init__(
        self,
        output: Path,
        *,
        address: str,
        ca: str | None,
        workload_name: str,
        adapters: str,
        metrics_url: str,
        processes: int,
        timeout: float,
        slo_first_token: float,
        slo_inter_token: float,
        slo_end_to_end: float,
        attainment: float | None = None,
        **overrides: Any,
    ) -> None:
        given = {key: value for key, value in overrides.items() if value is not None}
        name, self.workload = load_workload(workload_name, given)
        self._target = Target(
            address=address,
            ca=ca or "",
            adapters=tuple(part.strip() for part in adapters.split(",")) if adapters else (),
            metrics_url=metrics_url,
            processes=processes,
            timeout=timeout,
        )
        self._slo = Slo(slo_first_token, slo_inter_token, slo_end_to_end)
        self._console = Console()
        self._report = Report(output, name, self.workload, self._target, attainment)
        self._stop = asyncio.Event()

    async def run(self) -> None:
        self._catch_ctrl_c()
        await self._measure("run", self.workload)

    async def sweep(self, rates: list[float], search: RateSearch) -> None:
        if self.workload.concurrency:
            raise WorkloadError("a sweep is over rates: concurrency must be 0")
        if not rates and not self.workload.rate:
            raise WorkloadError("rate is 0, which is nothing to start a sweep from: give --rate or --rates")
        self._catch_ctrl_c()
        for rate in rates or iter(search.next, None):
            summary = await self._measure(f"rate-{rate:g}", replace(self.workload, rate=rate))
            if self._stop.is_set():
                return
            search.book(passes(summary, self._report.attainment or 0.0))

    def conclude(self) -> None:
        """Prints what was measured and where the report is; ends with an error if anything was not as it should be."""
        self._console.print(self._report.server_line(), style="dim", highlight=False)
        if verdict := self._report.verdict_line():
            self._console.print(verdict, highlight=False)
        self._console.print(f"report: {self._report.page}", highlight=False, soft_wrap=True)
        if self._report.interrupted:
            self._console.print("interrupted; the report holds what was measured until then")
            raise SystemExit(_INTERRUPTED)
        if fault := self._report.fault:
            raise click.ClickException(fault)

    async def _measure(self, label: str, workload: Workload) -> dict[str, Any]:
        measured = await measure(self._target, label, workload, self._slo, self._stop, self._console)
        summary = self._report.add(measured)
        self._console.print(table(summary))
        if fairness := fairness_line(summary):
            self._console.print(fairness, highlight=False)
        if left_out := summary["left_out"]:
            self._console.print(left_out, style="yellow")
        if warning := summary["client"]["bottleneck"]:
            self._console.print(f"warning: {warning} (--processes, or another machine)", style="yellow")
        return summary

    def _catch_ctrl_c(self) -> None:
        """The first one ends the run in order, a second one at once."""
        loop = asyncio.get_running_loop()

        def interrupt() -> None:
            self._stop.set()
            loop.remove_signal_handler(signal.SIGINT)

        loop.add_signal_handler(signal.SIGINT, interrupt)


def _rate(text: str) -> float:
    try:
        rate = float(text)
    except ValueError:
        rate = 0.0
    if not 0 < rate < float("inf"):
        raise WorkloadError(f"--rates: {text!r} is not a number of requests per second")
    return rate


@contextmanager
def _one_line_errors() -> Iterator[None]:
    try:
        yield
    except (WorkloadError, ServerUnreachable, LoadProcessError, ChurnError, OSError) as error:
        raise click.ClickException(str(error)) from error
    except grpc.aio.AioRpcError as error:
        raise click.ClickException(f"{error.code().name}: {error.details()}") from error

"""The command `loadtest`: one run, a sweep over rates, the named workloads, and a server that does nothing."""

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click
import grpc
from rich.console import Console
from rich.table import Table

from loadtest.churn import ChurnError
from loadtest.named import WORKLOADS
from loadtest.null_server import serve_null
from loadtest.observer import ServerUnreachable
from loadtest.options import option, run_options
from loadtest.processes import LoadProcessError
from loadtest.session import Session
from loadtest.workload import WorkloadError


@click.group("loadtest")
def loadtest_command() -> None:
    """Load a running server and report its latencies."""


@loadtest_command.command()
@run_options
def run(output: Path, **values: Any) -> None:
    """Send one workload."""
    with _one_line_errors():
        session = Session(output, **values)
        asyncio.run(session.run())
    _conclude(session)


@loadtest_command.command()
@run_options
@option("--rates", default="", help="Requests per second with commas between. Left out: doubled from --rate until the "
        "limits break, then bisected.")  # fmt: skip
@option("--attainment", type=click.FloatRange(0, 1), default=0.9, help="Share of requests that must keep every limit.")
@option("--bisections", type=click.IntRange(min=0), default=3, help="Rates to try between the last good and the first "
        "bad one.")  # fmt: skip
def sweep(output: Path, rates: str, attainment: float, bisections: int, **values: Any) -> None:
    """Send a workload at several rates: where is the knee, and what is the goodput?"""
    with _one_line_errors():
        session = Session(output, attainment=attainment, **values)
        asyncio.run(session.sweep(rates, bisections))
    _conclude(session)


@loadtest_command.command()
def workloads() -> None:
    """List the named workloads."""
    listed = Table("name", "what it is")
    for name, (text, _) in WORKLOADS.items():
        listed.add_row(name, text)
    Console().print(listed)


@loadtest_command.command("null-server")
@option("--listen", default="127.0.0.1:50051", help="Address to serve at.")
def null_server(listen: str) -> None:
    """Answer every request at once: what it cannot be offered is the load test's own limit."""
    with _one_line_errors():
        asyncio.run(serve_null(listen))


def _conclude(session: Session) -> None:
    code, fault = session.conclude()
    if fault:
        raise click.ClickException(fault)
    raise SystemExit(code)


@contextmanager
def _one_line_errors() -> Iterator[None]:
    try:
        yield
    except (WorkloadError, ServerUnreachable, LoadProcessError, ChurnError, OSError) as error:
        raise click.ClickException(str(error)) from error
    except grpc.aio.AioRpcError as error:
        raise click.ClickException(f"{error.code().name}: {error.details()}") from error

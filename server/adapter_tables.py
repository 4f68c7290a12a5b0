"""Adapters as the commands show them."""

from collections.abc import Mapping, Sequence
from typing import Literal

import click
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from server.pb.loraplex.v1 import adapters_pb2 as pb

_NUMBERS = ("traffic", "rank", "disk MiB", "host MiB", "device MiB", "running", "waiting")
_COLUMNS = ("name", "version", "traffic", "state", *_NUMBERS[1:], "digest", "error")
_LONG = ("name", "error")  # go on in the next line of a narrow terminal; all others are whole in any


def print_adapters(found: Sequence[pb.Adapter]) -> None:
    """One row each; columns in which nothing would stand are left out, so that the rest has room."""
    rows = [_cells(adapter) for adapter in found]
    shown = [index for index, _ in enumerate(_COLUMNS) if any(row[index] for row in rows)]
    table = Table(box=box.SIMPLE, padding=(0, 1, 0, 0))
    for title in (_COLUMNS[index] for index in shown):
        justify: Literal["left", "right"] = "right" if title in _NUMBERS else "left"
        table.add_column(title, justify=justify, overflow="fold", no_wrap=title not in _LONG)
    for row in rows:
        table.add_row(*[Text(row[index]) for index in shown])
    Console().print(table)


def _cells(adapter: pb.Adapter) -> list[str]:
    """In the order of the columns."""
    return [
        adapter.name,
        adapter.version + (" *" if adapter.current else ""),
        f"{adapter.traffic_percent} %" if adapter.traffic_percent else "",
        state_of(adapter),
        str(adapter.rank or ""),
        *(mib(size) if size else "" for size in (adapter.bytes_disk, adapter.bytes_host, adapter.bytes_device)),
        *(str(number or "") for number in (adapter.requests_running, adapter.requests_waiting)),
        adapter.digest[:12],
        adapter.error,
    ]


def state_of(adapter: pb.Adapter) -> str:
    state = pb.AdapterState.Name(adapter.state)
    if adapter.state == pb.READY:
        state += f" ({pb.AdapterTier.Name(adapter.tier).lower()}{', pinned' if adapter.pinned else ''}"
        state += ", merged)" if adapter.merged else ")"
    return state


def print_fields(adapter: pb.Adapter) -> None:
    """All that is known of one."""
    table = Table(show_header=False)
    table.add_column()
    table.add_column(overflow="fold")
    for field in pb.Adapter.DESCRIPTOR.fields:
        value = getattr(adapter, field.name)
        if field.enum_type is not None:
            value = field.enum_type.values_by_number[value].name
        if isinstance(value, Mapping):
            value = [f"{key}: {count}" for key, count in value.items()]
        table.add_row(field.name, Text(str(value) if isinstance(value, str | int) else ", ".join(value)))
    Console().print(table)


def say_loaded(adapter: pb.Adapter) -> None:
    click.echo(
        f"{adapter.name}@{adapter.version}: generation {adapter.generation}, rank {adapter.rank} on "
        f"{adapter.num_layers} layers, {adapter.bytes_host:,} bytes, digest {adapter.digest[:12]}"
        f"{', pinned' if adapter.pinned else ''}"
    )
    if adapter.unmatched_targets:
        click.echo(f"warning: target_modules that match no layer: {', '.join(adapter.unmatched_targets)}", err=True)
    if adapter.adds_nothing:
        click.echo("warning: every B is zero, so it answers as the base does", err=True)
    if adapter.other_base:
        click.echo(f"warning: trained on {adapter.other_base}, which is not how the served base is called", err=True)


def mib(num_bytes: int) -> str:
    return f"{num_bytes / 2**20:,.1f}"

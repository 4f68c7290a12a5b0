"""What a comparison says: tables for people, in Markdown, and one dictionary for machines."""

import os
import platform
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.table import Table

from benchmarks.agreement import Agreement, agreement
from benchmarks.compare import Results
from benchmarks.contenders import BASELINE, OWN, PEERS, Contender
from benchmarks.workload import Workload
from loadtest.environment import processor

NOTHING = "–"
_TABLE_WIDTH = 160  # where the output is a file


def machine() -> dict[str, Any]:
    """The processor as the system names it, its cores, and the widest instructions that torch uses on it."""
    return {
        "cpu": processor(),
        "cores": os.cpu_count(),
        "isa": torch.backends.cpu.get_cpu_capability(),
        "system": platform.platform(),
    }


class Report:
    """Reads the results of a comparison; what was not measured is left out."""

    def __init__(self, results: Results, workloads: Sequence[Workload], contenders: Sequence[Contender]) -> None:
        self._results = results
        self._workloads = workloads
        self._contenders = contenders

    def print(self, console: Console) -> None:
        if not console.is_terminal:
            console.width = _TABLE_WIDTH
        for table in (self._speeds(), self._own_ratios(), self._agreements()):
            if table.row_count:
                console.print(table)
        for name, version in self._results.versions.items():
            console.print(f"{name}: {version}", highlight=False)
        for (name, workload), error in self._results.failures.items():
            console.print(f"{name}, {workload}, failed: {error}", style="red", highlight=False, markup=False)
        for peer in PEERS.values():
            if all(contender.program != peer.name for contender in self._contenders):
                hint = f"{peer.install}, then {peer.flag} {peer.path} or {peer.variable}"
                console.print(f"{peer.name}: not given: {hint}", highlight=False, markup=False)

    def as_dict(self) -> dict[str, Any]:
        return {
            "runs": [asdict(run) for run in self._results.runs],
            "medians": {
                contender.name: {
                    str(workload): rate
                    for workload in self._workloads
                    if (rate := self._results.median(contender.name, workload)) is not None
                }
                for contender in self._contenders
            },
            "own_ratios": dict(self._own_ratio_rows()),
            "agreements": [
                {"contender": name, "workload": workload, "reference": reference, **asdict(found)}
                for name, workload, reference, found in self._agreement_rows()
            ],
            "failures": [
                {"contender": name, "workload": workload, "error": error}
                for (name, workload), error in self._results.failures.items()
            ],
            "versions": self._results.versions,
        }

    def _speeds(self) -> Table:
        table = _table("tokens/s, and Loraplex in float32 over it (requests x adapters)")
        table.add_column("contender")
        for workload in self._workloads:
            table.add_column(str(workload), justify="right")
        for contender in self._contenders:
            table.add_row(contender.name, *[self._speed(contender.name, workload) for workload in self._workloads])
        return table

    def _speed(self, contender: str, workload: Workload) -> str:
        if (contender, str(workload)) in self._results.failures:
            return "failed"
        rate = self._results.median(contender, workload)
        if rate is None:
            return NOTHING
        own = self._results.median(BASELINE, workload)
        return f"{rate:.1f}" if own is None or contender == BASELINE else f"{rate:.1f} ({own / rate:.2f}×)"

    def _own_ratios(self) -> Table:
        table = _table("Loraplex against itself")
        table.add_column("what")
        table.add_column("ratio", justify="right")
        for what, ratio in self._own_ratio_rows():
            table.add_row(what, f"{ratio:.3f}")
        return table

    def _own_ratio_rows(self) -> Iterator[tuple[str, float]]:
        """Each workload over the one it is measured by, and each number format over float32."""
        names = [contender.name for contender in self._contenders if contender.program == OWN]
        for workload in self._workloads:
            for name in names:
                if workload.yardstick and (ratio := self._ratio(name, workload, name, workload.yardstick)):
                    yield f"{workload} over {workload.yardstick}, {name}", ratio
            for name in names:
                if name != BASELINE and (ratio := self._ratio(name, workload, BASELINE, workload)):
                    yield f"{name} over {BASELINE}, {workload}", ratio

    def _ratio(self, name: str, workload: Workload, other_name: str, other_workload: Workload) -> float | None:
        rate = self._results.median(name, workload)
        other = self._results.median(other_name, other_workload)
        return None if rate is None or other is None else round(rate / other, 4)

    def _agreements(self) -> Table:
        table = _table("equality of greedy tokens (information: only equal arithmetic gives equal tokens)")
        for title in ("contender", "workload", "against", "requests equal", "before a difference", "tokens equal"):
            table.add_column(title, justify="left" if title in ("contender", "workload", "against") else "right")
        for name, workload, reference, found in self._agreement_rows():
            table.add_row(
                name,
                workload,
                reference,
                f"{found.equal_requests}/{found.requests}",
                f"{found.share_before_divergence:.1%}",
                f"{found.share_of_tokens:.1%}",
            )
        return table

    def _agreement_rows(self) -> Iterator[tuple[str, str, str, Agreement]]:
        """Contender, workload, reference, agreement: the reference is the first of the contender's own that ran."""
        outputs = self._results.outputs
        for contender in self._contenders:
            for workload in map(str, self._workloads):
                ran = [name for name in contender.references if (name, workload) in outputs]
                if ran and contender.name != ran[0] and (contender.name, workload) in outputs:
                    found = agreement(outputs[contender.name, workload], outputs[ran[0], workload])
                    yield contender.name, workload, ran[0], found


def _table(title: str) -> Table:
    return Table(title=title, title_justify="left", box=box.MARKDOWN)

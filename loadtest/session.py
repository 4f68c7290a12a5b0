"""One invocation of `loadtest run` or `loadtest sweep`: measures, reports after every run, and says how it ended."""

import asyncio
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console

from loadtest.console import fairness_line, table
from loadtest.measurement import Slo
from loadtest.named import load_workload
from loadtest.output import Report
from loadtest.run import Target, measure
from loadtest.sweep import RateSearch, passes
from loadtest.workload import Workload, WorkloadError


class Session:
    """Owns the report and the end: the first SIGINT or SIGTERM ends the run in order, a second one at once."""

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
        """Takes the values of the flags; `overrides` are those of a workload's keys, None where not given.

        Raises:
            WorkloadError: there is no such workload.
            OSError: nothing can be written to `output`.
        """
        given = {key: value for key, value in overrides.items() if value is not None}
        name, self._workload = load_workload(workload_name, given)
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
        self._report = Report(output, name, self._workload, self._target, attainment)
        self._attainment = attainment or 0.0
        self._stop = asyncio.Event()
        self._signal: int | None = None

    async def run(self) -> None:
        self._catch_signals()
        await self._measure("run", self._workload)

    async def sweep(self, rates: str, bisections: int) -> None:
        """
        Args:
            rates: numbers with commas between; empty: search from the workload's own.
        """
        if self._workload.concurrency:
            raise WorkloadError("a sweep is over rates: concurrency must be 0")
        if not rates and not self._workload.rate:
            raise WorkloadError("rate is 0, which is nothing to start a sweep from: give --rate or --rates")
        given = [replace(self._workload, rate=_rate(text)) for text in rates.split(",")] if rates else []
        search = RateSearch(self._workload.rate, bisections, *self._workload.rate_limits)
        found = (replace(self._workload, rate=rate) for rate in iter(search.next, None))
        self._catch_signals()
        for workload in given or found:
            summary = await self._measure(f"rate-{workload.rate:g}", workload)
            if self._stop.is_set():
                return
            search.book(passes(summary, self._attainment))

    def conclude(self) -> tuple[int, str]:
        """Prints what was measured and where the report is.

        Returns:
            The exit code, and what was not as it should be.
        """
        self._console.print(self._report.server_line(), style="dim", highlight=False)
        if verdict := self._report.verdict_line():
            self._console.print(verdict, highlight=False)
        self._console.print(f"report: {self._report.page}", highlight=False, soft_wrap=True)
        if self._signal:
            self._console.print("interrupted; the report holds what was measured until then")
            return 128 + self._signal, ""  # as shells have it
        return int(bool(self._report.fault)), self._report.fault

    async def _measure(self, label: str, workload: Workload) -> dict[str, Any]:
        measured = await measure(self._target, label, workload, self._slo, self._stop, self._console)
        summary = self._report.add(measured)
        self._console.print(table(summary))
        if fairness := fairness_line(summary):
            self._console.print(fairness, highlight=False)
        if left_out := summary["left_out"]:
            self._console.print(left_out, style="yellow")
        for warning in self._warnings(summary):
            self._console.print(f"warning: {warning}", style="yellow")
        self._report.write()
        return summary

    def _warnings(self, summary: dict[str, Any]) -> list[str]:
        bottleneck = summary["client"]["bottleneck"]
        unseen = summary["churn"]["warning"] if summary["churn"] else ""
        return [
            *([f"{bottleneck} (--processes, or another machine)"] if bottleneck else []),
            *([unseen] if unseen else []),
        ]

    def _catch_signals(self) -> None:
        loop = asyncio.get_running_loop()

        def interrupt(signum: int) -> None:
            self._signal = signum
            self._stop.set()
            for caught in (signal.SIGINT, signal.SIGTERM):
                loop.remove_signal_handler(caught)

        for signum in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(signum, interrupt, signum)


def _rate(text: str) -> float:
    try:
        rate = float(text)
    except ValueError:
        rate = 0.0
    if not 0 < rate < float("inf"):
        raise WorkloadError(f"--rates: {text!r} is not a number of requests per second")
    return rate

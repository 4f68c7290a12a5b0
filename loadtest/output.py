"""What a load test leaves in a folder: JSON, a page and HDR histograms."""

import json
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

from loadtest.console import server_line
from loadtest.environment import client_environment
from loadtest.histogram import percentile_distribution
from loadtest.measurement import Measurement
from loadtest.page import render
from loadtest.report import LATENCIES, histograms, summarize
from loadtest.run import Target
from loadtest.sweep import verdict
from loadtest.workload import Workload

# How requests end at the rates that a sweep goes to: there it is no fault.
_UNDER_LOAD = {"OK", "RESOURCE_EXHAUSTED", "DEADLINE_EXCEEDED", "UNAVAILABLE", "CANCELLED"}


class Report:
    """Owns the folder of a report, which is written anew after every run: an early end keeps what there is."""

    def __init__(self, folder: Path, name: str, workload: Workload, target: Target, attainment: float | None) -> None:
        """Makes the folder, and leaves an earlier report in it until there is something to write.

        Args:
            attainment: of a sweep, the share of requests that must keep every limit.

        Raises:
            OSError: the folder cannot be made or written to.
        """
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with TemporaryFile(dir=folder):
                pass
        except OSError as error:
            raise OSError(f"--output: cannot write to {folder}: {error.strerror}") from error
        self._folder = folder
        self.page = folder / "report.html"
        self.attainment = attainment
        self._rates: list[float] = []
        self._histograms: dict[str, bytes] = {}  # by file name
        self._document: dict[str, Any] = {
            "name": name,
            "workload": asdict(workload),
            "target": asdict(target),
            "client": client_environment(),
            "server": {},
            "settings": {},
            "runs": [],
            "sweep": None,
        }

    @property
    def fault(self) -> str:
        """What was wrong, in one line; empty: nothing."""
        runs = self._document["runs"]
        for run in runs:
            if run["server_lost"]:
                return str(run["server_lost"])
            if run["processes_lost"]:
                return str(run["processes_lost"])
            if run["churn"] and run["churn"]["faults"]:
                faults = run["churn"]["faults"]
                return f"{len(faults)} faults under churn, the first: {faults[0]}"
            if run["failed"] and (self.attainment is None or not any(other["completed"] for other in runs)):
                return f"{run['failed']} requests failed, the first with {run['first_error']}"
            if odd := sorted(run["codes"].keys() - _UNDER_LOAD):
                return f"{run['label']}: requests failed with {', '.join(odd)}, which no rate explains"
        return ""

    def add(self, run: Measurement) -> dict[str, Any]:
        """Books a run; gives its numbers."""
        summary = summarize(run)
        kept = histograms(run)
        summary["hdr"] = {name: histogram.encode().decode() for name, histogram in kept.items()}
        self._document["server"], self._document["settings"] = run.server, run.settings
        self._document["runs"].append(summary)
        if self.attainment is not None:
            self._rates.append(run.workload.rate)
            self._document["sweep"] = verdict(
                list(zip(self._rates, self._document["runs"], strict=True)), self.attainment
            )
            self._document["sweep"]["rates"] = self._rates
        for name, histogram in kept.items():
            self._histograms[f"{run.label}-{name}.hgrm"] = percentile_distribution(histogram)
        return summary

    def write(self) -> None:
        """Makes the folder's report the one of the runs so far; nothing is left of an earlier one.

        Raises:
            OSError
        """
        for name in LATENCIES:
            for old in self._folder.glob(f"*-{name}.hgrm"):
                old.unlink()
        for file, text in self._histograms.items():
            (self._folder / file).write_bytes(text)
        (self._folder / "report.json").write_text(json.dumps(self._document, indent=1) + "\n", encoding="utf-8")
        self.page.write_text(render(self._document), encoding="utf-8")

    def server_line(self) -> str:
        """What was measured."""
        return server_line(self._document["server"], self._document["settings"])

    def verdict_line(self) -> str:
        """What a sweep has found; empty for a single run."""
        found = self._document["sweep"]
        if not found:
            return ""
        knee, goodput = (_until(found[key], found["highest_rate"]) for key in ("knee", "goodput"))
        return f"keeps up until {knee}; {found['attainment']:.0%} of requests keep every limit until {goodput}"


def _until(rate: float | None, highest_rate: float) -> str:
    if rate is None:
        return "below the lowest rate"
    return f"{rate:g} requests/s" + (" or more, the highest rate tried" if rate == highest_rate else "")

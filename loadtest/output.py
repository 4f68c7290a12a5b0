"""What a load test leaves in a folder: JSON, a page and HDR histograms."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from loadtest.console import server_line
from loadtest.environment import client_environment
from loadtest.histogram import percentile_distribution
from loadtest.measurement import Measurement
from loadtest.page import render
from loadtest.report import histograms, summarize
from loadtest.run import Target
from loadtest.sweep import verdict
from loadtest.workload import Workload


class Report:
    """Owns the folder of a report. Written anew after every run, so that an early end keeps what there is."""

    def __init__(self, folder: Path, name: str, workload: Workload, target: Target, attainment: float | None) -> None:
        """Makes the folder.

        Args:
            attainment: of a sweep, the share of requests that must keep every limit.

        Raises:
            OSError: the folder cannot be made.
        """
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        self.page = folder / "report.html"
        self.attainment = attainment
        self._rates: list[float] = []
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
    def interrupted(self) -> bool:
        return any(run["interrupted"] for run in self._document["runs"])

    @property
    def fault(self) -> str:
        """What was wrong, in one line; empty: nothing."""
        for run in self._document["runs"]:
            if run["server_lost"]:
                return str(run["server_lost"])
            if run["processes_lost"]:
                return str(run["processes_lost"])
            if run["churn"] and run["churn"]["faults"]:
                faults = run["churn"]["faults"]
                return f"{len(faults)} faults under churn, the first: {faults[0]}"
            if run["failed"] and self.attainment is None:  # a sweep goes to where requests fail
                return f"{run['failed']} requests failed, the first with {run['first_error']}"
        return ""

    def add(self, run: Measurement) -> dict[str, Any]:
        """Books a run and writes the report; gives the run's numbers."""
        summary = summarize(run)
        kept = histograms(run.results)
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
            (self._folder / f"{run.label}-{name}.hgrm").write_bytes(percentile_distribution(histogram))
        (self._folder / "report.json").write_text(json.dumps(self._document, indent=1) + "\n", encoding="utf-8")
        self.page.write_text(render(self._document), encoding="utf-8")
        return summary

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

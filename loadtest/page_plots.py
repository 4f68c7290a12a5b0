"""The sections of a report's page that have plots."""

from collections.abc import Sequence
from html import escape
from typing import Any

from loadtest.chart import Axis, Series, chart, format_seconds
from loadtest.histogram import PERCENTILES
from loadtest.markup import TITLES, index, seconds, section, table
from loadtest.report import LATENCIES, METRICS

MOST_ROWS = 20  # of a list
_TIERS = {
    "cold": "cold: on disk",
    "host": "host: in memory",
    "hot": "hot: in a slot",
}
_MOST_LINES = 6  # distributions in one chart


def sweep_section(runs: Sequence[dict[str, Any]], sweep: dict[str, Any]) -> str:
    ordered = sorted(zip(sweep["rates"], runs, strict=True), key=lambda pair: pair[0])
    x, marks = _rate_axis(), _rate_marks(sweep)
    charts = [
        chart(
            f"{TITLES[name]} against offered rate",
            x,
            Axis("time, logarithmic", format_seconds, log=True),
            [
                Series(f"p{percent}", [(rate, run["seconds"][name][f"p{percent}"] or 0.0) for rate, run in ordered])
                for percent in PERCENTILES
            ],
            marks,
        )
        for name in METRICS
    ]
    rates = Axis("per second", "{:g}".format, from_zero=True)
    series = [
        Series("completed", [(rate, run["requests_s"]) for rate, run in ordered]),
        Series("within every limit", [(rate, run["goodput_requests_s"]) for rate, run in ordered]),
    ]
    charts.append(chart("Requests completed, and within limits", x, rates, series, marks))
    return section("Against offered rate", f'<div class="charts">{"".join(charts)}</div>')


def distributions_section(runs: Sequence[dict[str, Any]]) -> str:
    step = max(1, -(-len(runs) // _MOST_LINES))
    picked = sorted(runs, key=lambda run: run["offered_requests_s"] or 0.0)[::step]
    share, limits = Axis("share of all", "{:.0%}".format, from_zero=True), runs[0]["slo"]
    charts = "".join(
        chart(
            TITLES[name],
            Axis("time, logarithmic", format_seconds, log=True),
            share,
            [Series(run["label"], run["cumulative"][name], "steps") for run in picked],
            [(limits[name], f"limit {format_seconds(limits[name])}")] if name in limits else [],
        )
        for name in LATENCIES
    )
    return section("Distributions", f'<div class="charts">{charts}</div>')


def adapters_section(run: dict[str, Any]) -> str:
    rows = run["adapters"]
    if len(rows) < 2:
        return ""
    fairness = run["fairness"]
    known = [row for row in rows if row["first_token"]["p50"] is not None]
    dots = Series(
        "adapter",
        [(row["requests"], row["first_token"]["p50"]) for row in known],
        "dots",
        tips=[f"{row['name']}: {row['requests']} requests, p50 {seconds(row['first_token']['p50'])}" for row in known],
    )
    figure = chart(
        "Median first token of every adapter, by its requests",
        Axis("requests of the adapter", "{:,.0f}".format, whole=True),
        Axis("median first token", format_seconds, from_zero=True),
        [dots],
    )
    listed = table(
        ["adapter", "requests", "failed", "tokens", "first token p50", "p99"],
        [
            [
                row["name"],
                str(row["requests"]),
                str(row["failed"]),
                f"{row['tokens']:,}",
                seconds(row["first_token"]["p50"]),
                seconds(row["first_token"]["p99"]),
            ]
            for row in rows[:MOST_ROWS]
        ],
    )
    more = f'<p class="soft">and {len(rows) - MOST_ROWS} more in report.json</p>' if len(rows) > MOST_ROWS else ""
    text = (
        f"Jain's index over {len(rows)} adapters: {index(fairness['first_token'])} of mean first-token times, "
        f"{index(fairness['per_output_token'])} of mean times per output token (1: all alike; an "
        "adapter without a success counts as 0)."
    )
    if worst := fairness["worst"]:
        text += (
            f" The worst 99th percentile of first tokens is {seconds(worst['first_token_p99'])}, of {worst['name']}."
        )
    if fairness["starved"]:
        text += f" {fairness['starved']} of them had no success at all."
    return section(
        "Fairness between adapters",
        f'<p>{escape(text)}</p><div class="two"><div>{figure}</div><div>{listed}{more}</div></div>',
    )


def tiers_section(run: dict[str, Any]) -> str:
    found = {tier: spread for tier, spread in run["tiers"].items() if spread["count"]}
    if not found:
        return ""
    figure = chart(
        "Time to first token by where the adapter was",
        Axis("time, logarithmic", format_seconds, log=True),
        Axis("share of all", "{:.0%}".format, from_zero=True),
        [Series(_TIERS[tier], spread["cumulative"], "steps") for tier, spread in found.items()],
    )
    total = sum(spread["count"] for spread in found.values())
    rows = [
        [
            _TIERS[tier],
            f"{spread['count']:,}",
            f"{spread['count'] / total:.1%}",
            *[seconds(spread[key]) for key in ("p50", "p99", "max")],
        ]
        for tier, spread in run["tiers"].items()
    ]
    listed = table(["the adapter was", "requests", "share", "first token p50", "p99", "max"], rows)
    text = (
        "As the server says of every request: cold adapters had to be read from disk, those on the host had to be "
        "written to a device slot, hot ones sat in a slot. Times hold the wait for room and for other requests."
    )
    return section(
        "First token by where the adapter was",
        f'<p>{escape(text)}</p><div class="two"><div>{figure}</div><div>{listed}</div></div>',
    )


def codes_section(runs: Sequence[dict[str, Any]], sweep: dict[str, Any] | None, shown: dict[str, Any]) -> str:
    """Status codes as a table; where requests failed, when they did, and at which rates."""
    codes = sorted({code for run in runs for code in run["codes"]}, key=lambda code: (code != "OK", code))
    rows = [[run["label"], *[f"{run['codes'].get(code, 0):,}" for code in codes]] for run in runs]
    figures = [
        chart(
            "Failed requests so far, by status code",
            Axis("seconds into the run", "{:g}".format),
            Axis("requests", "{:,.0f}".format, from_zero=True, whole=True),
            [
                Series(code, [(0.0, 0), *points, (shown["wall_s"], points[-1][1])], "steps")
                for code, points in shown["failures"].items()
            ],
        )
    ]
    if sweep:
        ordered = sorted(zip(sweep["rates"], runs, strict=True), key=lambda pair: pair[0])
        figures.append(
            chart(
                "Failed requests by status code, against offered rate",
                _rate_axis(),
                Axis("share of requests", "{:.0%}".format, from_zero=True),
                [
                    Series(code, [(rate, run["codes"].get(code, 0) / max(1, run["requests"])) for rate, run in ordered])
                    for code in codes
                    if code != "OK"
                ],
                _rate_marks(sweep),
            )
        )
    plots = f'<div class="charts">{"".join(figures)}</div>' if any(figures) else ""
    return section("Status codes", table(["run", *codes], rows) + plots)


def memory_section(runs: Sequence[dict[str, Any]], metrics_url: str) -> str:
    figure = chart(
        "Resident memory of the server",
        Axis("seconds into the run", "{:g}".format),
        Axis("MiB", "{:,.0f}".format),
        [Series(run["label"], [(at, size / 2**20) for at, size in run["memory"]]) for run in runs[-_MOST_LINES:]],
    )
    notes = [run["metrics_missed"] for run in runs if run["metrics_missed"]]
    if not metrics_url:
        notes.append("The server's memory and queue were not watched: give its Prometheus endpoint with --metrics-url.")
    elif not figure:
        notes.append(f"{metrics_url} does not tell the memory of its process.")
    told = "".join(f'<p class="note">{escape(note)}</p>' for note in notes)
    return section("Memory", told + (f'<div class="two">{figure}</div>' if figure else ""))


def _rate_axis() -> Axis:
    return Axis("offered requests per second", "{:g}".format, log=True)


def _rate_marks(sweep: dict[str, Any]) -> list[tuple[float, str]]:
    """What a sweep has found, where it has."""
    marks: dict[float, list[str]] = {}
    for name in ("knee", "goodput"):
        if sweep[name] is not None:
            marks.setdefault(sweep[name], []).append(name)
    return [(rate, " and ".join(names)) for rate, names in sorted(marks.items())]

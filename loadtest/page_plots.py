"""The sections of a report's page that have plots."""

from collections.abc import Sequence
from html import escape
from typing import Any

from loadtest.chart import Axis, Series, chart, format_seconds
from loadtest.histogram import PERCENTILES
from loadtest.markup import TITLES, index, offered, seconds, section, table
from loadtest.report import METRICS

MOST_ROWS = 20  # of a list
_TIERS = {
    "disk": "adapters on disk (cold)",
    "host": "adapters in host memory",
    "device": "adapters on the device (hot)",
    "later": "their later requests",
}
_MOST_LINES = 6  # distributions in one chart


def sweep_section(runs: Sequence[dict[str, Any]], sweep: dict[str, Any]) -> str:
    ordered = sorted(zip(sweep["rates"], runs, strict=True), key=lambda pair: pair[0])
    x = Axis("offered requests per second", "{:g}".format, log=True)
    marks = [(sweep["goodput"], "goodput")] if sweep["goodput"] else []
    charts = [
        chart(
            f"{TITLES[name]} against offered rate",
            x,
            Axis("", format_seconds, log=True),
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
    share = Axis("share of all", "{:.0%}".format, from_zero=True)
    charts = "".join(
        chart(
            TITLES[name],
            Axis("seconds, logarithmic", format_seconds, log=True),
            share,
            [Series(offered(run), run["cumulative"][name]) for run in picked],
            [(runs[0]["slo"][name], f"limit {format_seconds(runs[0]['slo'][name])}")],
        )
        for name in METRICS
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
        dots=True,
        tips=[f"{row['name']}: {row['requests']} requests, p50 {seconds(row['first_token']['p50'])}" for row in known],
    )
    figure = chart(
        "Median first token of every adapter, by its requests",
        Axis("requests of the adapter", "{:g}".format),
        Axis("", format_seconds, from_zero=True),
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
    return section(
        "Fairness between adapters",
        f'<p>{escape(text)}</p><div class="two"><div>{figure}</div><div>{listed}{more}</div></div>',
    )


def tiers_section(run: dict[str, Any]) -> str:
    if set(run["tiers"]) <= {"later"}:
        return ""
    figure = chart(
        "Time to first token by tier",
        Axis("seconds, logarithmic", format_seconds, log=True),
        Axis("share of all", "{:.0%}".format, from_zero=True),
        [Series(_TIERS[tier], spread["cumulative"]) for tier, spread in run["tiers"].items()],
    )
    rows = [
        [_TIERS[tier], str(spread["count"]), *[seconds(spread[key]) for key in ("p50", "p99", "max")]]
        for tier, spread in run["tiers"].items()
    ]
    listed = table(["first token of", "requests", "p50", "p99", "max"], rows)
    text = "The first request of every adapter is counted where its weights were before the run, all others as later."
    return section(
        "First token by where the adapter was", f'<p>{text}</p><div class="two"><div>{figure}</div>{listed}</div>'
    )


def memory_section(runs: Sequence[dict[str, Any]]) -> str:
    figure = chart(
        "Resident memory of the server",
        Axis("seconds into the run", "{:g}".format),
        Axis("MiB", "{:,.0f}".format),
        [Series(run["label"], [(at, size / 2**20) for at, size in run["memory"]]) for run in runs[-_MOST_LINES:]],
    )
    return section("Memory", f'<div class="two">{figure}</div>') if figure else ""

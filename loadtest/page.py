"""The report as one self-contained HTML page: it opens from a disk, without a network, in light and dark."""

from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

from loadtest.histogram import PERCENTILES
from loadtest.markup import TITLES, facts, offered, per_second, percent, seconds, section, table
from loadtest.page_plots import (
    MOST_ROWS,
    adapters_section,
    codes_section,
    distributions_section,
    memory_section,
    sweep_section,
    tiers_section,
)
from loadtest.report import METRICS, NORMALIZED

_STYLE = (Path(__file__).parent / "page.css").read_text(encoding="utf-8")


def render(document: dict[str, Any]) -> str:
    """The page of a report's document; every number on it is in the document."""
    runs, sweep = document["runs"], document["sweep"]
    shown = _run_to_show(document)
    title = f"Load test: {document['name']}"
    sections = [
        _notes(runs),
        _tiles(shown, sweep),
        sweep_section(runs, sweep) if sweep else "",
        distributions_section(runs),
        section("Percentiles", _percentiles(shown)),
        section("Runs", _runs_table(runs)) if len(runs) > 1 else "",
        codes_section(runs, sweep, shown),
        adapters_section(shown),
        tiers_section(shown),
        memory_section(runs, document["target"]["metrics_url"]),
        _churn(shown),
        section("The load test's own punctuality", _client(runs)),
        section("Settings", _settings(document)),
    ]
    server = document["server"]
    where = " on ".join(filter(None, (server.get("model"), server.get("device"))))
    subtitle = " · ".join(filter(None, (where, document["client"]["date"])))
    if len(runs) > 1:
        subtitle += f" · details below are of {shown['label']}"
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"/>'
        '<meta name="viewport" content="width=device-width, initial-scale=1"/>'
        f"<title>{escape(title)}</title><style>{_STYLE}</style></head><body>"
        f'<h1>{escape(title)}</h1><p class="soft">{escape(subtitle)}</p>{"".join(sections)}</body></html>\n'
    )


def _run_to_show(document: dict[str, Any]) -> dict[str, Any]:
    """The run whose details are shown: the only one, or that of the goodput, or the last."""
    runs, sweep = document["runs"], document["sweep"]
    if sweep and sweep["goodput"] is not None:
        chosen: dict[str, Any] = runs[sweep["rates"].index(sweep["goodput"])]
        return chosen
    last: dict[str, Any] = runs[-1]
    return last


def _notes(runs: Sequence[dict[str, Any]]) -> str:
    notes = []
    for run in runs:
        where = f"{run['label']}: " if len(runs) > 1 else ""
        if run["server_lost"]:
            notes.append(("bad", f"{where}{run['server_lost']}. Measured until then: {run['requests']} requests."))
        if run["processes_lost"]:
            notes.append(("bad", f"{where}{run['processes_lost']}."))
        if run["interrupted"]:
            notes.append(
                ("", f"{where}interrupted; {run['unsent']} requests were not sent, {run['cut']} were cut off.")
            )
        if run["failed"] and not run["server_lost"]:
            notes.append(("bad", f"{where}{run['failed']} requests failed, the first with {run['first_error']}"))
        if run["left_out"]:
            notes.append(("", f"{where}{run['left_out']}."))
        if run["client"]["bottleneck"]:
            notes.append(("", f"{where}{run['client']['bottleneck']}. The latencies below include it."))
    return "".join(f'<p class="note {kind}">{escape(text)}</p>' for kind, text in notes)


def _tiles(run: dict[str, Any], sweep: dict[str, Any] | None) -> str:
    spreads = run["seconds"]
    tiles = [
        (offered(run), "offered" if run["offered_requests_s"] else "closed loop"),
        (f"{per_second(run['requests_s'])} /s", "requests completed"),
        (_strip(run), "strip throughput (S-LoRA)"),
        (f"{per_second(run['output_tokens_s'])} /s", "output tokens"),
        (_both(spreads["first_token"]), "first token, p50 / p99"),
        (_both(spreads["inter_token"]), "inter-token, p50 / p99"),
        (_both(spreads["end_to_end"]), "end to end, p50 / p99"),
        (percent(run["attainment"]["first_token"]), f"first token in {seconds(run['slo']['first_token'])}"),
        (percent(run["attainment"]["all"]), "kept every limit"),
        (percent(run["satisfaction"]), "satisfaction (S-LoRA)"),
    ]
    if sweep:
        found = [("knee", "knee: keeps up until"), ("goodput", f"goodput ({sweep['attainment']:.0%} in limits)")]
        tiles = [(_until(sweep[key], sweep["highest_rate"]), text) for key, text in found] + tiles
    cells = "".join(
        f'<div><b>{escape(value)}</b><span class="soft">{escape(text)}</span></div>' for value, text in tiles
    )
    return f'<div class="tiles">{cells}</div>'


def _until(rate: float | None, highest_rate: float) -> str:
    if rate is None:
        return "none"
    return f"{'≥ ' if rate == highest_rate else ''}{rate:g} /s"


def _strip(run: dict[str, Any]) -> str:
    rate = run["strip_requests_s"]
    return "–" if rate is None else f"{per_second(rate)} /s"


def _percentiles(run: dict[str, Any]) -> str:
    keys = ["mean", *(f"p{percent}" for percent in PERCENTILES), "max"]
    rows = [
        [
            TITLES[name],
            *[seconds(run["seconds"][name][key]) for key in keys],
            f"{percent(run['attainment'][name])} < {seconds(run['slo'][name])}",
        ]
        for name in METRICS
    ]
    rows += [[TITLES[name], *[seconds(run["seconds"][name][key]) for key in keys], ""] for name in NORMALIZED]
    if run["mean_queue_s"] is not None:
        rows.append(["In the server's queue", seconds(run["mean_queue_s"]), *[""] * len(keys)])
    return table(["", *keys, "within limit"], rows)


def _runs_table(runs: Sequence[dict[str, Any]]) -> str:
    titles = ["run", "offered /s", "sent", "failed", "done /s", "tokens /s", "goodput /s",
              "first token p50", "p99", "inter-token p50", "p99", "in limits", "done / due"]  # fmt: skip
    rows = [
        [
            run["label"],
            per_second(run["offered_requests_s"] or 0.0),
            str(run["requests"]),
            str(run["failed"]),
            *[per_second(run[key]) for key in ("requests_s", "output_tokens_s", "goodput_requests_s")],
            *[seconds(run["seconds"][name][key]) for name in METRICS[:2] for key in ("p50", "p99")],
            percent(run["attainment"]["all"]),
            _balance(run),
        ]
        for run in runs
    ]
    note = "done / due: completed and due between a lead-in and the last arrival; the knee is told by them."
    return f'{table(titles, rows)}<p class="soft">{note}</p>'


def _churn(run: dict[str, Any]) -> str:
    churn = run["churn"]
    if not churn:
        return ""
    kind = "bad" if churn["faults"] else "good"
    text = (
        f"{churn['checked']} requests to adapters that came and went: {len(churn['faults'])} faults, "
        f"{churn['refused_while_unloaded']} rightly refused while their adapter was unloaded. "
        f"{churn['bystanders_checked']} answers of other adapters were checked too."
    )
    faults = "".join(f"<li>{escape(fault)}</li>" for fault in churn["faults"][:MOST_ROWS])
    listed = table(
        ["operation", "count", "p50", "max"],
        [
            [operation, str(times["count"]), seconds(times["p50"]), seconds(times["max"])]
            for operation, times in churn["operations"].items()
        ],
    )
    shown = f"<ul>{faults}</ul>" if faults else ""
    warning = f'<p class="note">{escape(churn["warning"])}</p>' if churn["warning"] else ""
    return section("Churn", f'<p class="note {kind}">{escape(text)}</p>{warning}{shown}{listed}')


def _client(runs: Sequence[dict[str, Any]]) -> str:
    rows = [
        [
            run["label"],
            str(run["client"]["processes"]),
            *[seconds(run["client"]["lateness_s"][key]) for key in ("p50", "p99", "max")],
            *[seconds(run["client"]["event_loop_lag_s"][key]) for key in ("p99", "max")],
            f"{run['client']['cpu_share']:.0%}",
        ]
        for run in runs
    ]
    titles = ["run", "processes", "sent late p50", "p99", "max", "event loop late p99", "max", "CPU of a core"]
    return table(titles, rows)


def _settings(document: dict[str, Any]) -> str:
    parts = [
        facts("Server", document["server"]),
        facts("Server's settings", {name: _grouped(value) for name, value in document["settings"].items()}),
        facts("Load test", document["client"]),
        facts("Workload", document["workload"]),
        facts("Target", document["target"]),
    ]
    return f'<div class="columns">{"".join(parts)}</div>'


def _grouped(value: str) -> str:
    """A number with commas, any other text as it is."""
    return f"{int(value):,}" if value.isdecimal() else value


def _balance(run: dict[str, Any]) -> str:
    counts = run["balance"]
    return f"{counts['completed']} / {counts['arrived']}" if counts else "–"


def _both(spread: dict[str, Any]) -> str:
    return f"{seconds(spread['p50'])} / {seconds(spread['p99'])}"

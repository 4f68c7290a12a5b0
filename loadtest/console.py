"""What a terminal shows of a finished run."""

from typing import Any

from rich import box
from rich.table import Table

from loadtest.histogram import PERCENTILES
from loadtest.report import METRICS, NORMALIZED

_COLUMNS = ("mean", *(f"p{percent}" for percent in PERCENTILES), "max")


def table(summary: dict[str, Any]) -> Table:
    """One run."""
    offered = summary["offered_requests_s"]
    made = Table(
        title=f"{summary['label']}: {summary['requests']} requests in {summary['wall_s']:.1f} s"
        + (f", offered {offered:.2f}/s" if offered else "")
        + f", completed {summary['requests_s']:.2f}/s, {summary['output_tokens_s']:.1f} tokens/s",
        box=box.SIMPLE,
        padding=(0, 1, 0, 0),
    )
    made.add_column("milliseconds", no_wrap=True)
    for title in (*_COLUMNS, "within limit"):
        made.add_column(title, justify="right", no_wrap=True)
    for name in METRICS:
        kept = summary["attainment"][name]
        within = "–" if kept is None else f"{kept:.1%} < {summary['slo'][name]:g} s"
        made.add_row(name.replace("_", " "), *_cells(summary["seconds"][name]), within)
        if name == "first_token":
            for tier, spread in summary["tiers"].items():
                if spread["count"]:
                    made.add_row(f"  {tier} ({spread['count']:,})", *_cells(spread))
    for name in NORMALIZED:
        made.add_row(name.replace("_", " "), *_cells(summary["seconds"][name]))
    codes = ", ".join(f"{code} {count}" for code, count in summary["codes"].items())
    made.caption = f"status codes: {codes or 'none'}{_slora(summary)}"
    return made


def _slora(summary: dict[str, Any]) -> str:
    """S-LoRA's measures, but for its attainment, which is the share of first tokens within their limit."""
    satisfaction, strip = summary["satisfaction"], summary["strip_requests_s"]
    told = [] if satisfaction is None else [f"satisfaction {satisfaction:.3f}"]
    told += [] if strip is None else [f"strip throughput {strip:.2f}/s"]
    return f"\nS-LoRA: {', '.join(told)}" if told else ""


def server_line(server: dict[str, str], settings: dict[str, str]) -> str:
    """What was measured: the server and the settings that shape its speed."""
    named = [f"{name} {server[name]}" for name in ("version", "commit") if server.get(name)]
    told = [server.get("model", ""), server.get("device", ""), *named]
    return "server: " + ", ".join([*filter(None, told), *(f"{name} {value}" for name, value in settings.items())])


def fairness_line(summary: dict[str, Any]) -> str:
    """How evenly adapters were served; empty: there are no two of them, or nothing was served."""
    fairness = summary["fairness"]
    if len(summary["adapters"]) < 2 or not fairness["worst"]:
        return ""
    worst = fairness["worst"]
    return (
        f"first token of {len(summary['adapters'])} adapters: Jain's index {fairness['first_token']:.3f}, "
        f"worst p99 {_milliseconds(worst['first_token_p99'])} ms ({worst['name']})"
    )


def _cells(spread: dict[str, Any]) -> list[str]:
    return ["–" if spread[key] is None else _milliseconds(spread[key]) for key in _COLUMNS]


def _milliseconds(seconds: float) -> str:
    return f"{seconds * 1000:,.0f}" if seconds >= 0.1 else f"{seconds * 1000:.1f}"

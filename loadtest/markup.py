"""Tables and numbers as HTML text."""

from collections.abc import Sequence
from html import escape
from typing import Any

from loadtest.chart import format_seconds

TITLES = {
    "first_token": "Time to first token",
    "inter_token": "Inter-token latency",
    "end_to_end": "End to end",
    "per_output_token": "End to end per output token",
    "per_token": "End to end per token, the prompt's too",
}


def section(title: str, content: str) -> str:
    return f"<h2>{escape(title)}</h2>{content}" if content else ""


def facts(title: str, values: dict[str, Any]) -> str:
    rows = "".join(
        f"<tr><td>{escape(key.replace('_', ' '))}</td><td>{escape(_plain(value))}</td></tr>"
        for key, value in values.items()
        if value not in ("", None, (), [])
    )
    return f'<div><p><b>{escape(title)}</b></p><table class="facts"><tbody>{rows}</tbody></table></div>'


def table(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    head = "".join(f"<th>{escape(title)}</th>" for title in titles)
    body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _plain(value: Any) -> str:
    return ", ".join(str(part) for part in value) if isinstance(value, (tuple, list)) else str(value)


def seconds(value: float | None) -> str:
    return "–" if value is None else format_seconds(value)


def percent(value: float | None) -> str:
    return "–" if value is None else f"{value:.1%}"


def per_second(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def index(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"


def offered(run: dict[str, Any]) -> str:
    """The rate of a run, or its label where it had none."""
    return f"{per_second(run['offered_requests_s'])} /s" if run["offered_requests_s"] else run["label"]

"""Line and dot charts as SVG text: no script, no font, no network. Colours are CSS variables of the page."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from typing import Literal

Point = tuple[float, float]

WIDTH, HEIGHT = 560, 300
_LEFT, _RIGHT, _TOP, _BOTTOM = 66, 18, 20, 46
_ROW = 17  # height of a line of text
_SHADES = 6  # CSS variables --shade-0 … of the page, from faint to strong


@dataclass(frozen=True, slots=True)
class Series:
    name: str
    points: Sequence[Point]
    style: Literal["line", "steps", "dots"] = "line"  # steps: a value holds until the next point, and is 0 before
    tips: Sequence[str] = ()  # shown when a dot is pointed at


@dataclass(frozen=True, slots=True)
class Axis:
    label: str
    format: Callable[[float], str]
    log: bool = False
    from_zero: bool = False
    whole: bool = False  # of counts: no ticks between them


def chart(title: str, x: Axis, y: Axis, series: Sequence[Series], marks: Sequence[tuple[float, str]] = ()) -> str:
    """A figure with a title, a legend where there is more than one series, and vertical marks; empty without points."""
    drawn = [one for one in (_drawable(one, x, y) for one in series) if one.points]
    if not drawn:
        return ""
    across = _Scale(x, [point[0] for one in drawn for point in one.points], _LEFT, WIDTH - _RIGHT)
    up = _Scale(y, [point[1] for one in drawn for point in one.points], HEIGHT - _BOTTOM, _TOP)
    shown = sorted((value, text) for value, text in marks if across.low <= value <= across.high)
    top = -_ROW * len(shown)  # the texts of marks lie above the plot, each in a row of its own
    parts = [_grid(across, up), f'<text class="label" x="4" y="{_TOP - 8 + top}">{escape(y.label)}</text>']
    parts += [_mark(across.place(value), text, _TOP - 8 - _ROW * row) for row, (value, text) in enumerate(shown)]
    parts += [_plot(one, across, up, _color(index, len(drawn))) for index, one in enumerate(drawn)]
    legend = "".join(
        f'<li><i style="background:{_color(index, len(drawn))}"></i>{escape(one.name)}</li>'
        for index, one in enumerate(drawn)
    )
    return (
        f"<figure><figcaption>{escape(title)}</figcaption>"
        + (f"<ul>{legend}</ul>" if len(drawn) > 1 else "")
        + f'<svg viewBox="0 {top} {WIDTH} {HEIGHT - top}" role="img" aria-label="{escape(title)}">'
        + f"{''.join(parts)}</svg></figure>"
    )


def format_seconds(value: float) -> str:
    """With the unit that keeps it short."""
    if value == 0:
        return "0"
    if value < 0.001:
        return f"{value * 1e6:.3g} µs"
    return f"{value * 1000:.3g} ms" if value < 1 else f"{value:.3g} s"


def ticks(low: float, high: float, *, log: bool, about: int = 5) -> list[float]:
    """Round values within [low, high]: 1, 2, 5 times a power of ten, or their multiples where a logarithm has few."""
    if log:
        decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        factors = (1, 2, 5) if high < 1000 * low else (1,)
        values = [factor * 10.0**decade for decade in decades for factor in factors]
        within = [value for value in values if low <= value * (1 + 1e-9) and value <= high * (1 + 1e-9)]
        if len(within) >= 3:
            return within
    rough = (high - low) / about
    base = 10.0 ** math.floor(math.log10(rough))
    step = next(base * factor for factor in (1, 2, 5, 10) if base * factor >= rough * 0.999)
    return [step * count for count in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


class _Scale:
    """Values of an axis to places on the paper."""

    def __init__(self, axis: Axis, values: Sequence[float], start: float, end: float) -> None:
        self.axis, self._start, self._end = axis, start, end
        low, high = min(values), max(values)
        if axis.log:
            self.low, self.high = low / 1.05, high * 1.05
        else:
            low = 0.0 if axis.from_zero else low
            margin = 0.04 * (high - low) or 0.5 * abs(high) or 1.0
            self.low, self.high = (low if axis.from_zero else low - margin), high + margin

    def place(self, value: float) -> float:
        if self.axis.log:
            share = math.log(value / self.low) / math.log(self.high / self.low)
        else:
            share = (value - self.low) / (self.high - self.low)
        return round(self._start + share * (self._end - self._start), 1)

    def ticks(self) -> list[float]:
        places = ticks(self.low, self.high, log=self.axis.log)
        return [place for place in places if not self.axis.whole or place == round(place)]


def _drawable(series: Series, x: Axis, y: Axis) -> Series:
    """Without what a logarithm cannot show."""
    kept = [
        index for index, (across, up) in enumerate(series.points) if (across > 0 or not x.log) and (up > 0 or not y.log)
    ]
    tips = [series.tips[index] for index in kept] if series.tips else ()
    return Series(series.name, [series.points[index] for index in kept], series.style, tips)


def _grid(across: _Scale, up: _Scale) -> str:
    left, right, bottom = _LEFT, WIDTH - _RIGHT, HEIGHT - _BOTTOM
    parts = []
    for value in up.ticks():
        place = up.place(value)
        parts.append(f'<line class="grid" x1="{left}" x2="{right}" y1="{place}" y2="{place}"/>')
        parts.append(f'<text x="{left - 8}" y="{place + 4}" text-anchor="end">{escape(up.axis.format(value))}</text>')
    for value in across.ticks():
        place = across.place(value)
        parts.append(f'<line class="tick" x1="{place}" x2="{place}" y1="{bottom}" y2="{bottom + 4}"/>')
        parts.append(
            f'<text x="{place}" y="{bottom + 18}" text-anchor="middle">{escape(across.axis.format(value))}</text>'
        )
    parts.append(f'<line class="axis" x1="{left}" x2="{right}" y1="{bottom}" y2="{bottom}"/>')
    middle = (left + right) / 2
    parts.append(
        f'<text class="label" x="{middle}" y="{HEIGHT - 8}" text-anchor="middle">{escape(across.axis.label)}</text>'
    )
    return "".join(parts)


def _mark(place: float, text: str, baseline: float) -> str:
    anchor, shift = ("end", -5) if place > WIDTH * 0.7 else ("start", 5)
    return (
        f'<line class="mark" x1="{place}" x2="{place}" y1="{baseline - 10}" y2="{HEIGHT - _BOTTOM}"/>'
        f'<text class="mark" x="{place + shift}" y="{baseline}" text-anchor="{anchor}">{escape(text)}</text>'
    )


def _plot(series: Series, across: _Scale, up: _Scale, color: str) -> str:
    places = [(across.place(x), up.place(y)) for x, y in series.points]
    if series.style == "dots":
        tips = series.tips or [""] * len(places)
        return "".join(
            f'<circle cx="{x}" cy="{y}" r="3.5" fill="{color}"><title>{escape(tip)}</title></circle>'
            for (x, y), tip in zip(places, tips, strict=True)
        )
    if series.style == "steps":
        levels = [up.place(up.low), *(y for _, y in places)]
        places = [corner for (x, y), before in zip(places, levels, strict=False) for corner in ((x, before), (x, y))]
    line = " ".join(f"{x},{y}" for x, y in places)
    shown = f'<polyline points="{line}" stroke="{color}"/>'
    if series.style == "line" and len(places) <= 20:  # few enough to be seen as the measurements that they are
        shown += "".join(f'<circle cx="{x}" cy="{y}" r="3" fill="{color}"/>' for x, y in places)
    return shown


def _color(index: int, count: int) -> str:
    shade = _SHADES - 1 if count == 1 else round(index * (_SHADES - 1) / (count - 1))
    return f"var(--shade-{shade})"

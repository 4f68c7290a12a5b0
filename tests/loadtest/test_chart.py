"""Charts as text: ticks, marks, and lines of the three styles."""

import re

import pytest

from loadtest.chart import Axis, Series, chart, ticks

X, Y = Axis("x", "{:g}".format), Axis("y", "{:g}".format, from_zero=True)


@pytest.mark.parametrize(
    ("low", "high", "log", "expected"),
    [
        (0, 10, False, [0, 2, 4, 6, 8, 10]),
        (0.3, 1, False, [0.4, 0.6, 0.8, 1]),
        (0.9, 25, True, [1, 2, 5, 10, 20]),
        (1.9, 4.2, True, [2, 2.5, 3, 3.5, 4]),
        (0.23, 37, True, [0.5, 1, 2, 5, 10, 20]),
    ],
)
def test_ticks_are_round(low: float, high: float, log: bool, expected: list[float]) -> None:
    assert ticks(low, high, log=log) == pytest.approx(expected)


def test_counts_have_no_ticks_between_them() -> None:
    counts = Axis("requests", "{:g}".format, whole=True)
    figure = chart("few", counts, Y, [Series("a", [(1, 1.0), (3, 2.0)], "dots")])
    assert re.findall(r'text-anchor="middle">(.*?)<', figure) == ["1", "2", "3", "requests"]


def test_steps_hold_a_value_until_the_next_point_and_begin_at_the_bottom() -> None:
    figure = chart("steps", X, Y, [Series("a", [(0, 1.0), (1, 2.0)], "steps")])
    found = re.search(r'polyline points="(.*?)"', figure)
    assert found
    corners = [tuple(map(float, pair.split(","))) for pair in found.group(1).split()]
    (x0, bottom), (x1, low), (x2, same), (x3, high) = corners
    assert (x0, x2, same) == (x1, x3, low)
    assert x0 < x2
    assert bottom > low > high, "the paper's y grows downwards"


def test_marks_have_rows_of_their_own_above_the_plot() -> None:
    figure = chart("m", X, Y, [Series("a", [(0, 1), (10, 2)])], [(5, "knee"), (4, "goodput"), (11, "outside")])
    rows = {text: float(y) for y, text in re.findall(r'<text class="mark" x="[\d.]+" y="(.*?)".*?>(\w+)<', figure)}
    assert rows.keys() == {"knee", "goodput"}
    assert rows["knee"] < rows["goodput"] - 12, "lines of text"
    top = float(re.findall(r'viewBox="0 (\S+) ', figure)[0])
    plain = chart("m", X, Y, [Series("a", [(0, 1), (10, 2)])])
    assert float(re.findall(r'viewBox="0 (\S+) ', plain)[0]) == 0 > top


def test_a_chart_without_points_is_empty() -> None:
    assert chart("none", X, Y, [Series("a", [])]) == ""

"""What workloads are called, and what they are measured by."""

import pytest

from benchmarks.agreement import Agreement, agreement
from benchmarks.workload import Workload, parse_workload


@pytest.mark.parametrize("spec", ["32x8", "1x1", "32x0", "32x32:ranks", "32x32:skewed", "32x32:unused"])
def test_a_workload_is_called_as_it_is_asked_for(spec: str) -> None:
    assert str(parse_workload(spec)) == spec


@pytest.mark.parametrize("spec", ["", "32", "0x0", "32x0:ranks", "32x0:skewed", "8x9", "32x8:other", "32x8:", "-1x0"])
def test_what_is_no_workload(spec: str) -> None:
    with pytest.raises(ValueError, match=r"REQUESTSxADAPTERS|variant|more adapters"):
        parse_workload(spec)


def test_ranks_and_yardsticks() -> None:
    assert parse_workload("8x4").ranks == (8,)
    assert parse_workload("8x4:ranks").ranks == (8, 16, 32, 64)
    assert parse_workload("8x4:ranks").yardstick == Workload(8, 4)
    assert parse_workload("8x4:skewed").yardstick == Workload(8, 4)
    assert parse_workload("8x4:unused").yardstick == parse_workload("8x4").yardstick == Workload(8, 0)
    assert parse_workload("8x0").yardstick is None


def test_adapters_in_turn() -> None:
    assert parse_workload("5x2").choices == parse_workload("5x2:ranks").choices == [0, 1, 0, 1, 0]
    assert parse_workload("5x0").choices == []


def test_skew_follows_the_power_law() -> None:
    choices = Workload(20_000, 100, "skewed").choices
    assert choices == Workload(20_000, 100, "skewed").choices, "the same requests in every run"
    assert len(choices) == 20_000
    for below in (1, 10, 50, 100):
        share = sum(choice < below for choice in choices) / len(choices)
        assert share == pytest.approx((below / 100) ** 0.3, abs=0.02)


def test_agreement() -> None:
    reference = [[1, 2, 3, 4], [5, 6, 7, 8]]
    assert agreement(reference, reference) == Agreement(2, 2, 1.0, 1.0)
    assert agreement([[1, 2, 3, 4], [5, 0, 7, 8]], reference) == Agreement(2, 1, 5 / 8, 7 / 8)

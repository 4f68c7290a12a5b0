"""What a terminal shows."""

from dataclasses import replace
from io import StringIO

from rich.console import Console

from loadtest.console import fairness_line, server_line, table
from loadtest.report import summarize
from tests.loadtest.conftest import BAD, GOOD, make_measurement


def printed(*results: object, width: int = 120) -> str:
    text = StringIO()
    Console(width=width, file=text).print(table(summarize(make_measurement(list(results)))))  # type: ignore[arg-type]
    return text.getvalue()


def test_the_table_of_a_run() -> None:
    text = printed(GOOD, BAD)
    for shown in (
        "NOT_FOUND 1",
        "first token",
        "50.0% < 6 s",
        "per output token",
        "S-LoRA: satisfaction 0.500",
        "tokens/s",
    ):
        assert shown in text
    assert "cold" not in text


def test_first_tokens_by_tier_are_rows_of_their_own() -> None:
    lines = printed(replace(GOOD, tier="disk", first_token=0.9), replace(GOOD, tier="device")).splitlines()
    [cold], [hot] = ([line for line in lines if name in line] for name in ("cold (1)", "hot (1)"))
    assert "900" in cold
    assert "100" in hot
    assert not any("host" in line for line in lines)


def test_strip_throughput_of_a_run_that_is_long_enough() -> None:
    text = StringIO()
    arrivals = [replace(GOOD, due=100.0 + index) for index in range(1, 31)]
    Console(width=120, file=text).print(table(summarize(make_measurement(arrivals, wall=30.0))))
    assert "S-LoRA: satisfaction 1.000, strip throughput 1.00/s" in text.getvalue()


def test_fairness_where_there_are_several_adapters() -> None:
    line = fairness_line(summarize(make_measurement([GOOD, replace(GOOD, adapter="b", first_token=0.2)])))
    assert line == "first token of 2 adapters: Jain's index 0.900, worst p99 200 ms (b)"
    assert fairness_line(summarize(make_measurement([GOOD]))) == ""


def test_the_server_with_its_commit_and_settings() -> None:
    server = {"model": "tiny", "device": "cpu, float32", "version": "0.1.0", "commit": "0123abcd+"}
    assert server_line(server, {"max-num-seqs": "64", "prefix-cache": "on"}) == (
        "server: tiny, cpu, float32, version 0.1.0, commit 0123abcd+, max-num-seqs 64, prefix-cache on"
    )
    assert server_line({"model": "null", "device": "", "version": ""}, {}) == "server: null"

"""The command from its flags to its files and exit codes, against servers that are well, gone, or dying."""

import json
import os
import signal
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from loadtest.cli import loadtest_command
from tests.loadtest.conftest import ScriptedServer

Start = Callable[..., ScriptedServer]


@pytest.fixture
def loadtest(tmp_path: Path) -> Callable[..., Result]:
    def run(command: str, address: str, *arguments: str) -> Result:
        given = [command, "--address", address, "--num-adapters", "4", "--output", str(tmp_path / "report")]
        return CliRunner().invoke(loadtest_command, [*given, *arguments])

    return run


def document(tmp_path: Path) -> Any:
    return json.loads((tmp_path / "report" / "report.json").read_text())


def error_line(result: Result) -> str:
    """The only line of an error."""
    lines = result.stderr.splitlines()
    assert len(lines) == 1, result.stderr
    return lines[0]


def test_a_run(loadtest: Callable[..., Result], scripted: Start, tmp_path: Path) -> None:
    done = loadtest("run", scripted().address, "--rate", "100", "--duration", "0.5", "--cv", "2")
    assert done.exit_code == 0, done.output
    assert "status codes: OK 50" in done.stdout
    written = document(tmp_path)
    assert written["workload"]["cv"] == 2
    assert written["server"]["model"] == "scripted"
    assert {row["name"] for row in written["runs"][0]["adapters"]} == {"a0", "a1", "a2", "a3"}
    assert (tmp_path / "report" / "report.html").exists()


def test_a_sweep_over_given_rates(loadtest: Callable[..., Result], scripted: Start, tmp_path: Path) -> None:
    server = scripted()
    done = loadtest("sweep", server.address, "--rates", "100,200", "--num-requests", "30")
    assert done.exit_code == 0, done.output
    assert [run["label"] for run in document(tmp_path)["runs"]] == ["rate-100", "rate-200"]
    salts = [request.cache_salt for request in server.requests]
    assert len(set(salts[:30])) == len(set(salts[30:])) == 1
    assert salts[0] != salts[30]  # or the second run would find its prompts in the prefix cache
    assert "requests keep every limit until" in done.stdout


@pytest.mark.parametrize(
    ("workload", "requests"),
    [
        ("punica-distinct", {"a0": 3, "a1": 3, "a2": 3, "a3": 3}),
        ("punica-identical", {"a0": 12}),
        ("punica-uniform", {"a0": 3, "a1": 3, "a2": 3, "a3": 3}),
    ],
)
def test_punica_takes_the_adapters_that_the_server_has(
    scripted: Start, tmp_path: Path, workload: str, requests: dict[str, int]
) -> None:
    flags = ["--workload", workload, "--num-requests", "12", "--max-tokens", "64", "--output", str(tmp_path / "report")]
    done = CliRunner().invoke(loadtest_command, ["run", "--address", scripted().address, *flags])
    assert done.exit_code == 0, done.output
    assert {row["name"]: row["requests"] for row in document(tmp_path)["runs"][0]["adapters"]} == requests


def test_what_is_cut_off_a_trace_is_said(loadtest: Callable[..., Result], scripted: Start, tmp_path: Path) -> None:
    trace = tmp_path / "trace.csv"
    rows = [f"2024-05-10 00:00:0{second}.000000,{4000 if second == 1 else 8},8" for second in range(5)]
    trace.write_text("\n".join(["TIMESTAMP,ContextTokens,GeneratedTokens", *rows]))
    flags = ["--workload", "replay", "--trace", str(trace), "--rate", "10", "--duration", "0.25"]
    done = loadtest("run", scripted().address, *flags)
    assert done.exit_code == 0, done.output
    said = "items of the trace were left out: 2 after its cut (duration 0.25), 1 too long for the server"
    assert said in " ".join(done.stdout.split())
    assert said in (tmp_path / "report" / "report.html").read_text()
    assert document(tmp_path)["runs"][0]["requests"] == 2


def test_a_sweep_without_a_rate_to_start_from(loadtest: Callable[..., Result], scripted: Start) -> None:
    failed = loadtest("sweep", scripted().address, "--workload", "replay")
    assert failed.exit_code == 1
    assert error_line(failed).endswith("give --rate or --rates")


def test_named_workloads_are_listed() -> None:
    listed = CliRunner().invoke(loadtest_command, ["workloads"]).stdout
    assert all(name in listed for name in ("slora-short", "punica-skewed", "drift", "burst", "churn", "replay"))


def test_no_server(loadtest: Callable[..., Result], tmp_path: Path) -> None:
    failed = loadtest("run", f"127.0.0.1:{free_port()}")
    assert failed.exit_code == 1
    assert error_line(failed).startswith("Error: no server at 127.0.0.1:")


def test_a_server_that_dies(loadtest: Callable[..., Result], scripted: Start, tmp_path: Path) -> None:
    def die(server: ScriptedServer, requests: int) -> None:
        if requests == 40:
            server.die()

    failed = loadtest("run", scripted(die).address, "--rate", "200")
    assert failed.exit_code == 1
    assert error_line(failed).startswith("Error: the server was lost ")
    assert document(tmp_path)["runs"][0]["codes"]["OK"] >= 30


def test_a_server_that_dies_between_rates(loadtest: Callable[..., Result], scripted: Start, tmp_path: Path) -> None:
    def die(server: ScriptedServer, requests: int) -> None:
        if requests == 30:
            server.die()

    failed = loadtest("sweep", scripted(die).address, "--rates", "100,200", "--num-requests", "30")
    assert failed.exit_code == 1
    assert error_line(failed).startswith("Error: no server at")
    assert document(tmp_path)["runs"][0]["codes"]["OK"] >= 20


def test_an_interrupted_run_keeps_what_it_has(loadtest: Callable[..., Result], scripted: Start, tmp_path: Path) -> None:
    def interrupt(server: ScriptedServer, requests: int) -> None:
        if requests == 20:
            os.kill(os.getpid(), signal.SIGINT)

    failed = loadtest("run", scripted(interrupt).address, "--rate", "100")
    assert failed.exit_code == 130
    assert "interrupted; the report holds what was measured until then" in failed.stdout
    run = document(tmp_path)["runs"][0]
    assert run["interrupted"]
    assert run["completed"] >= 10
    assert run["unsent"] > 100


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--workload", "slow"], "no workload 'slow'"),
        (["--workload", "replay"], "cannot read trace trace.csv"),
        (["--num-adapters", "5"], "num_adapters is 5, and the server has 4: lower --num-adapters"),
        (["--workload", "slora", "--prompt-tokens", "900:2000"], "the server takes 1,024"),
        (["--prompt-tokens", "8"], "'8' is not LOW:HIGH"),
        (["--metrics-url", "http://127.0.0.1:1/metrics"], "--metrics-url http://127.0.0.1:1/metrics: "),
        (["--output", "/dev/null/report"], "Not a directory"),
    ],
)
def test_wrong_settings(loadtest: Callable[..., Result], scripted: Start, arguments: list[str], message: str) -> None:
    failed = loadtest("run", scripted().address, *arguments)
    assert failed.exit_code == 1
    assert message in error_line(failed)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("rate: [", "workload.yaml is not YAML: "),
        ("- rate", "a workload is a mapping of keys to values"),
        ("speed: 3", "workload.yaml: unknown key 'speed'; keys: like, rate, "),
        ("like: best", "workload.yaml: like is 'best'; named workloads: slora, "),
        ("rate: fast", "workload.yaml: rate is 'fast': it takes a number"),
        ("prompt_tokens: [9, 3]", "workload.yaml: prompt_tokens is 9:3: LOW must be at least 1 and less than HIGH"),
        (None, "cannot read workload "),
    ],
)
def test_wrong_workload_files(
    loadtest: Callable[..., Result], scripted: Start, tmp_path: Path, text: str | None, message: str
) -> None:
    file = tmp_path / "workload.yaml"
    if text is not None:
        file.write_text(text)
    failed = loadtest("run", scripted().address, "--workload", str(file))
    assert failed.exit_code == 1
    assert message in error_line(failed)


@pytest.mark.parametrize("rates", ["fast", "1,,2", "0", "inf", "-3"])
def test_wrong_rates(loadtest: Callable[..., Result], scripted: Start, rates: str) -> None:
    failed = loadtest("sweep", scripted().address, "--rates", rates)
    assert failed.exit_code == 1
    assert "is not a number of requests per second" in error_line(failed)


def test_a_null_server_on_a_port_in_use() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        failed = CliRunner().invoke(loadtest_command, ["null-server", "--listen", f"127.0.0.1:{port}"])
    assert failed.exit_code == 1
    assert error_line(failed).startswith(f"Error: cannot listen on 127.0.0.1:{port}")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])

"""The command from its flags to its files and exit codes, against servers that are well, gone, or dying."""

import http.server
import json
import multiprocessing
import os
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from click.testing import CliRunner, Result

from loadtest.cli import loadtest_command
from loadtest.named import WORKLOADS
from server.pb.loraplex.v1.inference_pb2 import GenerateRequest, GenerateResponse
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
    assert all(name in listed.split() for name in WORKLOADS)


def test_no_server(loadtest: Callable[..., Result], tmp_path: Path) -> None:
    failed = loadtest("run", f"127.0.0.1:{free_port()}")
    assert failed.exit_code == 1
    assert error_line(failed).startswith("Error: no server at 127.0.0.1:")


@pytest.mark.parametrize("flags", [[], ["--processes", "2"], ["--concurrency", "4"]], ids=" ".join)
def test_a_server_that_dies(loadtest: Callable[..., Result], scripted: Start, tmp_path: Path, flags: list[str]) -> None:
    def die(server: ScriptedServer, requests: int) -> None:
        if requests == 80:
            server.die()

    failed = loadtest("run", scripted(die).address, "--rate", "200", "--duration", "20", *flags)
    assert failed.exit_code == 1
    assert error_line(failed).startswith("Error: the server was lost ")
    run = document(tmp_path)["runs"][0]
    assert run["codes"]["OK"] >= 50
    assert run["unsent"] > 1_000


class _Metrics(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b"# TYPE process_resident_memory_bytes gauge\nprocess_resident_memory_bytes 5e6\n")

    def log_message(self, format: str, *values: object) -> None:
        """Says nothing: stderr is looked at."""


def test_a_server_that_dies_with_its_metrics(loadtest: Callable[..., Result], scripted: Start, tmp_path: Path) -> None:
    with http.server.HTTPServer(("127.0.0.1", 0), _Metrics) as metrics:
        serving = threading.Thread(target=metrics.serve_forever, args=(0.01,))
        serving.start()

        def die(server: ScriptedServer, requests: int) -> None:
            if requests == 80:
                metrics.shutdown()
                metrics.server_close()
                server.die()

        url = f"http://127.0.0.1:{metrics.server_address[1]}/metrics"
        flags = ["--rate", "200", "--duration", "20", "--metrics-url", url]
        failed = loadtest("run", scripted(die).address, *flags)
        serving.join()
    assert failed.exit_code == 1
    assert error_line(failed).startswith("Error: the server was lost ")
    assert "of the metrics are missing, the last for: --metrics-url" in " ".join(failed.stdout.split())
    assert {size for _, size in document(tmp_path)["runs"][0]["memory"]} == {5e6}


@pytest.mark.parametrize(
    ("when", "error", "runs"),
    [
        (30, "Error: no server at", ["rate-300"]),  # between two rates
        (45, "Error: the server was lost ", ["rate-300", "rate-301"]),
    ],
)
def test_a_server_that_dies_in_a_sweep(
    loadtest: Callable[..., Result], scripted: Start, tmp_path: Path, when: int, error: str, runs: list[str]
) -> None:
    def die(server: ScriptedServer, requests: int) -> None:
        if requests == when:
            server.die()

    failed = loadtest("sweep", scripted(die).address, "--rates", "300,301,302", "--num-requests", "30")
    assert failed.exit_code == 1
    assert error_line(failed).startswith(error)
    assert [run["label"] for run in document(tmp_path)["runs"]] == runs
    assert sum(run["codes"]["OK"] for run in document(tmp_path)["runs"]) >= when - 10


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("processes", ["1", "2"])
def test_an_interrupted_run_keeps_what_it_has(
    loadtest: Callable[..., Result], scripted: Start, tmp_path: Path, signum: signal.Signals, processes: str
) -> None:
    def interrupt(server: ScriptedServer, requests: int) -> None:
        if requests == 20:
            for child in multiprocessing.active_children():
                os.kill(child.pid or 0, signum)  # a terminal and some supervisors send it to all
            os.kill(os.getpid(), signum)

    failed = loadtest("run", scripted(interrupt).address, "--rate", "100", "--duration", "20", "--processes", processes)
    assert failed.exit_code == 128 + signum
    assert "interrupted; the report holds what was measured until then" in failed.stdout
    run = document(tmp_path)["runs"][0]
    assert run["interrupted"]
    assert run["completed"] >= 10
    assert run["unsent"] > 100


class _Refuses(ScriptedServer):
    """Refuses some requests, by their number, with a code for all."""

    def __init__(self, code: grpc.StatusCode, refused: range) -> None:
        super().__init__(lambda server, requests: None)
        self._code, self._refused = code, refused

    def GenerateStream(self, request: GenerateRequest, context: Any) -> Iterator[GenerateResponse]:
        answers = list(super().GenerateStream(request, context))
        if len(self.requests) in self._refused:
            context.abort(self._code, "no")
        yield from answers


@pytest.mark.parametrize(
    ("code", "refused", "error"),
    [
        (grpc.StatusCode.RESOURCE_EXHAUSTED, range(20, 100), ""),
        (grpc.StatusCode.RESOURCE_EXHAUSTED, range(100), "20 requests failed, the first with RESOURCE_EXHAUSTED: no"),
        (grpc.StatusCode.NOT_FOUND, range(30, 32), "rate-101: requests failed with NOT_FOUND, which no rate explains"),
    ],
)
def test_a_sweep_fails_where_rates_do_not_explain_it(
    loadtest: Callable[..., Result], code: grpc.StatusCode, refused: range, error: str
) -> None:
    server = _Refuses(code, refused)
    done = loadtest("sweep", server.address, "--rates", "100,101", "--num-requests", "20")
    server.die()
    assert done.exit_code == bool(error)
    assert done.stderr == (f"Error: {error}\n" if error else "")


def test_nothing_is_left_of_an_earlier_report(loadtest: Callable[..., Result], scripted: Start, tmp_path: Path) -> None:
    server, folder = scripted(), tmp_path / "report"
    loadtest("sweep", server.address, "--rates", "100", "--num-requests", "3")
    (folder / "mine.txt").touch()
    assert (folder / "rate-100-first_token.hgrm").exists()
    loadtest("run", f"127.0.0.1:{free_port()}")
    assert (folder / "rate-100-first_token.hgrm").exists()  # nothing was measured that could take its place
    loadtest("run", server.address, "--rate", "100", "--num-requests", "3")
    assert sorted(path.name for path in folder.iterdir()) == [
        "mine.txt",
        "report.html",
        "report.json",
        "run-end_to_end.hgrm",
        "run-first_token.hgrm",
        "run-inter_token.hgrm",
        "run-per_output_token.hgrm",
    ]


def test_every_flag_has_an_environment_variable(
    loadtest: Callable[..., Result], scripted: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {"NUM_REQUESTS": "7", "RATE": "50", "SLO_FIRST_TOKEN": "3", "WORKLOAD": "burst-4"}.items():
        monkeypatch.setenv(f"LORAPLEX_LOADTEST_{name}", value)
    done = loadtest("run", scripted().address, "--rate", "100")
    assert done.exit_code == 0, done.output
    written = document(tmp_path)
    assert written["name"] == "burst-4"
    assert (written["workload"]["num_requests"], written["workload"]["rate"]) == (7, 100)  # the flag goes over it
    assert written["runs"][0]["slo"]["first_token"] == 3
    for command in ("run", "sweep", "null-server"):
        for parameter in loadtest_command.commands[command].params:
            envvar = {"--address": "LORAPLEX_ADDRESS", "--ca": "LORAPLEX_CA"}.get(
                parameter.opts[0], f"LORAPLEX_LOADTEST_{parameter.opts[0][2:].replace('-', '_').upper()}"
            )
            assert (parameter.envvar, getattr(parameter, "show_envvar", False)) == (envvar, True)


def test_help_names_the_environment_variable_and_the_key() -> None:
    said = " ".join(CliRunner().invoke(loadtest_command, ["sweep", "--help"], terminal_width=200).stdout.split())
    assert "YAML key: num_adapters. [env var: LORAPLEX_LOADTEST_NUM_ADAPTERS" in said
    assert "[env var: LORAPLEX_LOADTEST_BISECTIONS" in said


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--workload", "slow"], "no workload 'slow'"),
        (["--workload", "replay"], "cannot read trace trace.csv"),
        (["--num-adapters", "5"], "num_adapters is 5, and the server has 4: lower --num-adapters"),
        (["--workload", "slora", "--prompt-tokens", "900:2000"], "the server takes 1,024"),
        (["--prompt-tokens", "8"], "'8' is not LOW:HIGH"),
        (["--metrics-url", "http://127.0.0.1:1/metrics"], "--metrics-url http://127.0.0.1:1/metrics: "),
        (["--output", "/dev/null/report"], "--output: cannot write to /dev/null/report: Not a directory"),
        (["--output", "/proc"], "--output: cannot write to /proc: "),
    ],
)
def test_wrong_settings(loadtest: Callable[..., Result], scripted: Start, arguments: list[str], message: str) -> None:
    server = scripted()
    failed = loadtest("run", server.address, *arguments)
    assert failed.exit_code == 1
    assert message in error_line(failed)
    assert not server.requests


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("rate: [", "workload.yaml is not YAML: "),
        ("- rate", "a workload is a mapping of keys to values"),
        ("speed: 3", "workload.yaml: unknown key 'speed'; keys: like, rate, "),
        ("like: best", "workload.yaml: like is 'best', which is no named workload; "),
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


@pytest.mark.parametrize(
    ("rates", "message"),
    [
        *[(rates, "is not a number of requests per second") for rates in ("fast", "1,,2", "0", "inf", "-3")],
        ("100,2000000", "rate is 2000000.0: it takes 0 to 1,000,000"),
    ],
)
def test_wrong_rates(loadtest: Callable[..., Result], scripted: Start, rates: str, message: str) -> None:
    server = scripted()
    failed = loadtest("sweep", server.address, "--rates", rates)
    assert failed.exit_code == 1
    assert message in error_line(failed)
    assert not server.requests


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

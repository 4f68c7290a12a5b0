"""How runs end: servers that are gone, die or refuse, and signals."""

import http.server
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from click.testing import Result

from server.pb.loraplex.v1.inference_pb2 import GenerateRequest, GenerateResponse
from tests.loadtest.conftest import ScriptedServer, document, error_line, free_port

Start = Callable[..., ScriptedServer]


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
        (30, "Error: no server at", ["rate-100"]),  # between two rates
        (45, "Error: the server was lost ", ["rate-100", "rate-101"]),
    ],
)
def test_a_server_that_dies_in_a_sweep(
    loadtest: Callable[..., Result], scripted: Start, tmp_path: Path, when: int, error: str, runs: list[str]
) -> None:
    def die(server: ScriptedServer, requests: int) -> None:
        if requests == when:
            server.die()

    failed = loadtest("sweep", scripted(die).address, "--rates", "100,101,102", "--num-requests", "30")
    assert failed.exit_code == 1
    assert error_line(failed).startswith(error)
    assert [run["label"] for run in document(tmp_path)["runs"]] == runs
    assert document(tmp_path)["runs"][0]["codes"]["OK"] >= 10


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("processes", ["1", "2"])
def test_an_interrupted_run_keeps_what_it_has(
    loadtest: Callable[..., Result], scripted: Start, tmp_path: Path, signum: signal.Signals, processes: str
) -> None:
    def interrupt(server: ScriptedServer, requests: int) -> None:
        if requests == 60:
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

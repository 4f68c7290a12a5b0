"""Servers on a free port that do one odd thing each, results made by hand, and the real server with the tiny model."""

import json
import socket
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import pytest
from click.testing import CliRunner, Result

from loadtest.cli import loadtest_command
from loadtest.client import CallResult
from loadtest.generator import Outcome
from loadtest.measurement import Measurement, Slo
from loadtest.workload import Workload
from server.pb.loraplex.v1 import adapters_pb2, inference_pb2
from server.pb.loraplex.v1.adapters_pb2_grpc import AdaptersServicer, add_AdaptersServicer_to_server
from server.pb.loraplex.v1.inference_pb2_grpc import InferenceServicer, add_InferenceServicer_to_server
from tests.server.rpc.conftest import running, serve

__all__ = ["running", "serve"]

GOOD = CallResult(
    adapter="a",
    request_id="0",
    due=100.0,
    lateness=0.0,
    first_token=0.1,
    token_gaps=(0.01, 0.03),
    total=0.5,
    text="",
    token_ids=(1, 2, 3),
    code="OK",
    details="",
)
BAD = replace(GOOD, adapter="b", first_token=None, token_gaps=(), token_ids=(), code="NOT_FOUND", details="gone")


def make_measurement(
    results: list[CallResult], *, wall: float = 2.0, lag: float = 0.0, cpu_share: float = 0.1, **values: Any
) -> Measurement:
    """A run of one process that started at 100 s."""
    outcome = Outcome(
        results=tuple(results), lags=(lag,) * 10, cpu_share=cpu_share, unsent=0, cut=0, ended=100.0 + wall
    )
    filled = {
        "label": "run",
        "workload": Workload(),
        "slo": Slo(),
        "outcomes": [outcome],
        "start": 100.0,
        "prompt_tokens": {result.request_id: 7 for result in results},
        **values,
    }
    return Measurement(results=results, wall=wall, **filled)


class ScriptedServer(InferenceServicer, AdaptersServicer):
    """Answers every stream with one message, after `on_request` was called with the number of requests so far."""

    def __init__(self, on_request: Callable[["ScriptedServer", int], None]) -> None:
        self._on_request = on_request
        self._lock = threading.Lock()
        self.requests: list[inference_pb2.GenerateRequest] = []
        self._server = grpc.server(ThreadPoolExecutor(64), options=[("grpc.so_reuseport", 0)])
        add_InferenceServicer_to_server(self, self._server)
        add_AdaptersServicer_to_server(self, self._server)
        self.address = f"127.0.0.1:{self._server.add_insecure_port('127.0.0.1:0')}"
        self._server.start()

    def die(self) -> None:
        """Cuts every call and closes the port."""
        self._server.stop(grace=0)

    def GenerateStream(
        self, request: inference_pb2.GenerateRequest, context: object
    ) -> Iterator[inference_pb2.GenerateResponse]:
        with self._lock:
            self.requests.append(request)
            count = len(self.requests)
        self._on_request(self, count)
        yield inference_pb2.GenerateResponse(token_ids=[0], finish_reason=inference_pb2.LENGTH)

    def GetModelInfo(self, request: inference_pb2.GetModelInfoRequest, context: object) -> inference_pb2.ModelInfo:
        return inference_pb2.ModelInfo(name="scripted", max_model_len=1024, vocab_size=100)

    def ListAdapters(
        self, request: adapters_pb2.ListAdaptersRequest, context: object
    ) -> adapters_pb2.ListAdaptersResponse:
        adapters = [adapters_pb2.Adapter(name=f"a{index}", version="1", current=True) for index in range(4)]
        return adapters_pb2.ListAdaptersResponse(adapters=adapters)


@pytest.fixture
def scripted() -> Iterator[Callable[..., ScriptedServer]]:
    """Starts servers; without a script they answer at once."""
    with ExitStack() as stack:

        @contextmanager
        def started(on_request: Callable[[ScriptedServer, int], None]) -> Iterator[ScriptedServer]:
            server = ScriptedServer(on_request)
            yield server
            server.die()

        yield lambda on_request=lambda server, count: None: stack.enter_context(started(on_request))


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


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])

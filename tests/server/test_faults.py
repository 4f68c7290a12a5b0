"""What a server as its users run it does about faults around it: it stands still, its metrics are scraped slowly."""

import re
import signal
import socket
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import grpc
import pytest
from click.testing import CliRunner

from loadtest import channel
from server.cli import main
from server.metrics_endpoint import MAX_CONNECTIONS
from server.pb.loraplex.v1 import inference_pb2 as pb
from server.pb.loraplex.v1.adapters_pb2 import ListAdaptersRequest
from server.pb.loraplex.v1.adapters_pb2_grpc import AdaptersStub
from server.pb.loraplex.v1.inference_pb2_grpc import InferenceStub
from tests.server.server_process import Server

TOKENS = 200


@pytest.fixture(scope="module")
def server(model_dir: Path, adapters_dir: Path) -> Iterator[Server]:
    running = Server(model_dir, adapters_dir, "--max-num-seqs", "2")
    yield running
    assert running.stop() == 0
    assert "Traceback" not in running.banner


def request(max_tokens: int = TOKENS, adapter: str = "plain") -> pb.GenerateRequest:
    sampling = pb.SamplingParams(max_tokens=max_tokens, ignore_eos=True)
    return pb.GenerateRequest(prompt="x", adapter=adapter, sampling=sampling)


def metric(server: Server, name: str) -> float:
    """The sum over its labels."""
    with urllib.request.urlopen(f"http://{server.metrics_address}/metrics", timeout=10) as response:
        text = response.read().decode()
    return sum(float(value) for value in re.findall(rf"^{name}(?:{{.*}})? (\S+)$", text, re.MULTILINE))


def status(server: Server, name: str) -> int:
    """A number that the kernel tells of the process."""
    text = Path(f"/proc/{server.pid}/status").read_text()
    return int(re.search(rf"^{name}:\s+(\d+)", text, re.MULTILINE)[1])  # type: ignore[index]


def wait_until(happened: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not happened():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@contextmanager
def standing_still(server: Server) -> Iterator[None]:
    server.signal(signal.SIGSTOP)
    try:
        yield
    finally:
        server.signal(signal.SIGCONT)


def test_a_server_that_stood_still_drops_what_expired_meanwhile(server: Server) -> None:
    """Clients do not wait for it beyond their deadlines; it does none of their work, and is as it was before."""
    with grpc.insecure_channel(server.address) as connection:
        stub = InferenceStub(connection)
        expected = stub.Generate(request()).token_ids
        done = metric(server, "loraplex_generation_tokens_total")
        early = [stub.GenerateStream(request(), timeout=1) for _ in range(20)]
        next(early[0])
        with standing_still(server):
            late = [stub.Generate.future(request(), timeout=0.5) for _ in range(20)]
            codes = [call.code() for call in late]
            for call in early[10:]:
                with pytest.raises(grpc.RpcError):
                    list(call)
                codes.append(call.code())
        assert codes == [grpc.StatusCode.DEADLINE_EXCEEDED] * 30
        assert stub.Generate(request(), timeout=20).token_ids == expected
        for gauge in ("num_requests_running", "num_requests_waiting", "kv_cache_usage_ratio"):
            wait_until(lambda gauge=gauge: metric(server, f"loraplex_{gauge}") == 0)  # type: ignore[misc]
        [plain] = [
            one for one in AdaptersStub(connection).ListAdapters(ListAdaptersRequest()).adapters if one.name == "plain"
        ]
        assert (plain.requests_running, plain.requests_waiting) == (0, 0)
    assert metric(server, "loraplex_generation_tokens_total") - done < 12 * TOKENS
    assert metric(server, "loraplex_failed_requests_total") == 0


def test_a_command_gives_up_a_server_that_stands_still(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(channel, "_PING_TIMEOUT_MS", 200)
    with standing_still(server):
        started = time.monotonic()
        done = CliRunner().invoke(main, ["generate", "--address", server.address, "x"])
        assert time.monotonic() - started < 10, "gRPC's own patience is 20 s"
    assert done.exit_code == 1
    assert done.output.startswith(f"Error: UNAVAILABLE from {server.address}: ")


def test_scrapers_that_stall_hold_up_nobody(server: Server) -> None:
    """Neither a client nor an honest scraper, and what they take is bounded."""
    host, _, port = server.metrics_address.rpartition(":")
    with grpc.insecure_channel(server.address) as connection, ExitStack() as stack:
        stub = InferenceStub(connection)
        expected = stub.Generate(request()).token_ids
        answered = metric(server, "loraplex_requests_total")
        threads, memory = status(server, "Threads"), status(server, "VmRSS")
        for number in range(5 * MAX_CONNECTIONS):
            stalled = stack.enter_context(socket.create_connection((host, int(port))))
            stalled.sendall((b"", b"GET /metr", b"GET /metrics HTTP/1.0\r\n\r\n")[number % 3])
        assert stub.Generate(request(), timeout=20).token_ids == expected
        assert metric(server, "loraplex_requests_total") == answered + 1
        assert status(server, "Threads") <= threads + MAX_CONNECTIONS + 10
        assert status(server, "VmRSS") < memory + 50_000  # kB
    wait_until(lambda: status(server, "Threads") <= threads + 10)

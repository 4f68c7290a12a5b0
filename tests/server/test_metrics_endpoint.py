"""The Prometheus endpoint: every kind of address, and scrapers of every kind."""

import socket
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack

import pytest
from prometheus_client import CollectorRegistry, Counter, Gauge

from server.metrics_endpoint import MAX_CONNECTIONS, metrics_endpoint


def page(address: str) -> str:
    with urllib.request.urlopen(f"http://{address}/metrics", timeout=10) as response:
        text: str = response.read().decode()
        return text


@pytest.mark.parametrize("host", ["127.0.0.1", "[::1]", "", "localhost"])
def test_it_answers_at_the_address_that_it_tells(host: str) -> None:
    registry = CollectorRegistry()
    Counter("answers", "Answers", registry=registry).inc()
    with metrics_endpoint(f"{host}:0", registry) as address:
        told, _, port = address.rpartition(":")
        assert (told, port != "0") == (host, True)
        assert "answers_total 1.0" in page(f"{host or '127.0.0.1'}:{port}")


def test_there_may_be_none() -> None:
    with metrics_endpoint("", CollectorRegistry()) as address:
        assert address == ""


@pytest.fixture
def endpoint() -> Iterator[tuple[str, int]]:
    """Of a page of some megabytes, more than sockets hold."""
    registry = CollectorRegistry()
    gauge = Gauge("long", "Long names", ["name"], registry=registry)
    for number in range(100):
        gauge.labels(f"{number:0100000}")
    with metrics_endpoint("127.0.0.1:0", registry) as address:
        host, _, port = address.rpartition(":")
        yield host, int(port)


def wait_until(happened: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not happened():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def read_to_the_end(connection: socket.socket) -> int:
    """How many bytes come until the other side closes."""
    connection.settimeout(10)
    received = 0
    while data := connection.recv(1 << 20):
        received += len(data)
    return received


@pytest.mark.parametrize("request_", [b"", b"GET /metr"], ids=["nothing", "half a line"])
def test_a_connection_that_asks_for_nothing_is_closed(
    endpoint: tuple[str, int], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], request_: bytes
) -> None:
    monkeypatch.setattr("server.metrics_endpoint._Scrape.timeout", 0.1)
    with socket.create_connection(endpoint) as connection:
        connection.sendall(request_)
        assert read_to_the_end(connection) == 0
    assert capsys.readouterr().err == ""


def test_a_page_that_nobody_takes_is_given_up(
    endpoint: tuple[str, int], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("server.metrics_endpoint._Scrape.timeout", 0.1)
    before = threading.active_count()
    with socket.create_connection(endpoint) as connection:
        connection.sendall(b"GET /metrics HTTP/1.0\r\n\r\n")
        connection.recv(1)
        wait_until(lambda: threading.active_count() == before)
        assert 0 < read_to_the_end(connection) < 10_000_000
    assert capsys.readouterr().err == ""


def test_of_too_many_connections_the_oldest_go(endpoint: tuple[str, int]) -> None:
    before = threading.active_count()
    with ExitStack() as stack:
        connections = [stack.enter_context(socket.create_connection(endpoint)) for _ in range(2 * MAX_CONNECTIONS)]
        assert len(page("{}:{}".format(*endpoint))) > 10_000_000
        for connection in connections[:MAX_CONNECTIONS]:
            assert read_to_the_end(connection) == 0
        wait_until(lambda: threading.active_count() - before <= MAX_CONNECTIONS)
        connections[-1].sendall(b"GET /metrics HTTP/1.0\r\n\r\n")
        assert read_to_the_end(connections[-1]) > 10_000_000


def test_a_hundred_scrapers_at_once_get_the_page() -> None:
    registry = CollectorRegistry()
    Counter("answers", "Answers", registry=registry).inc()
    with metrics_endpoint("127.0.0.1:0", registry) as address, ThreadPoolExecutor(100) as pool:
        pages = list(pool.map(page, [address] * 100))
    assert all("answers_total 1.0" in text for text in pages)


def test_a_page_that_cannot_be_made_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    registry = CollectorRegistry()
    Gauge("broken", "Broken", registry=registry).set_function(lambda: 1 / 0)
    with metrics_endpoint("127.0.0.1:0", registry) as address:
        with pytest.raises(OSError, match="closed connection"):
            page(address)
        wait_until(lambda: bool(caplog.records))
    assert caplog.messages == ["a page of metrics could not be made"]

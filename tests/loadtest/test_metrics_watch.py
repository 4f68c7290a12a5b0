"""Samples of a metrics endpoint that is slow, odd or away."""

import asyncio
import socketserver
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

import pytest

from loadtest import metrics_watch
from loadtest.metrics_watch import MetricsWatch
from loadtest.observer import ServerUnreachable

METRICS = (
    "# TYPE process_resident_memory_bytes gauge\nprocess_resident_memory_bytes 5e6\n"
    "# TYPE x_queue_time_seconds histogram\n"
    'x_queue_time_seconds_bucket{le="+Inf"} %d\nx_queue_time_seconds_count %d\nx_queue_time_seconds_sum %d\n'
)
Start = Callable[[Callable[[int], bytes]], str]


def answer(scrape: int) -> bytes:
    """After every scrape two more requests have waited, for three seconds together."""
    body = (METRICS % (2 * scrape, 2 * scrape, 3 * scrape)).encode()
    return b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body)


@pytest.fixture
def endpoint(monkeypatch: pytest.MonkeyPatch) -> Iterator[Start]:
    """Starts endpoints that send what a function makes of the number of a scrape; gives their URL."""
    monkeypatch.setattr(metrics_watch, "_PERIOD", 0.02)

    @contextmanager
    def started(script: Callable[[int], bytes]) -> Iterator[str]:
        scrapes = 0

        class Handler(socketserver.StreamRequestHandler):
            def handle(self) -> None:
                nonlocal scrapes
                while self.rfile.readline().strip():
                    pass
                scrapes += 1
                self.wfile.write(script(scrapes))

        with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Handler) as server:
            serving = threading.Thread(target=server.serve_forever, args=(0.01,))
            serving.start()
            yield f"http://127.0.0.1:{server.server_address[1]}/metrics"
            server.shutdown()
            serving.join()

    with ExitStack() as stack:
        yield lambda script: stack.enter_context(started(script))


async def test_memory_and_queue_are_sampled(endpoint: Start) -> None:
    watch = MetricsWatch(endpoint(answer))
    async with watch.going_on():
        while len(watch.memory) < 3:
            await asyncio.sleep(0.01)
    assert {size for _, size in watch.memory} == {5e6}
    assert watch.mean_queue_seconds == 1.5
    assert watch.missed == ""
    assert len(asyncio.all_tasks()) == 1


async def test_samples_go_on_after_some_failed(endpoint: Start) -> None:
    def fail(scrape: int) -> bytes:
        return {2: b"", 3: answer(3)[:90], 4: b"HTTP/1.1 500 Oops\r\n\r\n"}.get(scrape, answer(scrape))

    watch = MetricsWatch(endpoint(fail))
    async with watch.going_on():
        while len(watch.memory) < 3:
            await asyncio.sleep(0.01)
    assert watch.missed.startswith("3 samples of the metrics are missing, the last for: --metrics-url http://")
    assert watch.missed.endswith("HTTP Error 500: Oops")


@pytest.mark.parametrize(
    ("sent", "message"),
    [
        (b"\0\0\x12\4\0\0\0\0\0\0", "^--metrics-url http://.*: "),  # HTTP/2: the port of the gRPC server
        (b"HTTP/1.1 200 OK\r\n\r\nno metrics {", "^--metrics-url http://.*: "),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nx", "IncompleteRead"),
    ],
)
async def test_an_endpoint_that_gives_no_metrics_is_refused(endpoint: Start, sent: bytes, message: str) -> None:
    with pytest.raises(ServerUnreachable, match=message):
        async with MetricsWatch(endpoint(lambda scrape: sent)).going_on():
            pytest.fail("the load began")


async def test_a_url_that_is_none_is_refused() -> None:
    with pytest.raises(ServerUnreachable, match=r"^--metrics-url http://127\.0\.0\.1:port/: nonnumeric port"):
        async with MetricsWatch("http://127.0.0.1:port/").going_on():
            pytest.fail("the load began")

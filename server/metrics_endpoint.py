"""The Prometheus endpoint. It answers in threads of its own, whatever the event loop does.

However many scrapers there are and however slow, they hold up neither the engine nor each other: one page is made at a
time, a connection that stalls is closed, and so is the oldest when there are too many.
"""

import logging
import socket
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http.server import ThreadingHTTPServer
from io import BytesIO
from typing import Any

from prometheus_client import CollectorRegistry, MetricsHandler

from server.addresses import split_address, with_port
from server.errors import ConfigError

log = logging.getLogger(__name__)

MAX_CONNECTIONS = 100
STALL_SECONDS = 10.0  # between two pieces of a request, and until the answer is taken


@contextmanager
def metrics_endpoint(listen: str, registry: CollectorRegistry) -> Iterator[str]:
    """Serves at the address of --metrics-listen meanwhile, if there is one; gives it with the port that was bound.

    Raises:
        ConfigError: the address cannot be had.
    """
    if not listen:
        yield ""
        return
    host, port = split_address(listen)
    try:
        server = _Server(host, int(port), _Scrape.factory(registry))
    except (OSError, ValueError, OverflowError) as error:
        raise ConfigError(f"--metrics-listen {listen}: {error}") from error
    thread = threading.Thread(target=server.serve_forever, name="metrics", daemon=True)
    thread.start()
    try:
        yield with_port(listen, server.server_port)
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Scrape(MetricsHandler):
    """One scrape, in a thread of its own."""

    timeout = STALL_SECONDS
    _making = threading.Lock()  # or the engine would stand in line for the interpreter behind every scraper

    def do_GET(self) -> None:
        """Makes the page whole and then sends it, so that a slow reader keeps only itself waiting."""
        page = BytesIO()
        connection, self.wfile = self.wfile, page
        with self._making:
            super().do_GET()
        self.wfile = connection
        self.wfile.write(page.getvalue())


class _Server(ThreadingHTTPServer):
    """Owns the connections."""

    request_queue_size = MAX_CONNECTIONS

    def __init__(self, host: str | None, port: int, handler: Any) -> None:
        """Binds the address; without a host every interface.

        Raises:
            OSError, OverflowError.
        """
        infos = socket.getaddrinfo(host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        self.address_family, *_, address = infos[0]
        self._open: dict[Any, None] = {}  # sockets, the oldest first
        self._lock = threading.Lock()  # of those: they come in one thread and go in theirs
        super().__init__((str(address[0]), port), handler)

    def process_request(self, request: Any, client_address: Any) -> None:
        """Of too many connections the oldest goes: whoever only wants the page has got it in less time."""
        with self._lock:
            if len(self._open) >= MAX_CONNECTIONS:
                oldest = next(iter(self._open))
                del self._open[oldest]
                with suppress(OSError):  # its client has gone
                    oldest.shutdown(socket.SHUT_RDWR)
            self._open[request] = None
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        with self._lock:
            self._open.pop(request, None)
        super().shutdown_request(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exception(), OSError):  # by which a client that has gone is known
            log.exception("a page of metrics could not be made")

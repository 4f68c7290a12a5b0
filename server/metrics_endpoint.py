"""The Prometheus endpoint. It answers in threads of its own, whatever the event loop does."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from prometheus_client import CollectorRegistry, start_http_server

from server.addresses import split_address, with_port
from server.errors import ConfigError


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
    every_interface: Any = None  # for which the annotations have no word
    try:
        httpd, thread = start_http_server(int(port), host or every_interface, registry)
    except (OSError, ValueError, OverflowError) as error:
        raise ConfigError(f"--metrics-listen {listen}: {error}") from error
    try:
        yield with_port(listen, httpd.server_port)
    finally:
        httpd.shutdown()
        httpd.server_close()
        thread.join()

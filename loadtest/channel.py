"""How clients reach a server, over TLS if its address says so, and what adapters it has. Knows only the stubs."""

from pathlib import Path

import grpc

from server.pb.loraplex.v1.adapters_pb2 import Adapter, ListAdaptersRequest
from server.pb.loraplex.v1.adapters_pb2_grpc import AdaptersStub

_PING_MS = 15_000  # between two pings while calls run: above the interval that the server takes as abuse
_PING_TIMEOUT_MS = 10_000


def endpoint(address: str, ca: Path | None = None) -> tuple[str, grpc.ChannelCredentials | None]:
    """HOST:PORT of an address, with the credentials for https://HOST:PORT.

    Args:
        ca: PEM file of the authorities to trust; None: gRPC's own, or those of GRPC_DEFAULT_SSL_ROOTS_FILE_PATH.

    Raises:
        OSError: the file cannot be read.
    """
    if not address.startswith("https://"):
        return address, None
    return address.removeprefix("https://"), grpc.ssl_channel_credentials(ca.read_bytes() if ca else None)


def channel_options() -> list[tuple[str, int]]:
    """Calls end UNAVAILABLE soon after the server stopped answering pings: one that hangs is as good as gone."""
    return [
        ("grpc.keepalive_time_ms", _PING_MS),
        ("grpc.http2.ping_timeout_ms", _PING_TIMEOUT_MS),  # keepalive_timeout_ms alone leaves it at a minute
        ("grpc.http2.max_pings_without_data", 0),  # any number: an answer may take long to begin
        ("grpc.min_reconnect_backoff_ms", _PING_TIMEOUT_MS),  # also the time to connect anew: it may hang then too
    ]


def connect(address: str, ca: Path | None = None) -> grpc.aio.Channel:
    """A channel to an `endpoint`, on the running event loop."""
    target, credentials = endpoint(address, ca)
    options = channel_options()
    if credentials:
        return grpc.aio.secure_channel(target, credentials, options)
    return grpc.aio.insecure_channel(target, options)


async def list_adapters(stub: AdaptersStub, timeout: float | None = None) -> list[Adapter]:
    """Every version of every adapter, page by page; `timeout` in seconds for each."""
    request, listed = ListAdaptersRequest(), []
    while True:
        page = await stub.ListAdapters(request, timeout=timeout)
        listed += page.adapters
        request.page_token = page.next_page_token
        if not request.page_token:
            return listed

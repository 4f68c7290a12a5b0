"""How clients reach a server, over TLS if its address says so, and what adapters it has. Knows only the stubs."""

from pathlib import Path

import grpc

from server.pb.loraplex.v1.adapters_pb2 import Adapter, ListAdaptersRequest
from server.pb.loraplex.v1.adapters_pb2_grpc import AdaptersStub


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


def connect(address: str, ca: Path | None = None) -> grpc.aio.Channel:
    """A channel to an `endpoint`, on the running event loop."""
    target, credentials = endpoint(address, ca)
    return grpc.aio.secure_channel(target, credentials) if credentials else grpc.aio.insecure_channel(target)


async def list_adapters(stub: AdaptersStub, timeout: float | None = None) -> list[Adapter]:
    """Every version of every adapter, page by page; `timeout` in seconds for each."""
    request, listed = ListAdaptersRequest(), []
    while True:
        page = await stub.ListAdapters(request, timeout=timeout)
        listed += page.adapters
        request.page_token = page.next_page_token
        if not request.page_token:
            return listed

"""How the commands reach a server: its address, over TLS if the address says so."""

from pathlib import Path

import grpc


def endpoint(address: str, ca: Path | None) -> tuple[str, grpc.ChannelCredentials | None]:
    """HOST:PORT of an address, with the credentials for https://HOST:PORT.

    Args:
        ca: PEM file of the authorities to trust; None: gRPC's own, or those of GRPC_DEFAULT_SSL_ROOTS_FILE_PATH.
    """
    if not address.startswith("https://"):
        return address, None
    return address.removeprefix("https://"), grpc.ssl_channel_credentials(ca.read_bytes() if ca else None)

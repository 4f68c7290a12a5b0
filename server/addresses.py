"""Addresses as flags name them: HOST:PORT, [IPV6]:PORT, or :PORT for every interface."""


def split_address(address: str) -> tuple[str | None, str]:
    """Host, None for every interface, and port, both as they are written."""
    host, _, port = address.rpartition(":")
    return host.strip("[]") or None, port


def with_port(address: str, port: int) -> str:
    """The address with the port that was bound, which tells what port 0 came to."""
    return f"{address.rpartition(':')[0]}:{port}"

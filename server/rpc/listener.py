"""An address with the services that are served there. Event loop."""

import socket
from collections.abc import Callable, Mapping, Sequence

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from server.addresses import split_address, with_port
from server.config import ServerConfig
from server.engine.async_engine import AsyncEngine
from server.errors import ConfigError
from server.rpc.health import HealthService
from server.rpc.tls import server_credentials

MIN_PING_INTERVAL_MS = 10_000
_MOST_UNREAD_CALLS = 1 << 16  # that have arrived and that the event loop has not taken yet, beside --max-waiting
_NEVER = (1 << 31) - 1  # milliseconds, to gRPC
# Levels, not algorithms: an algorithm would be sent to clients that do not accept it. The lowest level is gzip.
_COMPRESSION_LEVELS = {"none": 0, "gzip": 1}

Register = Callable[[grpc.aio.Server], None]


def check_address(flag: str, address: str) -> None:
    """Tries an address before a model is loaded: gRPC would bind it only afterwards, and log lines of its own.

    Raises:
        ConfigError: the address cannot be had.
    """
    if address.startswith("unix"):
        return
    host, port = split_address(address)
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, _, _, _, sockaddr = found[0]
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as gRPC binds
            probe.bind((sockaddr[0], int(port)))
    except (OSError, OverflowError) as error:
        raise ConfigError(f"{flag} {address}: {error}") from error


class Listener:
    """Owns one gRPC server, and the health of its services."""

    def __init__(
        self,
        flag: str,
        address: str,
        config: ServerConfig,
        engine: AsyncEngine,
        services: Mapping[str, Register],
        interceptors: Sequence[grpc.aio.ServerInterceptor],
    ) -> None:
        """Binds the address, which `flag` names.

        Args:
            services: by full name.

        Raises:
            ConfigError: the address cannot be had, or a certificate not be read.
        """
        most_unread = config.max_waiting + _MOST_UNREAD_CALLS
        self._services = services
        self._server = grpc.aio.server(
            interceptors=interceptors,
            options=[
                ("grpc.max_receive_message_length", config.max_message_bytes),
                ("grpc.default_compression_level", _COMPRESSION_LEVELS[config.compression]),
                ("grpc.so_reuseport", 0),
                # Clients may ping often and while idle: a long unary answer must survive their keepalive.
                ("grpc.http2.min_ping_interval_without_data_ms", MIN_PING_INTERVAL_MS),
                ("grpc.keepalive_permit_without_calls", 1),
                # From the first limit on, by default 1,000, gRPC cancels calls at random, from the second on all of
                # them. Calls in a burst are read long before that: it is the queue that says RESOURCE_EXHAUSTED.
                ("grpc.server.max_pending_requests", most_unread),
                ("grpc.server.max_pending_requests_hard_limit", most_unread),
                # More or less a tenth; calls that run then have all the time that they need.
                ("grpc.max_connection_age_ms", 1000 * config.max_connection_age or _NEVER),
            ],
        )
        for register in services.values():
            register(self._server)
        self._health = HealthService(engine)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        if config.reflection:
            names = (*services, health.SERVICE_NAME, reflection.SERVICE_NAME)
            reflection.enable_server_reflection(names, self._server)
        try:
            if config.tls_cert:
                self.port = self._server.add_secure_port(address, server_credentials(config))
            else:
                self.port = self._server.add_insecure_port(address)
        except RuntimeError as error:
            raise ConfigError(f"{flag} {address}: the address is in use or cannot be bound") from error
        self.address = address if address.startswith("unix") else with_port(address, self.port)

    async def start(self) -> None:
        await self._server.start()
        for name in ("", *self._services):
            await self._health.services.set(name, health_pb2.HealthCheckResponse.SERVING)

    async def stop_serving(self) -> None:
        """Health says so; calls that come are still answered."""
        await self._health.services.enter_graceful_shutdown()

    async def close(self) -> None:
        await self._server.stop(grace=1)

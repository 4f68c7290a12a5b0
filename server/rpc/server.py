"""Builds the gRPC server around an engine, and takes it down without losing a request. Event loop."""

import asyncio
import logging
import socket

import grpc
from grpc_health.v1 import _async as health_aio
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from server.config import ServerConfig
from server.engine.async_engine import AsyncEngine
from server.errors import ConfigError
from server.pb.inference import grpc_service_pb2, grpc_service_pb2_grpc
from server.pb.loraplex.v1 import adapters_pb2, adapters_pb2_grpc, inference_pb2, inference_pb2_grpc
from server.rpc.adapters import AdaptersService
from server.rpc.call_metrics import CallMetricsInterceptor
from server.rpc.inference import InferenceService
from server.rpc.interceptors import ErrorInterceptor
from server.rpc.open_inference import OpenInferenceService
from server.rpc.tls import server_credentials

log = logging.getLogger(__name__)

SERVICES = (
    inference_pb2.DESCRIPTOR.services_by_name["Inference"].full_name,
    adapters_pb2.DESCRIPTOR.services_by_name["Adapters"].full_name,
    grpc_service_pb2.DESCRIPTOR.services_by_name["GRPCInferenceService"].full_name,
)
MIN_PING_INTERVAL_MS = 10_000
_MOST_UNREAD_CALLS = 1 << 16  # that have arrived and that the event loop has not taken yet, beside --max-waiting
# Levels, not algorithms: an algorithm would be sent to clients that do not accept it. The lowest level is gzip.
_COMPRESSION_LEVELS = {"none": 0, "gzip": 1}


def check_address(listen: str) -> None:
    """Tries --listen before a model is loaded: gRPC would bind it only afterwards, and log lines of its own.

    Raises:
        ConfigError: the address cannot be had.
    """
    if listen.startswith("unix"):
        return
    host, _, port = listen.rpartition(":")
    try:
        found = socket.getaddrinfo(host.strip("[]") or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, _, _, _, address = found[0]
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as gRPC binds
            probe.bind((address[0], int(port)))
    except (OSError, OverflowError) as error:
        raise ConfigError(f"--listen {listen}: {error}") from error


class RpcServer:
    """Owns the listener and the health of its services."""

    def __init__(self, config: ServerConfig, engine: AsyncEngine, info: inference_pb2.ModelInfo) -> None:
        """Binds the address.

        Raises:
            ConfigError: the address cannot be had, or a certificate not be read.
        """
        self._engine = engine
        most_unread = config.max_waiting + _MOST_UNREAD_CALLS
        tracing = [engine.tracer.interceptor()] if engine.tracer else []
        self._server = grpc.aio.server(
            interceptors=[CallMetricsInterceptor(engine.metrics.registry), *tracing, ErrorInterceptor()],
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
            ],
        )
        self._health = health_aio.HealthServicer()
        inference = InferenceService(engine, info)
        inference_pb2_grpc.add_InferenceServicer_to_server(inference, self._server)
        grpc_service_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(
            OpenInferenceService(engine, info, inference), self._server
        )
        adapters_pb2_grpc.add_AdaptersServicer_to_server(AdaptersService(engine, config.max_upload_bytes), self._server)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        if config.reflection:
            names = (*SERVICES, health.SERVICE_NAME, reflection.SERVICE_NAME)
            reflection.enable_server_reflection(names, self._server)
        try:
            if config.tls_cert:
                self.port = self._server.add_secure_port(config.listen, server_credentials(config))
            else:
                self.port = self._server.add_insecure_port(config.listen)
        except RuntimeError as error:
            raise ConfigError(f"--listen {config.listen}: the address is in use or cannot be bound") from error

    async def start(self) -> None:
        await self._server.start()
        for name in ("", *SERVICES):
            await self._health.set(name, health_pb2.HealthCheckResponse.SERVING)

    async def drain(self, grace: float) -> None:
        """Not serving first, then no new requests, then the running ones end, and only then the listener closes."""
        await self._health.enter_graceful_shutdown()
        self._engine.adapters.board.events.close()
        if not await self._engine.admission.drain(grace):
            log.warning("some requests did not end within %g seconds (--drain-seconds); they are cut off", grace)
        await self._server.stop(grace=1)

    async def abandon(self) -> None:
        """The engine is down: say so, let streams end with their error, close."""
        await self._health.enter_graceful_shutdown()
        await asyncio.sleep(0)
        await self._server.stop(grace=1)

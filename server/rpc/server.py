"""Builds the gRPC server around an engine, and takes it down without losing a request. Event loop."""

import asyncio
import logging

import grpc
from grpc_health.v1 import _async as health_aio
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from server.config import ServerConfig
from server.engine.async_engine import AsyncEngine
from server.errors import ConfigError
from server.pb.loraplex.v1 import adapters_pb2, adapters_pb2_grpc, inference_pb2, inference_pb2_grpc
from server.rpc.adapters import AdaptersService
from server.rpc.inference import InferenceService
from server.rpc.interceptors import ErrorInterceptor

log = logging.getLogger(__name__)

SERVICES = (
    inference_pb2.DESCRIPTOR.services_by_name["Inference"].full_name,
    adapters_pb2.DESCRIPTOR.services_by_name["Adapters"].full_name,
)


class RpcServer:
    """Owns the listener and the health of its services."""

    def __init__(self, config: ServerConfig, engine: AsyncEngine, info: inference_pb2.ModelInfo) -> None:
        """Binds the address.

        Raises:
            ConfigError: the address cannot be had.
        """
        self._engine = engine
        self._server = grpc.aio.server(
            interceptors=[ErrorInterceptor()],
            options=[
                ("grpc.max_receive_message_length", config.max_message_bytes),
                ("grpc.so_reuseport", 0),
                # Clients may ping often and while idle: a long unary answer must survive their keepalive.
                ("grpc.http2.min_recv_ping_interval_without_data_ms", 10_000),
                ("grpc.keepalive_permit_without_calls", 1),
            ],
        )
        self._health = health_aio.HealthServicer()
        inference_pb2_grpc.add_InferenceServicer_to_server(InferenceService(engine, info), self._server)
        adapters_pb2_grpc.add_AdaptersServicer_to_server(AdaptersService(engine, config.max_upload_bytes), self._server)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        if config.reflection:
            names = (*SERVICES, health.SERVICE_NAME, reflection.SERVICE_NAME)
            reflection.enable_server_reflection(names, self._server)
        try:
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
        if not await self._engine.drain(grace):
            log.warning("some requests did not end within %g seconds (--drain-seconds); they are cut off", grace)
        await self._server.stop(grace=1)

    async def abandon(self) -> None:
        """The engine is down: say so, let streams end with their error, close."""
        await self._health.enter_graceful_shutdown()
        await asyncio.sleep(0)
        await self._server.stop(grace=1)

"""Builds the gRPC services around an engine, and takes them down without losing a request. Event loop."""

import asyncio
import logging
from functools import partial

from server.config import ServerConfig
from server.engine.async_engine import AsyncEngine
from server.lora.uploads import UploadLimits
from server.pb.inference import grpc_service_pb2, grpc_service_pb2_grpc
from server.pb.loraplex.v1 import adapters_pb2, adapters_pb2_grpc, inference_pb2, inference_pb2_grpc
from server.rpc.adapters import AdaptersService
from server.rpc.call_metrics import CallMetricsInterceptor
from server.rpc.inference import InferenceService
from server.rpc.interceptors import ErrorInterceptor, ParseInterceptor
from server.rpc.listener import Listener, Register
from server.rpc.model_statistics import ModelStatistics
from server.rpc.models import Models
from server.rpc.open_inference import OpenInferenceService

log = logging.getLogger(__name__)

INFERENCE = inference_pb2.DESCRIPTOR.services_by_name["Inference"].full_name
ADAPTERS = adapters_pb2.DESCRIPTOR.services_by_name["Adapters"].full_name
OPEN_INFERENCE = grpc_service_pb2.DESCRIPTOR.services_by_name["GRPCInferenceService"].full_name
SERVICES = (INFERENCE, ADAPTERS, OPEN_INFERENCE)


class RpcServer:
    """Owns the listeners: one, or with --admin-listen a second one, so that the first changes no adapters."""

    def __init__(self, config: ServerConfig, engine: AsyncEngine, info: inference_pb2.ModelInfo) -> None:
        """Binds the addresses.

        Raises:
            ConfigError: an address cannot be had, or a certificate not be read.
        """
        self._engine = engine
        inference = InferenceService(engine, info)
        adapters = AdaptersService(
            engine, UploadLimits(config.max_upload_bytes, config.upload_idle_seconds, config.upload_seconds)
        )
        models = Models(info.name, engine.adapters)
        statistics = ModelStatistics(models.has)

        def services(*, changes_adapters: bool) -> dict[str, Register]:
            open_inference = OpenInferenceService(
                engine, info, inference, models, statistics, changes_adapters=changes_adapters
            )
            result: dict[str, Register] = {
                INFERENCE: partial(inference_pb2_grpc.add_InferenceServicer_to_server, inference),
                OPEN_INFERENCE: partial(
                    grpc_service_pb2_grpc.add_GRPCInferenceServiceServicer_to_server, open_inference
                ),
            }
            if changes_adapters:
                result[ADAPTERS] = partial(adapters_pb2_grpc.add_AdaptersServicer_to_server, adapters)
            return result

        tracing = [engine.tracer.interceptor()] if engine.tracer else []
        interceptors = [
            CallMetricsInterceptor(engine.metrics.registry),
            ErrorInterceptor(),
            *tracing,
            ParseInterceptor(),
        ]
        listen = partial(Listener, config=config, engine=engine, interceptors=interceptors)
        has_admin = bool(config.admin_listen)
        self._listeners = [listen("--listen", config.listen, services=services(changes_adapters=not has_admin))]
        if has_admin:
            everything = services(changes_adapters=True)
            self._listeners.append(listen("--admin-listen", config.admin_listen, services=everything))

    @property
    def port(self) -> int:
        return self.ports[0]

    @property
    def ports(self) -> list[int]:
        """Of --listen, and of --admin-listen if there is one."""
        return [listener.port for listener in self._listeners]

    @property
    def addresses(self) -> list[str]:
        """The same, with the ports that were bound."""
        return [listener.address for listener in self._listeners]

    async def start(self) -> None:
        for listener in self._listeners:
            await listener.start()

    async def drain(self, grace: float) -> None:
        """Not serving first, then no new requests, then the running ones end, and only then the listeners close."""
        await self._stop_serving()
        if not await self._engine.admission.drain(grace):
            log.warning("some requests did not end within %g seconds (--drain-seconds); they are cut off", grace)
        await self._close()

    async def abandon(self) -> None:
        """The engine is down: say so, let streams end with their error, close."""
        await self._stop_serving()
        await asyncio.sleep(0)
        await self._close()

    async def _stop_serving(self) -> None:
        self._engine.adapters.board.events.close()
        for listener in self._listeners:
            await listener.stop_serving()

    async def _close(self) -> None:
        await asyncio.gather(*(listener.close() for listener in self._listeners))

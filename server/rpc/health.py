"""The standard health service: of the server, of each service, and of each adapter as `adapter/NAME`. Event loop."""

import asyncio
from typing import Any

import grpc
from grpc_health.v1 import _async as health_aio
from grpc_health.v1 import health_pb2 as pb
from grpc_health.v1 import health_pb2_grpc as pb_grpc

from server.engine.async_engine import AsyncEngine
from server.errors import AdapterNotFound, InvalidRequest, ServingError, Unavailable

ADAPTER = "adapter/"  # before NAME or NAME@VERSION

Context = grpc.aio.ServicerContext[Any, Any]


class HealthService(pb_grpc.HealthServicer):
    """The library's service, beside answers for adapters out of what is known of them.

    An adapter is SERVING if a request for it would be answered, in memory or by loading it, and NOT_SERVING if its last
    load was refused.
    """

    def __init__(self, engine: AsyncEngine) -> None:
        self.services: Any = health_aio.HealthServicer()  # whose annotations are not true
        self._engine = engine

    async def Check(self, request: pb.HealthCheckRequest, context: Context) -> pb.HealthCheckResponse:
        """Errors: NOT_FOUND."""
        if not request.service.startswith(ADAPTER):
            response: pb.HealthCheckResponse = await self.services.Check(request, context)
            return response
        status = await self._status(request.service.removeprefix(ADAPTER))
        if status == pb.HealthCheckResponse.SERVICE_UNKNOWN:
            await context.abort(grpc.StatusCode.NOT_FOUND, f"no adapter is called {request.service[:160]!r}")
        return pb.HealthCheckResponse(status=status)

    async def Watch(self, request: pb.HealthCheckRequest, context: Context) -> None:
        """Errors: RESOURCE_EXHAUSTED."""
        if not request.service.startswith(ADAPTER):
            await self.services.Watch(request, context)
            return
        try:
            await self._watch(request.service.removeprefix(ADAPTER), context)
        except Unavailable:  # the server stops; a stream that ended would be asked for again at once
            await context.write(pb.HealthCheckResponse(status=pb.HealthCheckResponse.NOT_SERVING))
            await asyncio.Event().wait()
        except ServingError as error:
            await context.abort(error.code, error.message)

    async def _watch(self, reference: str, context: Context) -> None:
        name, last = reference.partition("@")[0], None
        with self._engine.adapters.board.events.watch() as watch:
            while True:
                status = await self._status(reference)
                if status != last:
                    await context.write(pb.HealthCheckResponse(status=status))
                last = status
                while not any(event.ref is not None and event.ref.name == name for event in await watch.next()):
                    pass  # of other adapters

    async def _status(self, reference: str) -> "pb.HealthCheckResponse.ServingStatus":
        try:
            status = await self._engine.adapters.get(reference)
        except (AdapterNotFound, InvalidRequest):
            return pb.HealthCheckResponse.SERVICE_UNKNOWN
        except ServingError:  # nobody knows which version is meant
            return pb.HealthCheckResponse.NOT_SERVING
        serves = self._engine.ready and status.answers
        return pb.HealthCheckResponse.SERVING if serves else pb.HealthCheckResponse.NOT_SERVING

"""What stands around every call of our services: errors become gRPC statuses, in this one place."""

import logging
import uuid
from abc import abstractmethod
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing
from typing import Any

import grpc
from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import DecodeError
from google.rpc import error_details_pb2, status_pb2
from grpc_status import rpc_status

from server.errors import InternalFailure, InvalidRequest, Overloaded, ServingError

log = logging.getLogger(__name__)

DOMAIN = "loraplex"
MAX_MESSAGE = 1000  # characters: a status travels in headers, which have a limit
RETRY_AFTER = 1  # seconds, told to clients that met a full queue
_OWN_SERVICES = ("/loraplex.", "/inference.")
_KINDS = ("unary_unary", "unary_stream", "stream_unary", "stream_stream")  # of requests and answers

Handler = Any  # grpc.RpcMethodHandler, whose attributes the stubs leave out
Context = grpc.aio.ServicerContext[Any, Any]
Parse = Callable[[bytes], Any]


class _OwnServicesInterceptor(grpc.aio.ServerInterceptor):
    """Changes how methods of our own services are handled, and leaves those of others."""

    async def intercept_service(
        self, continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Handler]], details: grpc.HandlerCallDetails
    ) -> Handler:
        handler = await continuation(details)
        is_own = handler is not None and str(details.method).startswith(_OWN_SERVICES)
        return self._changed(handler) if is_own else handler

    @abstractmethod
    def _changed(self, handler: Handler) -> Handler:
        """The handler to take instead."""


class ErrorInterceptor(_OwnServicesInterceptor):
    """Maps every error to a status with details.

    grpc.aio alone answers UNKNOWN with the exception's text; of a bug of ours only an incident id goes out.
    """

    def _changed(self, handler: Handler) -> Handler:
        kind, behavior = _behavior(handler)
        return handler._replace(**{kind: (_unary if kind.endswith("unary") else _stream)(behavior)})


class ParseInterceptor(_OwnServicesInterceptor):
    """Parses messages inside of the call, so that one that cannot be read is an error like any other: the client's.

    To be the innermost: grpc.aio would parse before any interceptor has a say.
    """

    def _changed(self, handler: Handler) -> Handler:
        parse, (kind, behavior) = handler.request_deserializer, _behavior(handler)

        def one(data: bytes, context: Context) -> Any:
            return behavior(_parsed(parse, data), context)

        def many(messages: AsyncIterator[bytes], context: Context) -> Any:
            return behavior((_parsed(parse, data) async for data in messages), context)

        return handler._replace(**{kind: one if kind.startswith("unary") else many}, request_deserializer=None)


def public_error(error: Exception) -> ServingError:
    """The error that a client may see: of a bug of ours only an incident id, under which the log has the rest."""
    if isinstance(error, ServingError):
        return error
    incident = uuid.uuid4().hex[:12]
    log.error("unhandled error, incident %s", incident, exc_info=error)
    return InternalFailure(f"internal error, incident {incident}")


def _behavior(handler: Handler) -> tuple[str, Any]:
    """What a handler calls, and under which of its attributes."""
    return next((kind, behavior) for kind in _KINDS if (behavior := getattr(handler, kind)) is not None)


def _unary(behavior: Callable[[Any, Context], Awaitable[Any]]) -> Any:
    async def call(request: Any, context: Context) -> Any:
        try:
            return await behavior(request, context)
        except Exception as error:
            await context.abort_with_status(_status(error))

    return call


def _stream(behavior: Callable[[Any, Context], AsyncIterator[Any]]) -> Any:
    async def call(request: Any, context: Context) -> AsyncIterator[Any]:
        try:
            async with aclosing(behavior(request, context)) as messages:  # type: ignore[type-var]
                async for message in messages:
                    yield message
        except Exception as error:
            await context.abort_with_status(_status(error))

    return call


def _parsed(parse: Parse, data: bytes) -> Any:
    try:
        return parse(data)
    except (DecodeError, UnicodeDecodeError, ValueError) as error:
        raise InvalidRequest("the message is not a valid protobuf of the expected type") from error


def _status(exception: Exception) -> Any:
    error = public_error(exception)
    message = error.message if len(error.message) <= MAX_MESSAGE else error.message[:MAX_MESSAGE] + "…"
    status = status_pb2.Status(code=error.code.value[0], message=message)
    status.details.add().Pack(error_details_pb2.ErrorInfo(reason=error.reason, domain=DOMAIN))
    if error.field:
        violation = error_details_pb2.BadRequest.FieldViolation(field=error.field, description=message)
        status.details.add().Pack(error_details_pb2.BadRequest(field_violations=[violation]))
    if not isinstance(error, Overloaded):
        return rpc_status.to_status(status)
    status.details.add().Pack(error_details_pb2.RetryInfo(retry_delay=Duration(seconds=RETRY_AFTER)))
    told = rpc_status.to_status(status)
    pushback = ("grpc-retry-pushback-ms", str(1000 * RETRY_AFTER))  # the same for gRPC's own retries
    return told._replace(trailing_metadata=(*told.trailing_metadata, pushback))

"""The usual `grpc_server_*` metrics, for every call of every service. Event loop."""

import asyncio
import inspect
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import aclosing, contextmanager
from typing import Any

import grpc
from prometheus_client import CollectorRegistry, Counter, Histogram

from server.metrics import LATENCY
from server.rpc.interceptors import Context, Handler

_LABELS = ("grpc_type", "grpc_service", "grpc_method")
_UNKNOWN = ("unary", "unknown", "unknown")  # a method that no service has
_BEHAVIORS = {  # the handler's attribute for each type of call
    "unary": "unary_unary",
    "server_stream": "unary_stream",
    "client_stream": "stream_unary",
    "bidi_stream": "stream_stream",
}


class CallMetricsInterceptor(grpc.aio.ServerInterceptor):
    """Counts calls by status code and messages either way. The outermost interceptor, so it sees the final code.

    Messages are counted as they come in and are serialized, which is the same for all four types of call. Methods that
    no service has count as one, UNIMPLEMENTED: their names are the client's, without bound.
    """

    def __init__(self, registry: CollectorRegistry) -> None:
        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(f"grpc_server_{name}", text, (*_LABELS, *labels), registry=registry)

        self._started = counter("started", "Calls started")
        self._handled = counter("handled", "Calls ended, by status code", "grpc_code")
        self._received = counter("msg_received", "Messages received")
        self._sent = counter("msg_sent", "Messages sent")
        self._seconds = Histogram(
            "grpc_server_handling_seconds",
            "From the start of a call to its end",
            _LABELS,
            registry=registry,
            buckets=LATENCY,
        )

    async def intercept_service(
        self, continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Handler]], details: grpc.HandlerCallDetails
    ) -> Handler:
        handler = await continuation(details)
        if handler is None:
            self._started.labels(*_UNKNOWN).inc()
            self._handled.labels(*_UNKNOWN, grpc.StatusCode.UNIMPLEMENTED.name).inc()
            return None
        kind = next(kind for kind, attribute in _BEHAVIORS.items() if getattr(handler, attribute) is not None)
        service, _, method = str(details.method).removeprefix("/").rpartition("/")
        labels = (kind, service, method)
        behavior = getattr(handler, _BEHAVIORS[kind])
        around = self._streaming if inspect.isasyncgenfunction(behavior) else self._returning
        return handler._replace(
            **{_BEHAVIORS[kind]: around(behavior, labels)},
            request_deserializer=_counted(handler.request_deserializer, self._received.labels(*labels)),
            response_serializer=_counted(handler.response_serializer, self._sent.labels(*labels)),
        )

    def _returning(self, behavior: Callable[[Any, Context], Awaitable[Any]], labels: tuple[str, str, str]) -> Any:
        async def call(request: Any, context: Context) -> Any:
            with self._measured(labels, context):
                return await behavior(request, context)

        return call

    def _streaming(self, behavior: Callable[[Any, Context], AsyncIterator[Any]], labels: tuple[str, str, str]) -> Any:
        async def call(request: Any, context: Context) -> AsyncIterator[Any]:
            with self._measured(labels, context):
                async with aclosing(behavior(request, context)) as messages:  # type: ignore[type-var]
                    async for message in messages:
                        yield message

        return call

    @contextmanager
    def _measured(self, labels: tuple[str, str, str], context: Context) -> Iterator[None]:
        self._started.labels(*labels).inc()
        started = time.monotonic()
        code = grpc.StatusCode.OK
        try:
            yield
        except BaseException as error:
            code = _code(error, context)
            raise
        finally:
            self._handled.labels(*labels, code.name).inc()
            self._seconds.labels(*labels).observe(time.monotonic() - started)


def _code(error: BaseException, context: Context) -> grpc.StatusCode:
    """What a call that ends by an exception comes to for its client."""
    if isinstance(error, grpc.aio.AbortError):
        return next(code for code in grpc.StatusCode if context.code() in (code, code.value[0]))
    if isinstance(error, asyncio.CancelledError | GeneratorExit):
        remaining = context.time_remaining()
        expired = remaining is not None and remaining <= 0
        return grpc.StatusCode.DEADLINE_EXCEEDED if expired else grpc.StatusCode.CANCELLED
    return grpc.StatusCode.UNKNOWN


def _counted(convert: Callable[[Any], Any] | None, counter: Counter) -> Callable[[Any], Any]:
    def count(message: Any) -> Any:
        counter.inc()
        return message if convert is None else convert(message)

    return count

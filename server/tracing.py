"""OpenTelemetry traces: one span per request. Needs the extra `loraplex[otel]`, and is imported only when it is on.

The trace that a request belongs to comes with its call's metadata (`traceparent`), is kept in the context of the call's
task, and is found there when the request ends, as by what is logged meanwhile. Event loop; the exporter has a thread
of its own.
"""

import logging
import os
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import aclosing, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import grpc
from opentelemetry import context, propagate
from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.trace import Span, SpanKind, Status, StatusCode, format_trace_id, get_current_span

from server.engine.request import Request
from server.errors import ServingError
from server.metrics import RequestTimer

# Calls that are one request each. Those of ModelStreamInfer are many, and wrap each of theirs.
_REQUESTS = ("/loraplex.v1.Inference/Generate", "/loraplex.v1.Inference/GenerateStream",
             "/inference.GRPCInferenceService/ModelInfer")  # fmt: skip
# What the semantic conventions count as a server's own errors.
_OUR_FAULTS = (grpc.StatusCode.INTERNAL, grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DATA_LOSS)


@dataclass(slots=True)
class _Traced:
    """Whether a request has left a span, which its own tasks and those that wait for it both know."""

    has_span: bool = False


_traced: ContextVar[_Traced] = ContextVar("traced")


def exporting_provider(endpoint: str) -> TracerProvider:
    """A provider that exports to `endpoint`, or where the standard OTEL_ variables say if that is empty.

    Service name, sampler and batch sizes follow the same variables.
    """
    name = os.environ.get("OTEL_SERVICE_NAME", "loraplex")
    resource = Resource.create({"service.name": name, "service.version": version("loraplex")})
    provider = TracerProvider(resource=resource)
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(endpoint=endpoint or None)))
    return provider


def name_traces_in_logs() -> None:
    """Log lines that belong to a trace carry it as `trace_id` from now on; the format `json` writes it."""

    def note(record: logging.LogRecord) -> bool:
        span_context = get_current_span().get_span_context()
        if span_context.is_valid:
            record.trace_id = format_trace_id(span_context.trace_id)
        return True

    for handler in logging.getLogger().handlers:
        handler.addFilter(note)


class RequestTracer:
    """Records a span when a request ends, from what its timer knows: nothing is done while it runs.

    Attributes are those of the GenAI semantic conventions; the times are named as vLLM names them.
    """

    def __init__(self, provider: TracerProvider, base_model: str) -> None:
        self._provider = provider
        self._tracer = provider.get_tracer("loraplex", version("loraplex"))
        self._base_model = base_model

    def record(self, request: Request, timer: RequestTimer) -> None:
        """Under the span that the call's metadata named, if it did. To be called while the error, if any, passes by."""
        if traced := _traced.get(None):
            traced.has_span = True
        offset = time.time_ns() - time.monotonic_ns()

        def wall(seconds: float) -> int:
            return int(seconds * 1e9) + offset

        span = self._tracer.start_span(
            f"text_completion {self._base_model}",
            kind=SpanKind.SERVER,
            start_time=wall(timer.arrival),
            attributes=self._attributes(request, timer),
        )
        _set_status_code(span, _code(timer.outcome, sys.exception()))
        if timer.first_token:
            span.add_event("first step", timestamp=wall(timer.first_step))
            span.add_event("first token", timestamp=wall(timer.first_token))
        if timer.outcome == "error":
            span.set_status(Status(StatusCode.ERROR))
        span.end()

    @contextmanager
    def refusals(self) -> Iterator[None]:
        """Around one request: if it fails before it is one of the engine's, it leaves its span here."""
        traced, started = _Traced(), time.time_ns()
        _traced.set(traced)
        try:
            yield
        except Exception as error:
            if not traced.has_span:
                self._record_refusal(error, started)
            raise

    def interceptor(self) -> grpc.aio.ServerInterceptor:
        """To be the innermost, so that it sees errors as they are."""
        return _TraceInterceptor(self)

    def shutdown(self) -> None:
        """Exports what is left."""
        self._provider.shutdown()

    def _record_refusal(self, error: Exception, started: int) -> None:
        attributes = {
            **self._common_attributes(),
            "gen_ai.response.finish_reasons": ["refused"],
            "error.type": error.reason if isinstance(error, ServingError) else type(error).__name__,
        }
        name = f"text_completion {self._base_model}"
        span = self._tracer.start_span(name, kind=SpanKind.SERVER, start_time=started, attributes=attributes)
        code = _code("refused", error)
        _set_status_code(span, code)
        if code in _OUR_FAULTS:
            span.set_status(Status(StatusCode.ERROR))
        span.end()

    def _common_attributes(self) -> dict[str, Any]:
        return {
            "gen_ai.operation.name": "text_completion",
            "gen_ai.provider.name": "loraplex",
            "gen_ai.request.model": self._base_model,
        }

    def _attributes(self, request: Request, timer: RequestTimer) -> dict[str, Any]:
        params = request.params
        attributes: dict[str, Any] = {
            **self._common_attributes(),
            "gen_ai.request.max_tokens": params.max_tokens,
            "gen_ai.request.temperature": params.temperature,
            "gen_ai.request.top_p": params.top_p,
            "gen_ai.usage.input_tokens": request.num_prompt_tokens,
            "gen_ai.usage.output_tokens": timer.num_tokens,
            "gen_ai.usage.cache_read.input_tokens": timer.num_cached_tokens,
            "gen_ai.response.finish_reasons": [timer.outcome],
        }
        if request.identities:
            attributes["loraplex.adapter.name"] = request.adapter_name
        if len(request.identities) == 1:
            attributes["loraplex.adapter.version"] = request.identities[0].version
            attributes["loraplex.adapter.generation"] = request.identities[0].generation
        if timer.first_token:
            attributes["gen_ai.latency.time_in_queue"] = timer.first_step - timer.arrival
            attributes["gen_ai.latency.time_in_model_prefill"] = timer.first_token - timer.first_step
            attributes["gen_ai.latency.time_to_first_token"] = timer.first_token - timer.arrival
            attributes["gen_ai.latency.time_in_model_decode"] = timer.last_token - timer.first_token
            attributes["gen_ai.latency.e2e"] = timer.last_token - timer.arrival
        return attributes


def _code(outcome: str, error: BaseException | None) -> grpc.StatusCode:
    """The status of a request that ended in this way."""
    if outcome in ("stop", "length"):
        return grpc.StatusCode.OK
    if isinstance(error, ServingError):
        return error.code
    return grpc.StatusCode.INTERNAL if isinstance(error, Exception) else grpc.StatusCode.CANCELLED


def _set_status_code(span: Span, code: grpc.StatusCode) -> None:
    span.set_attribute("rpc.grpc.status_code", code.value[0])


class _TraceInterceptor(grpc.aio.ServerInterceptor):
    """Takes the trace out of a call's metadata into the context of its task, which handles this one call only."""

    def __init__(self, tracer: RequestTracer) -> None:
        self._tracer = tracer

    async def intercept_service(
        self, continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]], details: grpc.HandlerCallDetails
    ) -> Any:
        metadata = {key: value for key, value in details.invocation_metadata or () if isinstance(value, str)}
        context.attach(propagate.extract(metadata))
        handler = await continuation(details)
        if details.method not in _REQUESTS:
            return handler
        if handler.unary_unary is not None:
            return handler._replace(unary_unary=self._returning(handler.unary_unary))
        return handler._replace(unary_stream=self._streaming(handler.unary_stream))

    def _returning(self, behavior: Callable[[Any, Any], Awaitable[Any]]) -> Any:
        async def call(request: Any, context: Any) -> Any:
            with self._tracer.refusals():
                return await behavior(request, context)

        return call

    def _streaming(self, behavior: Callable[[Any, Any], AsyncIterator[Any]]) -> Any:
        async def call(request: Any, context: Any) -> AsyncIterator[Any]:
            with self._tracer.refusals():
                async with aclosing(behavior(request, context)) as messages:  # type: ignore[type-var]
                    async for message in messages:
                        yield message

        return call

"""OpenTelemetry traces: one span per request. Needs the extra `loraplex[otel]`, and is imported only when it is on.

The trace that a request belongs to comes with its call's metadata (`traceparent`), is kept in the context of the call's
task, and is found there when the request ends. Event loop; the exporter has a thread of its own.
"""

import os
import time
from collections.abc import Awaitable, Callable
from importlib.metadata import version
from typing import Any

import grpc
from opentelemetry import context, propagate
from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.trace import SpanKind, Status, StatusCode

from server.engine.request import Request
from server.metrics import RequestTimer


def exporting_provider(endpoint: str) -> TracerProvider:
    """A provider that exports to `endpoint`, or where the standard OTEL_ variables say if that is empty.

    Service name, sampler and batch sizes follow the same variables.
    """
    name = os.environ.get("OTEL_SERVICE_NAME", "loraplex")
    resource = Resource.create({"service.name": name, "service.version": version("loraplex")})
    provider = TracerProvider(resource=resource)
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(endpoint=endpoint or None)))
    return provider


class RequestTracer:
    """Records a span when a request ends, from what its timer knows: nothing is done while it runs.

    Attributes are those of the GenAI semantic conventions; the times are named as vLLM names them.
    """

    def __init__(self, provider: TracerProvider, base_model: str) -> None:
        self._provider = provider
        self._tracer = provider.get_tracer("loraplex", version("loraplex"))
        self._base_model = base_model

    def record(self, request: Request, timer: RequestTimer) -> None:
        """Under the span that the call's metadata named, if it did."""
        offset = time.time_ns() - time.monotonic_ns()

        def wall(seconds: float) -> int:
            return int(seconds * 1e9) + offset

        span = self._tracer.start_span(
            f"text_completion {self._base_model}",
            kind=SpanKind.SERVER,
            start_time=wall(timer.arrival),
            attributes=self._attributes(request, timer),
        )
        if timer.first_token:
            span.add_event("first step", timestamp=wall(timer.first_step))
            span.add_event("first token", timestamp=wall(timer.first_token))
        if timer.outcome == "error":
            span.set_status(Status(StatusCode.ERROR))
        span.end()

    def interceptor(self) -> grpc.aio.ServerInterceptor:
        return _TraceContextInterceptor()

    def shutdown(self) -> None:
        """Exports what is left."""
        self._provider.shutdown()

    def _attributes(self, request: Request, timer: RequestTimer) -> dict[str, Any]:
        params = request.params
        attributes: dict[str, Any] = {
            "gen_ai.operation.name": "text_completion",
            "gen_ai.provider.name": "loraplex",
            "gen_ai.request.model": self._base_model,
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


class _TraceContextInterceptor(grpc.aio.ServerInterceptor):
    """Takes the trace out of a call's metadata into the context of its task, which handles this one call only."""

    async def intercept_service(
        self, continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]], details: grpc.HandlerCallDetails
    ) -> Any:
        metadata = {key: value for key, value in details.invocation_metadata or () if isinstance(value, str)}
        context.attach(propagate.extract(metadata))
        return await continuation(details)

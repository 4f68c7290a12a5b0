"""Traces of real requests, in memory and over the wire; and none, at no cost, when nobody asks for them."""

import asyncio
import io
import json
import logging
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import grpc
import pytest
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import StatusCode
from prometheus_client import CollectorRegistry

from server.config import EngineConfig, ServerConfig
from server.engine.build import build_engine
from server.errors import ConfigError
from server.logs import formatter
from server.metrics import Metrics
from server.model_info import model_info
from server.pb.inference.grpc_service_pb2_grpc import GRPCInferenceServiceStub
from server.pb.loraplex.v1 import inference_pb2 as pb
from server.pb.loraplex.v1.inference_pb2_grpc import InferenceStub
from server.rpc.inference import InferenceService
from server.rpc.server import RpcServer
from server.serve import request_tracer, running_engine
from server.tracing import RequestTracer, name_traces_in_logs
from tests.server.rpc.test_open_inference import infer
from tests.server.rpc.test_transport import drained
from tests.server.test_serve import free_port

TRACE_ID, PARENT_ID = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
TRACEPARENT = (("traceparent", f"00-{TRACE_ID}-{PARENT_ID}-01"),)


@asynccontextmanager
async def traced(model_dir: Path, adapters_dir: Path, tracer: RequestTracer | None) -> AsyncIterator[grpc.aio.Channel]:
    engine_config = EngineConfig(model=str(model_dir), device="cpu", dtype="float32")
    config = ServerConfig(adapters_dir=adapters_dir, listen="127.0.0.1:0")
    parts = build_engine(engine_config)
    async with running_engine(engine_config, config, parts, Metrics(CollectorRegistry()), tracer) as engine:
        server = RpcServer(config, engine, model_info(engine_config, config, parts))
        await server.start()
        async with grpc.aio.insecure_channel(f"127.0.0.1:{server.port}") as channel:
            yield channel
        await server.drain(grace=5)


@pytest.fixture
def exporter() -> InMemorySpanExporter:
    return InMemorySpanExporter()


@pytest.fixture
async def channel(
    model_dir: Path, adapters_dir: Path, exporter: InMemorySpanExporter
) -> AsyncIterator[grpc.aio.Channel]:
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    async with traced(model_dir, adapters_dir, RequestTracer(provider, "tiny")) as channel:
        yield channel


@pytest.fixture
def inference(channel: grpc.aio.Channel) -> InferenceStub:
    return InferenceStub(channel)


def request(adapter: str = "", max_tokens: int = 4) -> pb.GenerateRequest:
    sampling = pb.SamplingParams(max_tokens=max_tokens, ignore_eos=True)
    return pb.GenerateRequest(prompt="hello", adapter=adapter, sampling=sampling)


async def spans(exporter: InMemorySpanExporter, count: int) -> tuple[ReadableSpan, ...]:
    async with asyncio.timeout(10):
        while len(exporter.get_finished_spans()) < count:
            await asyncio.sleep(0.01)
    return exporter.get_finished_spans()


async def test_a_request_is_a_span_of_its_callers_trace(
    inference: InferenceStub, exporter: InMemorySpanExporter
) -> None:
    answer = await inference.Generate(request("plain"), metadata=TRACEPARENT)
    (span,) = await spans(exporter, 1)
    assert span.name == "text_completion tiny"
    assert f"{span.context.trace_id:032x}" == TRACE_ID
    assert span.parent is not None
    assert f"{span.parent.span_id:016x}" == PARENT_ID
    assert span.attributes is not None
    expected = {
        "gen_ai.operation.name": "text_completion",
        "gen_ai.request.model": "tiny",
        "gen_ai.request.max_tokens": 4,
        "gen_ai.usage.input_tokens": 5,
        "gen_ai.usage.output_tokens": 4,
        "gen_ai.usage.cache_read.input_tokens": 0,
        "gen_ai.response.finish_reasons": ("length",),
        "rpc.grpc.status_code": 0,
        "loraplex.adapter.name": "plain",
        "loraplex.adapter.version": "1",
        "loraplex.adapter.generation": answer.adapter.generation,
    }
    assert {key: span.attributes[key] for key in expected} == expected


async def test_the_times_of_a_span_are_in_order_and_add_up(
    inference: InferenceStub, exporter: InMemorySpanExporter
) -> None:
    await inference.Generate(request())
    (span,) = await spans(exporter, 1)
    assert span.start_time is not None
    assert span.end_time is not None
    assert [event.name for event in span.events] == ["first step", "first token"]
    times = [span.start_time, *(event.timestamp for event in span.events), span.end_time]
    assert times == sorted(times)
    assert span.attributes is not None
    latency = {
        key.removeprefix("gen_ai.latency."): value
        for key, value in span.attributes.items()
        if isinstance(value, float) and key.startswith("gen_ai.latency.")
    }
    assert latency["time_in_queue"] + latency["time_in_model_prefill"] == pytest.approx(latency["time_to_first_token"])
    assert latency["time_to_first_token"] + latency["time_in_model_decode"] == pytest.approx(latency["e2e"])


async def test_calls_beside_each_other_keep_their_own_trace(
    inference: InferenceStub, exporter: InMemorySpanExporter
) -> None:
    trace_ids = [f"{index + 1:032x}" for index in range(8)]
    calls = [
        inference.Generate(request(), metadata=(("traceparent", f"00-{trace_id}-{PARENT_ID}-01"),))
        for trace_id in trace_ids
    ]
    await asyncio.gather(*calls)
    found = await spans(exporter, 8)
    assert sorted(f"{span.context.trace_id:032x}" for span in found) == trace_ids
    await inference.Generate(request())  # after the others on the same connection, without a parent
    assert (await spans(exporter, 9))[-1].parent is None


async def test_a_client_that_goes_away_leaves_a_span(inference: InferenceStub, exporter: InMemorySpanExporter) -> None:
    call = inference.GenerateStream(request(max_tokens=200), metadata=TRACEPARENT)
    await call.read()
    call.cancel()
    (span,) = await spans(exporter, 1)
    assert span.attributes is not None
    assert span.attributes["gen_ai.response.finish_reasons"] == ("abort",)
    assert span.attributes["rpc.grpc.status_code"] == grpc.StatusCode.CANCELLED.value[0]


async def test_a_refused_request_leaves_a_span_with_its_status(
    channel: grpc.aio.Channel, exporter: InMemorySpanExporter
) -> None:
    inference, models = InferenceStub(channel), GRPCInferenceServiceStub(channel)
    long = pb.GenerateRequest(prompt="x" * 300)
    unreadable: Any = channel.unary_unary("/loraplex.v1.Inference/Generate")
    calls: list[tuple[Callable[[], Any], str]] = [
        (lambda: inference.Generate(long, metadata=TRACEPARENT), "INVALID_REQUEST"),
        (lambda: inference.Generate(request("nobody"), metadata=TRACEPARENT), "ADAPTER_NOT_FOUND"),
        (lambda: drained(inference.GenerateStream(request("nobody"), metadata=TRACEPARENT)), "ADAPTER_NOT_FOUND"),
        (lambda: models.ModelInfer(infer(model="nobody"), metadata=TRACEPARENT), "ADAPTER_NOT_FOUND"),
        (lambda: models.ModelInfer(infer(prompt=""), metadata=TRACEPARENT), "INVALID_REQUEST"),
        (
            lambda: drained(models.ModelStreamInfer(iter([infer(prompt="")]), metadata=TRACEPARENT)),
            "INVALID_REQUEST",
        ),
        (lambda: unreadable(b"\xff", metadata=TRACEPARENT), "INVALID_REQUEST"),
    ]
    codes = {"INVALID_REQUEST": grpc.StatusCode.INVALID_ARGUMENT, "ADAPTER_NOT_FOUND": grpc.StatusCode.NOT_FOUND}
    for count, (call, reason) in enumerate(calls, 1):
        with suppress(grpc.aio.AioRpcError):
            await call()
        found = await spans(exporter, count)
        assert len(found) == count
        attributes = found[-1].attributes
        assert attributes is not None
        assert attributes["rpc.grpc.status_code"] == codes[reason].value[0]
        assert attributes["error.type"] == reason
        assert attributes["gen_ai.response.finish_reasons"] == ("refused",)
        assert f"{found[-1].context.trace_id:032x}" == TRACE_ID


async def test_a_bug_of_ours_is_logged_with_its_trace(
    channel: grpc.aio.Channel, exporter: InMemorySpanExporter, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = io.StringIO()
    handler = logging.StreamHandler(output)
    handler.setFormatter(formatter("json"))
    monkeypatch.setattr(logging.getLogger(), "handlers", [handler])
    name_traces_in_logs()
    monkeypatch.setattr(InferenceService, "_answers", lambda *_: 1 / 0)
    with pytest.raises(grpc.aio.AioRpcError):
        await InferenceStub(channel).Generate(request(), metadata=TRACEPARENT)
    line = json.loads(output.getvalue().splitlines()[-1])
    assert line["message"].startswith("unhandled error, incident ")
    assert line["trace_id"] == TRACE_ID
    (span,) = await spans(exporter, 1)
    assert span.attributes is not None
    assert span.attributes["rpc.grpc.status_code"] == grpc.StatusCode.INTERNAL.value[0]
    assert span.status.status_code is StatusCode.ERROR
    logging.getLogger("loraplex").warning("of no trace")
    assert "trace_id" not in json.loads(output.getvalue().splitlines()[-1])


@pytest.mark.parametrize(
    "traceparent",
    ["", "nonsense", f"00-{TRACE_ID}-{PARENT_ID}", f"00-{'0' * 32}-{PARENT_ID}-01", f"zz-{TRACE_ID}-{PARENT_ID}-01",
     "00-" + "a" * 4000],
    ids=lambda text: text[:10],
)  # fmt: skip
async def test_a_malformed_traceparent_is_none(
    inference: InferenceStub, exporter: InMemorySpanExporter, traceparent: str
) -> None:
    assert (await inference.Generate(request(), metadata=(("traceparent", traceparent),))).token_ids
    (span,) = await spans(exporter, 1)
    assert span.parent is None


class Collector(trace_service_pb2_grpc.TraceServiceServicer):
    """What an OpenTelemetry collector does first: take spans."""

    def __init__(self) -> None:
        self.requests: list[trace_service_pb2.ExportTraceServiceRequest] = []

    def Export(
        self, request: trace_service_pb2.ExportTraceServiceRequest, context: object
    ) -> trace_service_pb2.ExportTraceServiceResponse:
        self.requests.append(request)
        return trace_service_pb2.ExportTraceServiceResponse()


@pytest.mark.parametrize("by_variable", [False, True])
async def test_spans_reach_a_collector(
    model_dir: Path, adapters_dir: Path, monkeypatch: pytest.MonkeyPatch, by_variable: bool
) -> None:
    collector = Collector()
    server = grpc.server(ThreadPoolExecutor(1))
    trace_service_pb2_grpc.add_TraceServiceServicer_to_server(collector, server)
    endpoint = f"http://127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    server.start()
    if by_variable:
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", endpoint)
        monkeypatch.setenv("OTEL_SERVICE_NAME", "renamed")
    tracer = request_tracer("" if by_variable else endpoint, "tiny")
    async with traced(model_dir, adapters_dir, tracer) as channel:
        await InferenceStub(channel).Generate(request("head"), metadata=TRACEPARENT)
    server.stop(0).wait()
    (resource_spans,) = [spans for message in collector.requests for spans in message.resource_spans]
    names = {item.key: item.value.string_value for item in resource_spans.resource.attributes}
    assert names["service.name"] == ("renamed" if by_variable else "loraplex")
    (span,) = resource_spans.scope_spans[0].spans
    assert span.trace_id.hex() == TRACE_ID


async def test_without_a_collector_requests_are_answered_and_the_end_is_not_held_up(
    model_dir: Path, adapters_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TIMEOUT", "1")  # seconds; 10 by default
    tracer = request_tracer(f"http://127.0.0.1:{free_port()}", "tiny")
    async with traced(model_dir, adapters_dir, tracer) as channel:
        for _ in range(4):
            assert (await InferenceStub(channel).Generate(request())).token_ids
        ended = time.monotonic()
    assert time.monotonic() - ended < 5


def test_without_an_endpoint_opentelemetry_is_not_even_imported() -> None:
    assert request_tracer("", "tiny") is None
    check = "import sys, server.serve; assert not [name for name in sys.modules if name.startswith('opentelemetry')]"
    subprocess.run([sys.executable, "-c", check], check=True)


def test_a_missing_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "server.tracing", None)
    with pytest.raises(ConfigError, match=r"--otlp-endpoint.*pip install 'loraplex\[otel\]'"):
        request_tracer("http://127.0.0.1:4317", "tiny")

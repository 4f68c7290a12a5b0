"""Clients that ask oddly: each gets a status of its own, and nobody else notices."""

import asyncio
import struct
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

import grpc
import pytest
from google.protobuf.message import Message

from server.pb.loraplex.v1 import inference_pb2 as pb
from tests.server.rpc.conftest import Running, Serve
from tests.server.rpc.test_inference import ask, failure, idle
from tests.server.rpc.test_open_inference import flag, infer

LIMIT = 2000  # bytes of a message
EXHAUSTED, INVALID = grpc.StatusCode.RESOURCE_EXHAUSTED, grpc.StatusCode.INVALID_ARGUMENT


def of_size(num_bytes: int) -> pb.GenerateRequest:
    request = ask("x")
    request.prompt = "x" * (1 + num_bytes - request.ByteSize() - 1)  # one more byte for its length
    assert request.ByteSize() == num_bytes
    return request


@pytest.mark.parametrize(("num_bytes", "code"), [(LIMIT, INVALID), (LIMIT + 1, EXHAUSTED)])
async def test_a_message_of_one_byte_more(serve: Serve, num_bytes: int, code: grpc.StatusCode) -> None:
    """The one that fits is read, and has too many tokens."""
    async with serve(max_message_bytes=LIMIT) as server:
        assert (await failure(server.inference.Generate(of_size(num_bytes)))).code() == code


@pytest.mark.parametrize(
    "metadata",
    [
        [("x", "y" * (16 << 10))],
        [(f"key-{number}", "value") for number in range(1000)],
        [("traceparent", "0" * 10_000), ("tracestate", "1" * 10_000)],
    ],
    ids=["16 KiB", "1,000 keys", "a long trace"],
)
async def test_metadata_without_end(running: Running, metadata: list[tuple[str, str]]) -> None:
    call = running.inference.Generate(ask(), metadata=tuple(metadata))
    assert (await failure(call)).code() == EXHAUSTED
    assert (await running.inference.Generate(ask())).token_ids  # on the same connection


async def test_a_stream_that_asks_nothing(running: Running) -> None:
    call = running.open_inference.ModelStreamInfer(iter([]))
    assert [response async for response in call] == []
    assert await call.code() == grpc.StatusCode.OK


def frame(kind: int, flags: int, stream: int, payload: bytes) -> bytes:
    return struct.pack(">IBI", len(payload) << 8 | kind, flags, stream) + payload


def raw_call(method: str, *messages: Message, **more_headers: str) -> bytes:
    """A call in plain HTTP/2, for what no client of gRPC does."""
    headers = {
        ":method": "POST",
        ":scheme": "http",
        ":path": method,
        ":authority": "x",
        "te": "trailers",
        "content-type": "application/grpc",
        **{name.replace("_", "-"): value for name, value in more_headers.items()},
    }
    fields = (bytes([len(word)]) + word.encode() for pair in headers.items() for word in pair)
    block = b"".join(b"\0" + name + next(fields) for name in fields)  # literal fields, as they are
    data = [message.SerializeToString() for message in messages]
    body = b"".join(b"\0" + struct.pack(">I", len(message)) + message for message in data)
    preface = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + frame(4, 0, 0, b"")
    return preface + frame(1, 4, 1, block) + frame(0, 1, 1, body)


@asynccontextmanager
async def connected(running: Running) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    reader, writer = await asyncio.open_connection("127.0.0.1", running.server.port)
    try:
        yield reader, writer
    finally:
        writer.close()
        with suppress(ConnectionError):
            await writer.wait_closed()


@pytest.mark.parametrize("timeout", ["1S", "", "S", "-1S", "1.5S", "1x", "99999999H", "9" * 100 + "S"])
async def test_odd_timeouts(running: Running, timeout: str) -> None:
    received = b""
    async with asyncio.timeout(10), connected(running) as (reader, writer):
        writer.write(raw_call("/loraplex.v1.Inference/Generate", ask(), grpc_timeout=timeout))
        while not (b"grpc-status" in received or reader.at_eof()):
            received += await reader.read(65_536)
    assert b"grpc-status" in received
    assert (await running.inference.Generate(ask())).token_ids
    await idle(running)


async def test_a_reader_that_does_not_read(running: Running) -> None:
    """It gets what HTTP/2 lets wait for it, however long its answers are; what it asked for holds up nobody.

    Its requests take every place that there is, and give them back once the engine is done.
    """
    sampling = {"max_tokens": 100, "logprobs": 20}
    requests = [infer(flag("stream"), flag("return_logprobs"), sampling=sampling)] * (16 + 8)
    alone = await running.inference.Generate(ask(adapter="plain"))
    async with connected(running) as (reader, writer):
        writer.write(raw_call("/inference.GRPCInferenceService/ModelStreamInfer", *requests))
        async with asyncio.timeout(20):
            while not running.parts.scheduler.has_work:
                await asyncio.sleep(0.005)
        await idle(running)
        assert (await running.inference.Generate(ask(adapter="plain"))).token_ids == alone.token_ids
        received = 0
        with suppress(TimeoutError):
            while data := await asyncio.wait_for(reader.read(1 << 20), 0.3):
                received += len(data)
        assert (1 << 16) - 1 <= received < 1 << 17  # of about four million bytes
    async with asyncio.timeout(5):  # its call ends
        while value(running, "started") > value(running, "handled"):
            await asyncio.sleep(0.01)


def value(running: Running, name: str) -> float:
    labels = {
        "grpc_type": "bidi_stream",
        "grpc_service": "inference.GRPCInferenceService",
        "grpc_method": "ModelStreamInfer",
    }
    if name == "handled":
        labels["grpc_code"] = "CANCELLED"
    return running.metrics.registry.get_sample_value(f"grpc_server_{name}_total", labels) or 0.0


async def test_hundreds_of_streams_on_one_connection(serve: Serve) -> None:
    names = ["", "plain", "attention", "head"]
    async with serve({"max_num_seqs": 400}) as server:
        expected = {name: (await server.inference.Generate(ask(adapter=name))).text for name in names}

        async def text(number: int) -> str:
            call: AsyncIterator[pb.GenerateResponse] = server.inference.GenerateStream(ask(adapter=names[number % 4]))
            return "".join([message.text async for message in call])

        texts = await asyncio.gather(*[text(number) for number in range(400)])
        assert texts == [expected[names[number % 4]] for number in range(400)]
        await idle(server)

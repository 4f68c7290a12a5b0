"""What gRPC itself promises, on our port: deadlines, pings, compression, message sizes, certificates."""

import asyncio
import os
import struct
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import ExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest
import trustme
from click.testing import CliRunner
from google.rpc import error_details_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_status import rpc_status

from server.cli import main
from server.engine.answer import GenerationOutput
from server.pb.inference import grpc_service_pb2 as open_pb
from server.pb.inference.grpc_service_pb2_grpc import GRPCInferenceServiceStub
from server.pb.loraplex.v1 import inference_pb2 as pb
from server.pb.loraplex.v1.inference_pb2_grpc import InferenceStub
from server.rpc import listener
from tests.server.rpc.conftest import Running, Serve
from tests.server.rpc.test_inference import PROMPT, ask, failure, idle
from tests.server.rpc.test_open_inference import flag, infer
from tests.test_docs import ROOT, blocks

LONG: dict[str, Any] = {"max_tokens": 240}


async def drained(stream: Any) -> None:
    async for _ in stream:
        pass


async def test_a_deadline_ends_requests_in_the_engine(running: Running) -> None:
    pieces = infer(flag("stream"), sampling=LONG)
    for call in (
        lambda: drained(running.inference.GenerateStream(ask(**LONG), timeout=0.05)),
        lambda: running.open_inference.ModelInfer(infer(sampling=LONG), timeout=0.05),
        lambda: drained(running.open_inference.ModelStreamInfer(iter([pieces] * 4), timeout=0.05)),
    ):
        assert (await failure(call())).code() == grpc.StatusCode.DEADLINE_EXCEEDED
        await idle(running)


async def test_what_expires_in_the_queue_is_never_computed(serve: Serve) -> None:
    async with serve({"max_num_seqs": 1}) as server:
        running = aiter(server.inference.GenerateStream(ask(**LONG)))
        await anext(running)
        expired = [server.inference.Generate(ask("y" * 100), timeout=0.02) for _ in range(4)]
        for call in expired:
            assert (await failure(call)).code() == grpc.StatusCode.DEADLINE_EXCEEDED
        assert server.parts.scheduler.running  # it is still the first one's turn
        await drained(running)
        await idle(server)
        computed = server.metrics.registry.get_sample_value("loraplex_iteration_tokens_sum")
        assert computed == len(PROMPT.encode()) + LONG["max_tokens"] - 1  # the last token is not computed on


async def test_grpc_itself_tries_again_when_the_queue_says_so(serve: Serve) -> None:
    """By the documented configuration; the queue's word of when goes over its backoff."""
    [config] = [block.text for block in blocks(ROOT / "docs" / "clients.md") if block.file == "service-config.json"]
    hasty = config.replace('"0.5s"', '"0.01s"').replace('"8s"', '"0.01s"')
    assert hasty != config
    async with (
        serve({"max_num_seqs": 1}) as server,
        grpc.aio.insecure_channel(server.address, options=[("grpc.service_config", hasty)]) as channel,
    ):
        places = ExitStack()
        for _ in range(1 + 8):  # max_num_seqs and max_waiting
            places.enter_context(server.engine.admission.admit())
        refused = await failure(server.inference.Generate(ask()))
        assert ("grpc-retry-pushback-ms", "1000") in tuple(refused.trailing_metadata())
        started = time.monotonic()
        call = InferenceStub(channel).Generate(ask())
        await asyncio.sleep(0.1)
        places.close()
        assert (await call).token_ids
        assert time.monotonic() - started > 0.9


async def test_a_connection_takes_new_calls_for_so_long(serve: Serve) -> None:
    """Then calls that run go on, and new ones get a connection of their own."""
    async with serve(max_connection_age=1) as server:
        watch = health_pb2_grpc.HealthStub(server.channel).Watch(health_pb2.HealthCheckRequest())
        await watch.read()
        reader, writer = await asyncio.open_connection("127.0.0.1", server.server.port)
        writer.write(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + frame(4))
        async with asyncio.timeout(10):
            received = b""
            while b"max_age" not in received:  # what the server says goodbye with
                received += await reader.read(1000)
        assert (await server.inference.Generate(ask())).token_ids
        assert not watch.done()
        writer.close()


@pytest.mark.parametrize(("interval", "welcome"), [(0.3, True), (0.02, False)])
async def test_pings_of_idle_clients(
    serve: Serve, monkeypatch: pytest.MonkeyPatch, interval: float, welcome: bool
) -> None:
    """A client without a call may ping, if not too often. Plain HTTP/2, since gRPC's own clients hold pings back."""
    monkeypatch.setattr(listener, "MIN_PING_INTERVAL_MS", 200)
    settings, ping = frame(4), frame(6, b"12345678")
    async with serve() as server:
        reader, writer = await asyncio.open_connection("127.0.0.1", server.server.port)
        writer.write(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + settings)
        for _ in range(5):
            writer.write(ping)
            await asyncio.sleep(interval)
        answer = await reader.read(65_536)
        assert (b"too_many_pings" in answer) is not welcome
        writer.close()


def frame(kind: int, payload: bytes = b"") -> bytes:
    """An HTTP/2 frame of the connection: size, type, flags, stream 0."""
    return struct.pack(">IBI", len(payload) << 8 | kind, 0, 0) + payload


async def test_messages_over_the_limit(serve: Serve) -> None:
    async with serve(max_message_bytes=10_000) as server:
        for call in (
            server.inference.Generate(ask("x" * 10_000)),
            server.open_inference.ModelInfer(infer(prompt="x" * 10_000)),
            drained(server.open_inference.ModelStreamInfer(iter([infer(prompt="x" * 10_000)]))),
            server.inference.Generate(ask("x" * 10_000_000), compression=grpc.Compression.Gzip),  # small on the wire
        ):
            assert (await failure(call)).code() == grpc.StatusCode.RESOURCE_EXHAUSTED
        assert (await server.inference.Generate(ask())).token_ids


@asynccontextmanager
async def counting_proxy(address: str) -> AsyncIterator[tuple[str, list[int]]]:
    """A way to the server that notes the sizes of what comes back."""
    sizes: list[int] = []

    async def forward(source: asyncio.StreamReader, target: asyncio.StreamWriter, seen: list[int]) -> None:
        try:
            while data := await source.read(65_536):
                seen.append(len(data))
                target.write(data)
        finally:
            target.close()

    async def connect(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        host, port = address.split(":")
        back_reader, back_writer = await asyncio.open_connection(host, int(port))
        await asyncio.gather(forward(reader, back_writer, []), forward(back_reader, writer, sizes))

    proxy = await asyncio.start_server(connect, "127.0.0.1")
    async with proxy:
        host, port = proxy.sockets[0].getsockname()
        yield f"{host}:{port}", sizes


async def test_a_client_may_ping_while_it_waits_for_a_long_answer(
    serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    """gRPC's own, whose unary call brings no data for longer than its keepalive lasts."""
    monkeypatch.setattr(listener, "MIN_PING_INTERVAL_MS", 200)
    options = [("grpc.keepalive_time_ms", 300), ("grpc.keepalive_timeout_ms", 1000)]
    async with serve() as server, counting_proxy(server.address) as (address, sizes):
        generate = server.engine.generate
        nums_received = []

        async def slowly(*arguments: Any) -> AsyncIterator[GenerationOutput]:
            for _ in range(2):
                await asyncio.sleep(0.8)
                nums_received.append(len(sizes))
            async for output in generate(*arguments):
                yield output

        monkeypatch.setattr(server.engine, "generate", slowly)
        async with grpc.aio.insecure_channel(address, options=options) as channel:
            assert (await InferenceStub(channel).Generate(ask())).token_ids
        assert nums_received[1] > nums_received[0]  # pings were answered


@pytest.mark.parametrize("compression", ["none", "gzip"])
async def test_answers_are_compressed_where_server_and_client_want_it(serve: Serve, compression: str) -> None:
    async with serve(compression=compression) as server:
        for number in range(300):
            folder = server.adapters_dir / f"adapter-{number}"
            folder.mkdir()
            (folder / "adapter_config.json").touch()
            await server.engine.adapters.look(folder.name)
        plain_client = await size_of_index(server, {"grpc.compression_enabled_algorithms_bitset": 1})
        client = await size_of_index(server, {})
    assert plain_client > 7_000
    assert (client < 3_500) is (compression == "gzip")


async def size_of_index(server: Running, options: dict[str, int]) -> int:
    """Bytes that come back for the answer to RepositoryIndex, headers and all."""
    async with (
        counting_proxy(server.address) as (address, sizes),
        grpc.aio.insecure_channel(address, options=list(options.items())) as channel,
    ):
        stub = GRPCInferenceServiceStub(channel)
        await stub.ServerLive(open_pb.ServerLiveRequest())
        before = sum(sizes)
        index = await stub.RepositoryIndex(open_pb.RepositoryIndexRequest())
        assert len(index.models) > 300
        return sum(sizes) - before


def write_certificate(authority: trustme.CA, folder: Path) -> dict[str, Any]:
    """The settings of a server whose new certificate lies in the folder."""
    issued = authority.issue_cert("localhost")
    files = {"tls_cert": folder / "cert.pem", "tls_key": folder / "key.pem"}
    files["tls_cert"].write_bytes(b"".join(blob.bytes() for blob in issued.cert_chain_pems))
    files["tls_key"].write_bytes(issued.private_key_pem.bytes())
    return {name: str(path) for name, path in files.items()}


async def connects(server: Running, authority: trustme.CA) -> bool:
    credentials = grpc.ssl_channel_credentials(authority.cert_pem.bytes())
    # A pool of its own: an old connection would outlive the certificate that it was made with.
    options = [("grpc.use_local_subchannel_pool", 1)]
    async with grpc.aio.secure_channel(f"localhost:{server.server.port}", credentials, options=options) as channel:
        try:
            await InferenceStub(channel).GetModelInfo(pb.GetModelInfoRequest())
        except grpc.aio.AioRpcError as error:
            return error.code() != grpc.StatusCode.UNAVAILABLE
        return True


@pytest.mark.parametrize("by_flag", [True, False])
async def test_our_own_commands_speak_tls(serve: Serve, tmp_path: Path, by_flag: bool) -> None:
    authority = trustme.CA()
    ca = str(tmp_path / "ca.pem")
    authority.cert_pem.write_to_path(ca)
    async with serve(**write_certificate(authority, tmp_path)) as server:
        address = ["--address", f"https://localhost:{server.server.port}", *(["--ca", ca] if by_flag else [])]
        load = ["--num-requests", "4", "--rate", "100", "--num-adapters", "4"]
        load += ["--prompt-tokens", "2:8", "--output-tokens", "2:8"]
        for command, input, shown in (
            (["health"], "", b"SERVING\n"),
            (["chat", "--max-tokens", "4"], "/adapters", b"plain@1"),
            (["loadtest", "run", *load, "--processes", "2", "--output", str(tmp_path)], "", b"status codes: OK 4"),
        ):
            process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", "server.cli", *command, *address),
                env={**os.environ, **({} if by_flag else {"GRPC_DEFAULT_SSL_ROOTS_FILE_PATH": ca})},
                cwd=Path(__file__).parents[3],
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
            )
            output, _ = await process.communicate(input.encode())
            assert process.returncode == 0, output
            assert shown in output


async def test_a_renewed_certificate_needs_no_restart(serve: Serve, tmp_path: Path) -> None:
    old, new = trustme.CA(), trustme.CA()
    settings = write_certificate(old, tmp_path)
    async with serve(**settings) as server:
        assert await connects(server, old)
        Path(settings["tls_key"]).write_bytes(new.issue_cert("localhost").private_key_pem.bytes())  # half a renewal
        assert await connects(server, old)
        write_certificate(new, tmp_path)
        assert await connects(server, new)
        assert not await connects(server, old)


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--tls-cert", "x"], "--tls-cert and --tls-key go together"),
        (["--tls-client-ca", "x"], "--tls-client-ca needs --tls-cert and --tls-key"),
        (["--tls-cert", "/nowhere", "--tls-key", "/nowhere"], "--tls-cert /nowhere: No such file"),
        (["--tls-cert", __file__, "--tls-key", __file__], "not PEM, or not of one pair"),
    ],
)
def test_certificates_that_cannot_be_used(model_dir: Path, arguments: list[str], reason: str) -> None:
    defaults = ["--model", str(model_dir), "--listen", "127.0.0.1:0", "--metrics-listen", "", "--device", "cpu"]
    done = CliRunner().invoke(main, ["serve", *defaults, *arguments])
    assert done.exit_code == 2, done.output
    assert reason in done.output.splitlines()[-1]


async def test_a_burst_beyond_the_queue_is_refused_by_the_queue(serve: Serve) -> None:
    """More calls at once than gRPC lets wait by default, 1,000: it would cancel some of them at random."""
    places, burst = 16 + 8, 2_000  # max_num_seqs and max_waiting
    async with serve({"max_num_seqs": 16}) as server:
        calls = [server.inference.Generate(ask()) for _ in range(burst)]
        answers = await asyncio.gather(*calls, return_exceptions=True)
        assert (await server.inference.Generate(ask())).token_ids
    refused = [answer for answer in answers if isinstance(answer, grpc.aio.AioRpcError)]
    assert Counter((error.code(), reason(error)) for error in refused) == {
        (grpc.StatusCode.RESOURCE_EXHAUSTED, "QUEUE_FULL"): len(refused)
    }
    assert len(refused) <= burst - places
    assert sum(isinstance(answer, pb.GenerateResponse) for answer in answers) == burst - len(refused)


def reason(error: grpc.aio.AioRpcError) -> str:
    info = error_details_pb2.ErrorInfo()
    status = rpc_status.from_call(error)
    assert status is not None, error
    assert any(detail.Unpack(info) for detail in status.details)
    return info.reason

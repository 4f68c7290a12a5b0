"""Clients that are not ours, each in a process of its own, against a running server."""

import asyncio
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import grpc
import pytest
import trustme

from server.pb.loraplex.v1.inference_pb2_grpc import InferenceStub
from tests.server.rpc.conftest import Running, Serve
from tests.server.rpc.test_inference import ask, failure, idle
from tests.server.rpc.test_transport import write_certificate

CLIENTS = Path(__file__).parents[2] / "clients"
PROTOS = Path(__file__).parents[3] / "protos"


async def succeeds(*command: str | Path, cwd: Path | None = None) -> None:
    """Runs a command while the server in this process goes on; it must end with 0."""
    process = await asyncio.create_subprocess_exec(
        *map(str, command), cwd=cwd, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT
    )
    output, _ = await asyncio.wait_for(process.communicate(), timeout=120)
    assert process.returncode == 0, output.decode()


async def test_triton_client(running: Running) -> None:
    await succeeds(sys.executable, CLIENTS / "triton_client.py", running.address)
    await idle(running)


async def test_node(running: Running, tmp_path: Path, require_tool: Callable[[str], str]) -> None:
    node, npm = require_tool("node"), require_tool("npm")
    shutil.copytree(CLIENTS / "node", tmp_path / "node", ignore=shutil.ignore_patterns("node_modules"))
    await succeeds(npm, "ci", "--silent", "--no-audit", "--no-fund", cwd=tmp_path / "node")
    for script in "client.mjs", "open_inference.mjs":
        await succeeds(node, tmp_path / "node" / script, running.address, PROTOS)
        await idle(running)


@pytest.fixture
def authority() -> trustme.CA:
    return trustme.CA()


async def test_tls(serve: Serve, authority: trustme.CA, tmp_path: Path) -> None:
    ca_file = tmp_path / "ca.pem"
    authority.cert_pem.write_to_path(ca_file)
    async with serve(**write_certificate(authority, tmp_path)) as server:
        address = f"localhost:{server.server.port}"
        await succeeds(sys.executable, CLIENTS / "triton_client.py", address, ca_file)
        credentials = grpc.ssl_channel_credentials(ca_file.read_bytes())
        async with grpc.aio.secure_channel(address, credentials) as channel:
            assert (await InferenceStub(channel).Generate(ask())).token_ids
        error = await failure(server.inference.Generate(ask()))  # without TLS
        assert error.code() == grpc.StatusCode.UNAVAILABLE


async def test_clients_show_certificates(serve: Serve, authority: trustme.CA, tmp_path: Path) -> None:
    ca_file = tmp_path / "ca.pem"
    authority.cert_pem.write_to_path(ca_file)
    client = authority.issue_cert("client@example.org")
    shown = (client.private_key_pem.bytes(), b"".join(blob.bytes() for blob in client.cert_chain_pems))
    key_file, chain_file = tmp_path / "client-key.pem", tmp_path / "client-chain.pem"
    for file, data in zip((key_file, chain_file), shown, strict=True):
        file.write_bytes(data)
    async with serve(**write_certificate(authority, tmp_path), tls_client_ca=str(ca_file)) as server:
        address = f"localhost:{server.server.port}"
        await succeeds(sys.executable, CLIENTS / "triton_client.py", address, ca_file, key_file, chain_file)
        for pair, welcome in ((shown, True), ((None, None), False)):
            credentials = grpc.ssl_channel_credentials(ca_file.read_bytes(), *pair)
            async with grpc.aio.secure_channel(f"localhost:{server.server.port}", credentials) as channel:
                call = InferenceStub(channel).Generate(ask())
                if welcome:
                    assert (await call).token_ids
                else:
                    assert (await failure(call)).code() == grpc.StatusCode.UNAVAILABLE

"""A server on a free port with the tiny model, and clients over a real socket."""

import shutil
from collections.abc import AsyncIterator, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Protocol

import grpc
import pytest
from prometheus_client import CollectorRegistry

from server.config import EngineConfig, ServerConfig
from server.engine.async_engine import AsyncEngine
from server.engine.build import EngineParts, build_engine
from server.metrics import Metrics
from server.model_info import model_info
from server.pb.inference.grpc_service_pb2_grpc import GRPCInferenceServiceStub
from server.pb.loraplex.v1 import adapters_pb2 as pb
from server.pb.loraplex.v1.adapters_pb2_grpc import AdaptersStub
from server.pb.loraplex.v1.inference_pb2_grpc import InferenceStub
from server.rpc.server import RpcServer
from server.serve import running_engine


@dataclass(frozen=True)
class Running:
    """A server that is up, and what a test needs to talk to it and look inside."""

    parts: EngineParts
    engine: AsyncEngine
    server: RpcServer
    metrics: Metrics
    adapters_dir: Path
    channel: grpc.aio.Channel
    inference: InferenceStub
    adapters: AdaptersStub
    open_inference: GRPCInferenceServiceStub

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.server.port}"


class Serve(Protocol):
    def __call__(
        self, engine_settings: Mapping[str, Any] = ..., /, **settings: Any
    ) -> AbstractAsyncContextManager[Running]: ...


@pytest.fixture
def serve(model_dir: Path, adapters_dir: Path, tmp_path: Path) -> Serve:
    """Makes a server with settings of the test's own."""

    @asynccontextmanager
    async def start(
        engine_settings: Mapping[str, Any] = MappingProxyType({}), /, **settings: Any
    ) -> AsyncIterator[Running]:
        store = tmp_path / "store"
        shutil.copytree(adapters_dir, store)
        fixed = {"model": str(model_dir), "device": "cpu", "dtype": "float32", "max_num_seqs": 16}
        engine_config = EngineConfig(**{**fixed, **engine_settings})
        config = ServerConfig(adapters_dir=store, listen="127.0.0.1:0", max_waiting=8, **settings)
        parts = build_engine(engine_config)
        metrics = Metrics(CollectorRegistry())
        async with running_engine(engine_config, config, parts, metrics) as engine:
            server = RpcServer(config, engine, model_info(engine_config, config, parts))
            await server.start()
            async with grpc.aio.insecure_channel(f"127.0.0.1:{server.port}") as channel:
                stubs = InferenceStub(channel), AdaptersStub(channel), GRPCInferenceServiceStub(channel)
                yield Running(parts, engine, server, metrics, store, channel, *stubs)
            await server.drain(grace=5)

    return start


@pytest.fixture
async def running(serve: Serve) -> AsyncIterator[Running]:
    async with serve() as server:
        yield server


async def listed(running: Running) -> dict[str, pb.Adapter]:
    """The adapters by name."""
    answer = await running.adapters.ListAdapters(pb.ListAdaptersRequest())
    return {adapter.name: adapter for adapter in answer.adapters}


def edit_config(folder: Path, old: str, new: str) -> None:
    """Changes an adapter's configuration where it says `old`."""
    path = folder / "adapter_config.json"
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))

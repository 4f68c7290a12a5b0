"""`loraplex serve`: builds the parts in order, serves until SIGTERM, drains."""

import asyncio
import contextlib
import logging
import platform
import signal
from collections.abc import AsyncIterator, Iterator
from importlib.metadata import version
from pathlib import Path

import torch
from prometheus_client import CollectorRegistry, start_http_server

from server.base_models import resolve
from server.config import EngineConfig, ServerConfig
from server.engine.async_engine import AsyncEngine
from server.engine.build import EngineParts, build_engine
from server.engine.core import EngineCore
from server.engine.model import load_tokenizer
from server.errors import ConfigError
from server.lora.cache import AdapterCache
from server.lora.publish import remove_leftovers
from server.lora.store import AdapterStore
from server.lora.watcher import StoreWatcher
from server.metrics import Metrics
from server.pb.loraplex.v1.inference_pb2 import ModelInfo
from server.rpc.server import RpcServer

log = logging.getLogger("loraplex")


async def serve(engine_config: EngineConfig, config: ServerConfig) -> int:
    """Runs the server; returns the exit code: 0 after a drain, 1 when the engine died.

    Raises:
        ConfigError: it cannot start as asked.
    """
    metrics = Metrics(CollectorRegistry())
    with _metrics_endpoint(config.metrics_listen, metrics):
        parts = await asyncio.to_thread(build_engine, engine_config)
        async with running_engine(engine_config, config, parts, metrics) as engine:
            server = RpcServer(config, engine, model_info(engine_config, parts))
            await server.start()
            _show_banner(engine_config, config, parts, engine)
            log.info("ready: listening on port %d", server.port)
            return await _until_stopped(server, engine, config)


@contextlib.asynccontextmanager
async def running_engine(
    engine_config: EngineConfig, config: ServerConfig, parts: EngineParts, metrics: Metrics
) -> AsyncIterator[AsyncEngine]:
    """An engine thread with its adapters, stopped at the end."""
    adapters = AdapterCache(
        _open_store(config.adapters_dir, parts.base.name),
        parts.base.linear_layers,
        max_rank=engine_config.max_lora_rank,
        max_bytes=config.adapter_host_bytes,
        metrics=metrics,
    )
    core = EngineCore(parts.runner, parts.scheduler, metrics)
    engine = AsyncEngine(
        core,
        parts.base,
        load_tokenizer(resolve(engine_config.model)),
        adapters,
        metrics,
        max_model_len=parts.max_model_len,
        max_requests=engine_config.max_num_seqs + config.max_waiting,
    )
    engine.start()
    watching = asyncio.create_task(StoreWatcher(adapters, config.adapter_poll_seconds).run())
    try:
        yield engine
    finally:
        watching.cancel()
        await engine.stop()


def _open_store(folder: Path, base_model: str) -> AdapterStore:
    store = AdapterStore(folder, reserved=frozenset({base_model}))
    try:
        remove_leftovers(store)
    except OSError as error:
        log.warning("what interrupted uploads left in %s stays there: %s", folder, error)
    return store


def model_info(config: EngineConfig, parts: EngineParts) -> ModelInfo:
    base = parts.base
    return ModelInfo(
        name=base.name,
        architecture=base.architecture,
        dtype=parts.storage,
        device=str(base.device),
        max_model_len=parts.max_model_len,
        vocab_size=base.vocab_size,
        base_digest=base.digest,
        max_lora_rank=config.max_lora_rank,
        num_adapter_slots=config.adapter_slots,
        version=version("loraplex"),
    )


@contextlib.contextmanager
def _metrics_endpoint(listen: str, metrics: Metrics) -> Iterator[None]:
    if not listen:
        yield
        return
    host, _, port = listen.rpartition(":")
    try:
        httpd, thread = start_http_server(int(port), host, metrics.registry)
    except (OSError, ValueError, OverflowError) as error:
        raise ConfigError(f"--metrics-listen {listen}: {error}") from error
    try:
        yield
    finally:
        httpd.shutdown()
        httpd.server_close()
        thread.join()


async def _until_stopped(server: RpcServer, engine: AsyncEngine, config: ServerConfig) -> int:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for signum in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(signum, stop.set)
    stopped = asyncio.create_task(stop.wait())
    died = asyncio.create_task(engine.died.wait())
    await asyncio.wait({stopped, died}, return_when=asyncio.FIRST_COMPLETED)
    for task in (stopped, died):
        task.cancel()
    if engine.died.is_set():
        await server.abandon()
        return 1
    log.info("draining: up to %d seconds for running requests; a second signal stops at once", config.drain_seconds)
    drain = asyncio.create_task(server.drain(config.drain_seconds))
    for signum in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(signum, drain.cancel)
    with contextlib.suppress(asyncio.CancelledError):
        await drain
    log.info("stopped")
    return 0


def _show_banner(engine_config: EngineConfig, config: ServerConfig, parts: EngineParts, engine: AsyncEngine) -> None:
    base = parts.base
    found = engine.adapters.statuses()
    lines = [
        f"Loraplex {version('loraplex')}, torch {torch.__version__}, Python {platform.python_version()}",
        f"model     {base.name}: {base.architecture}, {parts.storage} on {base.device}, digest {base.digest[:12]}",
        f"check     packed and chunked steps answer as the model itself, logits within {parts.largest_difference:.1e}",
        f"KV cache  {parts.num_blocks:,} blocks of {engine_config.block_size} tokens, "
        f"{parts.kv_cache_bytes / 2**20:,.0f} MiB; requests up to {parts.max_model_len:,} tokens",
        f"adapters  {len(found)} in {config.adapters_dir}; {engine_config.adapter_slots} device slots, rank up to "
        f"{engine_config.max_lora_rank}, kernels: {parts.runner.lora.kernels_name}",
        f"listening gRPC {config.listen}, metrics {config.metrics_listen or 'off'}, reflection "
        f"{'on' if config.reflection else 'off'}, no authentication",
    ]
    for line in lines:
        log.info("%s", line)

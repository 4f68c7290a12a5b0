"""`loraplex serve`: builds the parts in order, serves until SIGTERM, drains."""

import asyncio
import contextlib
import gc
import logging
import os
import signal
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Info, ProcessCollector, disable_created_metrics

from server.adapter_metrics import BASE, OTHER
from server.banner import banner, refused_adapters
from server.base_models import resolve
from server.config import EngineConfig, ServerConfig
from server.engine.async_engine import AsyncEngine
from server.engine.build import EngineParts, build_engine
from server.engine.core import EngineCore
from server.engine.model import load_tokenizer
from server.errors import ConfigError, Overloaded
from server.lora.cache import AdapterCache
from server.lora.publish import remove_leftovers
from server.lora.served_base import ServedBase
from server.lora.store import AdapterStore
from server.lora.watcher import StoreWatcher
from server.metrics import Metrics
from server.metrics_endpoint import metrics_endpoint
from server.model_info import model_info
from server.openmp import release_team
from server.pb.loraplex.v1.inference_pb2 import ModelInfo
from server.rpc.listener import check_address
from server.rpc.server import RpcServer
from server.throughput_log import ThroughputLog

if TYPE_CHECKING:
    from server.tracing import RequestTracer

log = logging.getLogger("loraplex")

# The engine's thread gives the interpreter away in every long call, a dozen times a step where layers are replayed, and
# each time must wait until a busy event loop gives it back, for Python's own 5 ms at worst.
_SWITCH_INTERVAL = 0.0005  # seconds
_OTLP_VARIABLES = ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")


async def serve(engine_config: EngineConfig, config: ServerConfig) -> int:
    """Runs the server; returns the exit code: 0 after a drain, 1 when the engine died.

    Raises:
        ConfigError: it cannot start as asked.
    """
    check_address("--listen", config.listen)
    if config.admin_listen:
        if config.admin_listen == config.listen and not config.listen.endswith(":0"):  # which is any free port
            raise ConfigError(f"--admin-listen {config.admin_listen} is --listen too; give it an address of its own")
        check_address("--admin-listen", config.admin_listen)
    disable_created_metrics()
    metrics = Metrics(CollectorRegistry(), config.metrics_adapters)
    ProcessCollector(registry=metrics.registry)
    tracer = request_tracer(config.otlp_endpoint, Path(engine_config.model).name)
    with metrics_endpoint(config.metrics_listen, metrics.registry) as metrics_address:
        parts = await asyncio.to_thread(_build, engine_config)
        async with running_engine(engine_config, config, parts, metrics, tracer) as engine:
            info = model_info(engine_config, config, parts)
            _publish_build(metrics, info)
            server = RpcServer(config, engine, info)
            await server.start()
            catalog = engine.adapters.catalog
            folders = {ref: catalog.path(ref) for ref in catalog.refs()}
            # What cannot be served is said before it is asked for.
            refused = await asyncio.to_thread(
                refused_adapters, folders, parts.base.linear_layers, engine_config.max_lora_rank, parts.base.name
            )
            for ref, why in refused.items():
                engine.adapters.board.refused(ref, why, lasting=True)
            for line in banner(engine_config, config, parts, folders, refused, server.addresses, metrics_address):
                log.info("%s", line)
            throughput = asyncio.create_task(ThroughputLog(metrics, parts.scheduler).run())
            # A full collection stops the engine and every stream. What is here now stays, and is looked at no more.
            gc.collect()
            gc.freeze()
            try:
                return await _until_stopped(server, engine, config)
            finally:
                gc.unfreeze()
                throughput.cancel()


@contextlib.asynccontextmanager
async def running_engine(
    engine_config: EngineConfig,
    config: ServerConfig,
    parts: EngineParts,
    metrics: Metrics,
    tracer: "RequestTracer | None" = None,
) -> AsyncIterator[AsyncEngine]:
    """An engine thread with its adapters, stopped at the end."""
    adapters = AdapterCache(
        _open_store(config.adapters_dir, parts.base.name),
        ServedBase(
            weights=parts.runner.lora.base_weights,
            max_rank=engine_config.max_lora_rank,
            name=parts.base.name,
            fingerprint=parts.base.fingerprint,
            lora_dtype=parts.lora_dtype,
        ),
        max_bytes=config.adapter_host_bytes,
        metrics=metrics,
    )
    core = EngineCore(parts.runner, parts.scheduler, metrics, parts.merge_policy)
    engine = AsyncEngine(
        core,
        parts.base,
        load_tokenizer(resolve(engine_config.model)),
        adapters,
        metrics,
        max_model_len=parts.max_model_len,
        max_requests=engine_config.max_num_seqs + config.max_waiting,
        merge_policy=engine_config.merge_policy,
        tracer=tracer,
    )
    switch_interval = sys.getswitchinterval()
    sys.setswitchinterval(_SWITCH_INTERVAL)
    engine.start()
    watching = asyncio.create_task(StoreWatcher(adapters, config.adapter_poll_seconds).run())
    try:
        yield engine
    finally:
        watching.cancel()
        await engine.stop()
        sys.setswitchinterval(switch_interval)
        if tracer is not None:
            await asyncio.to_thread(tracer.shutdown)


def request_tracer(endpoint: str, base_model: str) -> "RequestTracer | None":
    """Traces go to `endpoint`, or where OpenTelemetry's own variables say; None if neither is set.

    Raises:
        ConfigError: OpenTelemetry is not installed.
    """
    if not endpoint and not any(os.environ.get(name) for name in _OTLP_VARIABLES):
        return None
    try:
        from server.tracing import RequestTracer, exporting_provider, name_traces_in_logs
    except ImportError as error:
        raise ConfigError("--otlp-endpoint needs OpenTelemetry: pip install 'loraplex[otel]'") from error
    name_traces_in_logs()
    return RequestTracer(exporting_provider(endpoint), base_model)


def _build(config: EngineConfig) -> EngineParts:
    """In a thread of its own; the engine's, which takes the steps, brings a team of compute threads itself."""
    try:
        return build_engine(config)
    finally:
        release_team()


def _open_store(folder: Path, base_model: str) -> AdapterStore:
    store = AdapterStore(folder, reserved=frozenset({base_model, BASE, OTHER}))
    try:
        remove_leftovers(store)
    except (OSError, Overloaded) as error:
        log.warning("what interrupted uploads left in %s stays there: %s", folder, error)
    return store


def _publish_build(metrics: Metrics, info: ModelInfo) -> None:
    build = Info("loraplex_build", "What is served, and by which version", registry=metrics.registry)
    build.info({"version": info.version, "model": info.name, "device": info.device, "dtype": info.dtype})


async def _until_stopped(server: RpcServer, engine: AsyncEngine, config: ServerConfig) -> int:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for signum in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(signum, stop.set)
    log.info("ready: listening on %s", " and ".join(server.addresses))  # and ready to be stopped
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

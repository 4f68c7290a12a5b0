"""The Adapters service: messages to the adapters' owners and back, nothing else."""

import asyncio
import contextlib
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing

from server.engine.async_engine import AsyncEngine
from server.errors import InvalidRequest, ServingError
from server.lora.events import AdapterStatus
from server.lora.layers import bytes_on_device
from server.lora.publish import DeclaredFile
from server.lora.router import AdapterRouter
from server.lora.store import AdapterRef, parse_reference
from server.lora.unload_mode import UnloadMode
from server.lora.uploads import AdapterUploads, UploadClaim, UploadLimits
from server.pb.loraplex.v1 import adapters_pb2 as pb
from server.pb.loraplex.v1 import adapters_pb2_grpc as pb_grpc

MAX_PAGE = 1000  # adapters in one answer, which must stay under the usual 4 MiB of a message
_HEAR_OUT_SECONDS = 1.0  # most that a refused upload goes on being read
_MODES = {
    pb.UNLOAD_MODE_UNSPECIFIED: UnloadMode.DRAIN,
    pb.DRAIN: UnloadMode.DRAIN,
    pb.FORCE: UnloadMode.FORCE,
    pb.IF_IDLE: UnloadMode.IF_IDLE,
}


class AdaptersService(pb_grpc.AdaptersServicer):
    def __init__(self, engine: AsyncEngine, upload_limits: UploadLimits) -> None:
        self._engine = engine
        self._adapters = engine.adapters
        self._router = AdapterRouter(engine.adapters)
        self._uploads = AdapterUploads(engine.adapters, upload_limits)

    async def LoadAdapter(self, request: pb.LoadAdapterRequest, context: object) -> pb.Adapter:
        """Errors: INVALID_ARGUMENT, FAILED_PRECONDITION, NOT_FOUND, ALREADY_EXISTS, ABORTED, DATA_LOSS,
        RESOURCE_EXHAUSTED, UNAVAILABLE.
        """
        adapter = await self._adapters.load(
            request.name,
            request.source,
            replace=request.replace,
            expected_generation=_expected_generation(request),
            pin=request.pin,
        )
        return self._message(self._adapters.board.status(AdapterRef(adapter.name, adapter.version)))

    async def UploadAdapter(self, requests: AsyncIterator[pb.UploadAdapterRequest], context: object) -> pb.Adapter:
        """Errors: those of LoadAdapter, DEADLINE_EXCEEDED."""
        try:
            return await self._upload(requests)
        except ServingError:
            await _hear_out(requests)
            raise

    async def _upload(self, requests: AsyncIterator[pb.UploadAdapterRequest]) -> pb.Adapter:
        messages = self._uploads.limits.in_time(requests)
        header = (await anext(messages, pb.UploadAdapterRequest())).header
        files = [DeclaredFile(file.name, file.size, file.sha256) for file in header.files]
        generation = _expected_generation(header)
        claim = UploadClaim(name=header.name, replace=header.replace, expected_generation=generation)
        async with self._uploads.receive(claim, files) as upload:
            async for message in messages:
                if message.WhichOneof("message") != "chunk":
                    raise InvalidRequest("after the header come chunks only", field="message")
                await upload.write(message.chunk.file, message.chunk.offset, message.chunk.data)
            return self._message(await upload.publish(pin=header.pin))

    async def UnloadAdapter(self, request: pb.UnloadAdapterRequest, context: object) -> pb.UnloadAdapterResponse:
        """Errors: INVALID_ARGUMENT, NOT_FOUND, FAILED_PRECONDITION."""
        mode = _MODES.get(request.mode)
        if mode is None:
            raise InvalidRequest(f"mode {request.mode} is none of UnloadMode", field="mode")
        freed = await self._adapters.unload(request.name, mode)
        return pb.UnloadAdapterResponse(freed_bytes_device=freed.device, freed_bytes_host=freed.host)

    async def ListAdapters(self, request: pb.ListAdaptersRequest, context: object) -> pb.ListAdaptersResponse:
        """Errors: INVALID_ARGUMENT for a page token that is none."""
        size = min(request.page_size or MAX_PAGE, MAX_PAGE)
        after = None
        if request.page_token:
            name, version = parse_reference(request.page_token, "page_token")
            after = AdapterRef(name, version or "0")
        statuses = self._adapters.statuses(after, size + 1)
        draining = [] if len(statuses) > size else self._adapters.board.draining()
        memory = self._adapters.memory
        return pb.ListAdaptersResponse(
            adapters=[self._message(status, listed=True) for status in statuses[:size]],
            next_page_token=str(statuses[size - 1].ref) if len(statuses) > size else "",
            draining=[self._message(status, listed=True) for status in draining],
            bytes_host=memory.num_bytes,
            bytes_host_pinned=memory.num_pinned_bytes,
            bytes_host_limit=memory.max_bytes,
            bytes_merged=self._engine.merging.num_bytes,
        )

    async def GetAdapter(self, request: pb.GetAdapterRequest, context: object) -> pb.Adapter:
        """Errors: INVALID_ARGUMENT, NOT_FOUND."""
        status = await self._adapters.get(request.name)
        message = self._message(status)
        message.digest = message.digest or await self._adapters.recorded_digest(status.ref)
        return message

    async def PinAdapter(self, request: pb.PinAdapterRequest, context: object) -> pb.Adapter:
        """Errors: those of LoadAdapter."""
        return self._message(await self._adapters.pin(request.name))

    async def UnpinAdapter(self, request: pb.UnpinAdapterRequest, context: object) -> pb.Adapter:
        """Errors: INVALID_ARGUMENT, NOT_FOUND."""
        return self._message(await self._adapters.unpin(request.name))

    async def SetTraffic(self, request: pb.SetTrafficRequest, context: object) -> pb.SetTrafficResponse:
        """Errors: those of LoadAdapter."""
        statuses = await self._router.set_traffic(request.name, dict(request.percent_by_version))
        return pb.SetTrafficResponse(adapters=[self._message(status) for status in statuses])

    async def PromoteVersion(self, request: pb.PromoteVersionRequest, context: object) -> pb.Adapter:
        """Errors: those of LoadAdapter."""
        return self._message(await self._router.promote(request.name, request.version))

    async def MergeAdapter(self, request: pb.MergeAdapterRequest, context: object) -> pb.MergeAdapterResponse:
        """Errors: those of LoadAdapter, and FAILED_PRECONDITION where nothing is merged on request."""
        adapter, done = await self._engine.merging.merge(request.name)
        status = self._adapters.board.status(AdapterRef(adapter.name, adapter.version))
        return pb.MergeAdapterResponse(seconds=done.seconds, adapter=self._message(status), bytes_merged=done.num_bytes)

    async def UnmergeAdapter(self, request: pb.UnmergeAdapterRequest, context: object) -> pb.UnmergeAdapterResponse:
        """Errors: FAILED_PRECONDITION where nothing is merged on request."""
        done = await self._engine.merging.unmerge()
        return pb.UnmergeAdapterResponse(seconds=done.seconds, freed_bytes=done.num_bytes)

    async def WatchAdapters(
        self, request: pb.WatchAdaptersRequest, context: object
    ) -> AsyncGenerator[pb.AdapterEvent, None]:
        """Errors: RESOURCE_EXHAUSTED, UNAVAILABLE."""
        async with aclosing(self._adapters.board.watch()) as events:
            async for event in events:
                adapter = self._message(self._adapters.board.status(event.ref), listed=True) if event.ref else None
                if adapter is not None and event.error:
                    adapter.error = event.error
                yield pb.AdapterEvent(type=event.kind.name, adapter=adapter)

    def _message(self, status: AdapterStatus, *, listed: bool = False) -> pb.Adapter:
        """`listed`: one of many, which leave out what may be long."""
        message = pb.Adapter(
            name=status.ref.name,
            version=status.ref.version,
            generation=status.generation,
            state=_state(status),
            tier=pb.DISK,
            error=status.error,
            pinned=status.pinned,
            requests_waiting=status.num_waiting,
            current=status.current,
            bytes_disk=status.num_bytes_disk,
            traffic_percent=status.traffic_percent,
        )
        adapter, last = status.adapter, status.last
        if adapter is None and last is not None:
            message.MergeFrom(
                pb.Adapter(
                    digest=last.digest,
                    rank=last.rank,
                    target_modules=last.target_modules,
                    num_layers=last.num_layers,
                )
            )
        if adapter is None:
            return message
        on_device = self._engine.is_on_device(adapter)
        message.MergeFrom(
            pb.Adapter(
                digest=adapter.digest,
                rank=adapter.rank,
                target_modules=adapter.target_modules,
                num_layers=len(adapter.weights),
                unmatched_targets=adapter.unmatched_targets,
                layers_by_target={} if listed else adapter.layers_by_target,
                adds_nothing=adapter.adds_nothing,
                other_base=adapter.other_base,
                bytes_disk=adapter.num_bytes_disk,  # of one from elsewhere than the store, too
                bytes_host=adapter.num_bytes,
                bytes_device=bytes_on_device(adapter, self._engine.base.device) if on_device else 0,
                tier=pb.DEVICE if on_device else pb.HOST,
                merged=self._engine.merging.is_merged(adapter.generation),
                requests_running=status.num_users,
            )
        )
        return message


def _state(status: AdapterStatus) -> pb.AdapterState:
    if status.draining:
        return pb.DRAINING
    if status.adapter is not None:
        return pb.READY
    if status.loading:
        return pb.LOADING
    return pb.FAILED if status.error else pb.AVAILABLE


def _expected_generation(request: pb.LoadAdapterRequest | pb.UploadHeader) -> int | None:
    return request.expected_generation if request.HasField("expected_generation") else None


async def _hear_out(requests: AsyncIterator[pb.UploadAdapterRequest]) -> None:
    """Lets a client finish: one that still writes when its call ends may be told INTERNAL in place of the reason."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(_HEAR_OUT_SECONDS):
            async for _ in requests:
                pass

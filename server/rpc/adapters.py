"""The Adapters service: messages to the adapter cache and back, nothing else."""

from server.engine.async_engine import AsyncEngine
from server.lora.adapter import Adapter
from server.lora.cache import AdapterStatus
from server.lora.layers import bytes_on_device
from server.pb.loraplex.v1 import adapters_pb2 as pb
from server.pb.loraplex.v1 import adapters_pb2_grpc as pb_grpc


class AdaptersService(pb_grpc.AdaptersServicer):
    def __init__(self, engine: AsyncEngine) -> None:
        self._engine = engine
        self._adapters = engine.adapters

    async def LoadAdapter(self, request: pb.LoadAdapterRequest, context: object) -> pb.Adapter:
        """Errors: INVALID_ARGUMENT, FAILED_PRECONDITION, NOT_FOUND, ALREADY_EXISTS, RESOURCE_EXHAUSTED."""
        adapter = await self._adapters.load(request.name, request.source, replace=request.replace)
        return self._message(adapter)

    async def UnloadAdapter(self, request: pb.UnloadAdapterRequest, context: object) -> pb.UnloadAdapterResponse:
        """Errors: INVALID_ARGUMENT, NOT_FOUND."""
        freed = await self._adapters.unload(request.name)
        return pb.UnloadAdapterResponse(freed_bytes_device=freed.device, freed_bytes_host=freed.host)

    async def ListAdapters(self, request: pb.ListAdaptersRequest, context: object) -> pb.ListAdaptersResponse:
        return pb.ListAdaptersResponse(adapters=[self._describe(status) for status in self._adapters.statuses()])

    async def MergeAdapter(self, request: pb.MergeAdapterRequest, context: object) -> pb.MergeAdapterResponse:
        """Errors: those of LoadAdapter, and FAILED_PRECONDITION where nothing is merged on request."""
        adapter, seconds = await self._engine.merge(request.name)
        return pb.MergeAdapterResponse(
            seconds=seconds, adapter=self._message(adapter), bytes_merged=self._engine.merged_bytes
        )

    async def UnmergeAdapter(self, request: pb.UnmergeAdapterRequest, context: object) -> pb.UnmergeAdapterResponse:
        """Errors: FAILED_PRECONDITION where nothing is merged on request."""
        return pb.UnmergeAdapterResponse(seconds=await self._engine.unmerge())

    def _describe(self, status: AdapterStatus) -> pb.Adapter:
        if status.adapter is not None:
            message = self._message(status.adapter)
            message.requests_running = status.num_users
            return message
        return pb.Adapter(
            name=status.ref.name,
            version=status.ref.version,
            state=pb.FAILED if status.error else pb.AVAILABLE,
            tier=pb.DISK,
            error=status.error,
        )

    def _message(self, adapter: Adapter) -> pb.Adapter:
        on_device = self._engine.is_on_device(adapter)
        return pb.Adapter(
            name=adapter.name,
            version=adapter.version,
            generation=adapter.generation,
            digest=adapter.digest,
            state=pb.READY,
            rank=adapter.rank,
            target_modules=adapter.target_modules,
            bytes_disk=adapter.num_bytes_disk,
            bytes_host=adapter.num_bytes,
            bytes_device=bytes_on_device(adapter, self._engine.base.device) if on_device else 0,
            tier=pb.DEVICE if on_device else pb.HOST,
            merged=self._engine.is_merged(adapter),
        )

"""Operators merge an adapter into the base's weights, and take it out again. Event loop."""

import asyncio
from functools import partial

from server.engine.commands import Merge, MergeDone
from server.engine.core import EngineCore
from server.engine.engine_thread import EngineThread
from server.errors import MergeRefused
from server.lora.adapter import Adapter
from server.lora.cache import AdapterCache
from server.lora.events import EventKind
from server.lora.store import AdapterRef


class AdapterMerging:
    """Asks the engine to merge, as far as `--merge-policy` lets operators; says what is merged, whoever wished it.

    What an operator merged stays in host memory as if it were pinned. What the engine merged unasked may leave it, and
    is taken out of the base's weights then.
    """

    def __init__(self, core: EngineCore, thread: EngineThread, adapters: AdapterCache, policy: str) -> None:
        self._core = core
        self._thread = thread
        self._adapters = adapters
        self._policy = policy
        self._loop = asyncio.get_running_loop()
        core.on_switch(self._tell)

    async def merge(self, name: str) -> tuple[Adapter, MergeDone]:
        """Merges an adapter, in place of one that is; returns it and what that took.

        Raises:
            ServingError: see `AdapterCache.hold`; MergeRefused, Unavailable.
        """
        self._check_policy()
        ref = await self._adapters.named(name)
        async with self._adapters.acquire(str(ref)) as adapter:
            return adapter, await self._thread.ask(partial(Merge, adapter))

    async def unmerge(self) -> MergeDone:
        """Takes the merged adapter, if there is one, out of the base's weights; returns what that took and gave back.

        Raises:
            MergeRefused, Unavailable.
        """
        self._check_policy()
        return await self._thread.ask(partial(Merge, None))

    def is_merged(self, generation: int) -> bool:
        merged = self._core.merged
        return merged is not None and merged.generation == generation

    @property
    def num_bytes(self) -> int:
        """Memory that an adapter takes because it is merged, under no limit."""
        return self._core.merged_bytes

    def _tell(self, merged: Adapter | None, before: Adapter | None) -> None:
        """Engine thread."""
        self._loop.call_soon_threadsafe(self._switched, merged, before)

    def _switched(self, merged: Adapter | None, before: Adapter | None) -> None:
        """Those who watch hear of both, unless what happened to the adapter's name has told them already."""
        memory = self._adapters.memory
        memory.keep_merged(merged if self._policy == "manual" else None)
        changed = [each for each in (before, merged) if each is not None and memory.holds(each)]
        self._adapters.board.publish(EventKind.UPDATED, *(AdapterRef(each.name, each.version) for each in changed))

    def _check_policy(self) -> None:
        if self._policy != "manual":
            raise MergeRefused(f"--merge-policy is {self._policy}: merging on request needs manual")

"""Random lives of adapters, held against a model that fits on a page.

The model knows what every name must mean: which content is on disk, which generation is in memory, who uses what.
"""

import asyncio
import shutil
import tempfile
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    invariant,
    multiple,
    rule,
    run_state_machine_as_test,
)

from adapters.format import read_adapter
from server.errors import AdapterExists, AdapterInUse, AdapterNotFound, InvalidAdapter, Overloaded
from server.lora.adapter import Adapter
from server.lora.store import AdapterRef
from server.lora.unload_mode import UnloadMode
from server.lora.watcher import StoreWatcher
from tests.conftest import save_adapter, tiny_llama
from tests.server.lora.conftest import ADAPTER_BYTES, LAYERS, make_cache

NAMES = ("a", "b", "c")
ROOM = 2  # adapters in host memory
BROKEN = "broken"  # a content that is refused

names = st.sampled_from(NAMES)


class Request:
    """A request that runs, and what it must run on to its end."""

    def __init__(self, name: str, adapter: Adapter, scope: AsyncExitStack) -> None:
        self.name = name
        self.adapter = adapter
        self.content = adapter.digest, adapter.generation
        self.scope = scope


class Lives(RuleBasedStateMachine):
    requests = Bundle("requests")
    contents: dict[str, Path]  # of the three names: what may be in a folder; set by the test
    digests: dict[str, str]

    def __init__(self) -> None:
        super().__init__()
        self.loop = asyncio.new_event_loop()
        self.root = Path(tempfile.mkdtemp())
        self.running: list[Request] = []
        self.revoked: set[Adapter] = set()
        # The model.
        self.disk: dict[str, str] = {}  # name → content
        self.unloaded: set[str] = set()
        self.pinned: set[str] = set()
        self.generation: dict[str, tuple[str, int]] = {}  # name → digest and generation of its last load
        self.newest = 0
        self.run(self._start())

    async def _start(self) -> None:
        max_bytes = ROOM * ADAPTER_BYTES + ADAPTER_BYTES // 2
        self.cache, self.left_device = make_cache(self.root, max_bytes, revoke=self.revoked.add)
        self.watcher = StoreWatcher(self.cache, interval=1)

    def run(self, work: Any) -> Any:
        return self.loop.run_until_complete(asyncio.wait_for(work, 10))

    def visible(self, name: str) -> bool:
        return name in self.disk and name not in self.unloaded

    # What operators do.

    @rule(name=names, content=st.sampled_from(["one", "two", BROKEN]))
    def publish_on_disk(self, name: str, content: str) -> None:
        if self.disk.get(name) != content:
            shutil.rmtree(self.root / name, ignore_errors=True)
            shutil.copytree(self.contents[content], self.root / name)
            self.disk[name] = content
            self._look()

    @rule(name=names)
    def delete_from_disk(self, name: str) -> None:
        shutil.rmtree(self.root / name, ignore_errors=True)
        if self.disk.pop(name, None):
            self._look()

    def _look(self) -> None:
        """What the watch does, with its two looks."""
        before = {name: copy.adapter.digest for name in NAMES if (copy := self.cache.memory.get(AdapterRef(name, "1")))}

        async def look_twice() -> None:
            for _ in range(2):
                await self.watcher.look()

        self.run(look_twice())
        reloaded = []
        for name in NAMES:
            if name not in self.disk:
                self.unloaded.discard(name)
                self.pinned.discard(name)
                self.generation.pop(name, None)
            elif name in before:
                copy = self.cache.memory.get(AdapterRef(name, "1"))
                if copy is not None and copy.adapter.digest != before[name]:
                    reloaded.append((name, copy.adapter))
        for name, adapter in sorted(reloaded, key=lambda pair: pair[1].generation):
            self._loaded(name, adapter, fresh=True)

    @rule(name=names, replace=st.booleans(), pin=st.booleans())
    def load(self, name: str, replace: bool, pin: bool) -> None:
        in_memory = self.cache.memory.get(AdapterRef(name, "1")) is not None
        try:
            adapter = self.run(self.cache.load(name, replace=replace, pin=pin))
        except AdapterNotFound:
            assert name not in self.disk
        except AdapterExists:
            assert in_memory
            assert not replace
        except InvalidAdapter:
            assert self.disk[name] == BROKEN
        except Overloaded:
            self._assert_full()
        else:
            assert adapter.digest == self.digests[self.disk[name]]
            self.unloaded.discard(name)
            self._loaded(name, adapter, fresh=True)
            if pin:
                self.pinned.add(name)

    @rule(name=names, mode=st.sampled_from(UnloadMode))
    def unload(self, name: str, mode: UnloadMode) -> None:
        users = [request for request in self.running if request.name == name and request.adapter not in self.revoked]
        current = self.cache.memory.get(AdapterRef(name, "1"))
        on_current = [request for request in users if current and request.adapter is current.adapter]
        task = self.loop.create_task(self.cache.unload(name, mode))
        self.run(asyncio.sleep(0))
        self.run(asyncio.sleep(0))
        if task.done() and task.exception() is not None:
            error = task.exception()
            if isinstance(error, AdapterInUse):
                assert mode is UnloadMode.IF_IDLE
                assert on_current
            else:
                assert isinstance(error, AdapterNotFound)
                assert not self.visible(name)
            return
        if name in self.disk:
            self.unloaded.add(name)
        self.pinned.discard(name)
        self.generation.pop(name, None)
        if mode is UnloadMode.FORCE:
            assert {request.adapter for request in users} <= self.revoked
            for request in users:
                self._end(request)
            self.run(task)
        elif not on_current:
            freed = self.run(task)
            assert freed.host == (ADAPTER_BYTES if current else 0)

    @rule(name=names)
    def pin(self, name: str) -> None:
        if self._would_wait(name):
            return
        try:
            status = self.run(self.cache.pin(name))
        except (AdapterNotFound, InvalidAdapter, Overloaded) as error:
            self._assert_refused(name, error)
        else:
            assert status.pinned
            self._loaded(name, status.adapter, fresh=False)
            self.pinned.add(name)

    @rule(name=names)
    def unpin(self, name: str) -> None:
        if self.visible(name):
            assert not self.run(self.cache.unpin(name)).pinned
            self.pinned.discard(name)

    # What requests do.

    @rule(target=requests, name=names)
    def begin(self, name: str) -> Any:
        if self._would_wait(name):
            return multiple()
        scope = AsyncExitStack()
        try:
            adapter = self.run(scope.enter_async_context(self.cache.acquire(name)))
        except (AdapterNotFound, InvalidAdapter, Overloaded) as error:
            self._assert_refused(name, error)
            return multiple()
        self._loaded(name, adapter, fresh=False)
        self.running.append(Request(name, adapter, scope))
        return self.running[-1]

    @rule(request=consumes(requests))
    def finish(self, request: Request) -> None:
        self._end(request)

    @rule(name=names)
    def cancel_while_loading(self, name: str) -> None:
        async def begin_and_cancel() -> None:
            task = asyncio.create_task(AsyncExitStack().enter_async_context(self.cache.acquire(name)))
            await asyncio.sleep(0)
            task.cancel()
            await asyncio.wait([task])
            loading = self.cache.loads._loading.get(AdapterRef(name, "1"))
            if loading is not None:
                await asyncio.wait([loading])

        if self.cache.memory.get(AdapterRef(name, "1")) is None:
            self.run(begin_and_cancel())
            copy = self.cache.memory.get(AdapterRef(name, "1"))
            if copy is not None:
                self._loaded(name, copy.adapter, fresh=False)

    # What must hold.

    def _loaded(self, name: str, adapter: Adapter, *, fresh: bool) -> None:
        """A generation is one content under one name, and never comes twice."""
        digest, generation = self.generation.get(name, ("", 0))
        if fresh or digest != adapter.digest:
            assert adapter.generation > self.newest
        else:
            assert adapter.generation == generation
        self.newest = max(self.newest, adapter.generation)
        self.generation[name] = adapter.digest, adapter.generation

    def _end(self, request: Request) -> None:
        if request in self.running:
            self.running.remove(request)
            assert request.content == (request.adapter.digest, request.adapter.generation)
            assert request.adapter not in self.left_device, "weights in use stay on the device"
            self.run(request.scope.aclose())

    def _would_wait(self, name: str) -> bool:
        """Whether its load waits for requests to end, which none does within a step."""
        if self.disk.get(name, BROKEN) == BROKEN or self.cache.memory.get(AdapterRef(name, "1")) is not None:
            return False
        pinned = self._pinned_adapters()
        return len(pinned) < ROOM <= len(pinned | {request.adapter for request in self.running})

    def _pinned_adapters(self) -> set[Adapter]:
        copies = [self.cache.memory.get(AdapterRef(name, "1")) for name in self.pinned]
        assert None not in copies
        return {copy.adapter for copy in copies if copy is not None}

    def _assert_refused(self, name: str, error: Exception) -> None:
        if isinstance(error, AdapterNotFound):
            assert not self.visible(name)
        elif isinstance(error, InvalidAdapter):
            assert self.disk[name] == BROKEN
        else:
            self._assert_full()

    def _assert_full(self) -> None:
        """Only what is used or pinned keeps others out."""
        assert len(self._pinned_adapters() | {request.adapter for request in self.running}) >= ROOM

    @invariant()
    def memory_holds_what_it_counts(self) -> None:
        in_memory = {copy.adapter for name in NAMES if (copy := self.cache.memory.get(AdapterRef(name, "1")))}
        in_use = {request.adapter for request in self.running}
        self.run(asyncio.sleep(0))
        self.run(asyncio.sleep(0))
        assert self.cache.num_bytes == len(in_memory | in_use) * ADAPTER_BYTES
        assert not self.cache.memory._reserved
        assert not self.cache.loads._loading

    @invariant()
    def the_listing_tells_the_truth(self) -> None:
        statuses = {status.ref.name: status for status in self.cache.statuses()}
        assert set(statuses) == {name for name in self.disk if self.visible(name)}
        for name, status in statuses.items():
            assert status.pinned == (name in self.pinned)
            assert status.adapter is not None or not status.pinned
            assert status.num_users == sum(request.adapter is status.adapter for request in self.running)
            if status.adapter is not None and not status.error:
                assert status.adapter.digest == self.digests[self.disk[name]]
                assert (status.adapter.digest, status.generation) == self.generation[name]

    def teardown(self) -> None:
        for request in list(self.running):
            self._end(request)
        self.run(asyncio.sleep(0.01))
        assert all(copy.num_users == 0 for copy in self.cache.memory._copies.values())
        assert not self.cache.memory.retired
        self.loop.run_until_complete(self.loop.shutdown_asyncgens())
        self.loop.close()
        shutil.rmtree(self.root)


def test_random_lives(tmp_path: Path) -> None:
    Lives.contents, Lives.digests = {}, {}
    for seed, content in enumerate(("one", "two")):
        folder = tmp_path / content
        save_adapter(tiny_llama(), folder, seed, r=4, target_modules=["q_proj", "v_proj"])
        Lives.contents[content] = folder
        Lives.digests[content] = read_adapter(folder, LAYERS, 8).digest
    shutil.copytree(tmp_path / "one", tmp_path / BROKEN)
    (tmp_path / BROKEN / "adapter_model.safetensors").write_bytes(b"\0" * 100)
    Lives.contents[BROKEN] = tmp_path / BROKEN
    run_state_machine_as_test(
        Lives,
        settings=settings(
            max_examples=100,
            stateful_step_count=40,
            deadline=None,
            derandomize=True,
            suppress_health_check=list(HealthCheck),
        ),
    )

"""Random lives of adapters on a running engine: whatever operators do, every stream says what its adapter says.

The model knows what each name means, who runs on what, and what is merged. How names and memory go together is
`tests.server.lora.test_life`'s; this is about tokens.
"""

import asyncio
import shutil
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    invariant,
    rule,
    run_state_machine_as_test,
)
from prometheus_client import CollectorRegistry

from server.config import EngineConfig, ServerConfig
from server.engine.async_engine import AsyncEngine, GenerationOutput
from server.engine.build import build_engine
from server.engine.request import SamplingParams
from server.errors import AdapterExists, AdapterInUse, AdapterNotFound, AdapterUnloaded, InvalidAdapter
from server.lora.adapter import Adapter
from server.lora.cache import UnloadMode
from server.metrics import Metrics
from server.serve import running_engine
from tests.conftest import save_adapter, tiny_llama

NAMES = ("a", "b", "c")
CONTENTS = {"one": ["q_proj", "v_proj"], "two": ["o_proj", "down_proj"]}  # and what they adapt
BROKEN = "broken"  # a content that is refused
PROMPT = list(range(40, 60))  # over a block of the prefix cache
PARAMS = SamplingParams(max_tokens=16, ignore_eos=True)

names = st.sampled_from(NAMES)


class Stream:
    """A request that runs, and the adapter whose tokens it must give to its end."""

    def __init__(self, name: str, content: str, outputs: AsyncGenerator[GenerationOutput, None]) -> None:
        self.name = name
        self.content = content
        self.outputs = outputs
        self.generation = 0  # of its adapter; 0: the base model
        self.tokens: list[int] = []
        self.over = False


class Lives(RuleBasedStateMachine):
    streams = Bundle("streams")
    # Set by the test: one engine for all lives.
    loop: asyncio.AbstractEventLoop
    engine: AsyncEngine
    expected: dict[str, list[int]]  # by content; "" is the base model

    def __init__(self) -> None:
        super().__init__()
        self.running: list[Stream] = []
        self.unloading: list[asyncio.Task[Any]] = []
        # The model.
        self.meaning: dict[str, str] = {}  # name → content
        self.adapters: dict[str, Adapter] = {}  # name → what it means
        self.merged: Adapter | None = None

    def generation(self, name: str) -> int:
        return self.adapters[name].generation if name in self.adapters else 0

    def run(self, work: Any) -> Any:
        return self.loop.run_until_complete(asyncio.wait_for(work, 10))

    # What operators do.

    @rule(name=names, content=st.sampled_from([*CONTENTS, BROKEN]), replace=st.booleans(), pin=st.booleans())
    def load(self, name: str, content: str, replace: bool, pin: bool) -> None:
        try:
            adapter = self.run(self.engine.adapters.load(name, content, replace=replace, pin=pin))
        except AdapterExists:
            assert name in self.meaning
            assert not replace
        except InvalidAdapter:
            assert content == BROKEN
        else:
            self._lost(name)
            self.meaning[name], self.adapters[name] = content, adapter

    @rule(name=names, mode=st.sampled_from(UnloadMode))
    def unload(self, name: str, mode: UnloadMode) -> None:
        users = [stream for stream in self.running if stream.name == name]
        on_current = [stream for stream in users if stream.generation == self.generation(name)]
        task = self.loop.create_task(self.engine.adapters.unload(name, mode))
        for _ in range(3):
            self.run(asyncio.sleep(0))
        if task.done() and isinstance(task.exception(), AdapterInUse):
            assert mode is UnloadMode.IF_IDLE
            assert on_current
            return
        if task.done() and isinstance(task.exception(), AdapterNotFound):
            assert name not in self.meaning
            return
        self.unloading.append(task)
        self._lost(name)
        self.meaning.pop(name, None)
        self.adapters.pop(name, None)
        if mode is UnloadMode.FORCE:
            for stream in users:
                self._finish(stream, revoked=True)
            assert self.run(task).host > 0
        elif not on_current:
            assert self.run(task).host > 0

    @rule(name=names, pinned=st.booleans())
    def pin(self, name: str, pinned: bool) -> None:
        if name in self.meaning:
            change = self.engine.adapters.pin if pinned else self.engine.adapters.unpin
            assert self.run(change(name)).pinned == pinned

    @rule(name=names)
    def merge(self, name: str) -> None:
        try:
            adapter, _ = self.run(self.engine.merging.merge(name))
        except AdapterNotFound:
            assert name not in self.meaning
        else:
            assert adapter is self.adapters[name]
            self.merged = adapter

    @rule()
    def unmerge(self) -> None:
        self.run(self.engine.merging.unmerge())
        self.merged = None

    # What requests do.

    @rule(target=streams, name=st.sampled_from(["", *NAMES]))
    def begin(self, name: str) -> Any:
        adapters = {name: 1.0} if name else {}
        stream = Stream(name, self.meaning.get(name, ""), self.engine.generate(PROMPT, PARAMS, adapters))
        try:
            self._read(stream)
        except AdapterNotFound:
            assert name not in self.meaning
            stream.over = True
        else:
            assert stream.generation == self.generation(name)
            self.running.append(stream)
        return stream

    @rule(stream=streams)
    def read(self, stream: Stream) -> None:
        if not stream.over:
            self._read(stream)

    @rule(stream=consumes(streams))
    def finish(self, stream: Stream) -> None:
        self._finish(stream)

    @rule(stream=consumes(streams))
    def cancel(self, stream: Stream) -> None:
        if not stream.over:
            self.run(stream.outputs.aclose())
            self._ended(stream)

    # What must hold.

    @invariant()
    def the_engine_lives(self) -> None:
        assert self.engine.ready
        if self.merged is not None:
            assert self.engine.merging.is_merged(self.merged.generation)

    def teardown(self) -> None:
        for stream in list(self.running):
            self._finish(stream)
        for task in self.unloading:
            self.run(task)
        self._finish(Stream("", "", self.engine.generate(PROMPT, PARAMS, {})))
        assert self.engine.adapters.num_bytes == sum(adapter.num_bytes for adapter in self.adapters.values())
        for name in self.meaning:
            self.run(self.engine.adapters.unload(name))
        assert self.engine.adapters.num_bytes == self.engine.merging.num_bytes == 0
        assert not any(self.engine.is_on_device(adapter) for adapter in self.adapters.values())

    def _read(self, stream: Stream) -> None:
        output = self.run(anext(stream.outputs))
        stream.generation = output.adapters[0].generation if output.adapters else 0
        stream.tokens += output.token_ids
        assert stream.tokens == self.expected[stream.content][: len(stream.tokens)]
        if output.finish_reason is not None:
            self.run(stream.outputs.aclose())
            assert stream.tokens == self.expected[stream.content]
            self._ended(stream)

    def _finish(self, stream: Stream, *, revoked: bool = False) -> None:
        try:
            while not stream.over:
                self._read(stream)
        except AdapterUnloaded:
            assert revoked
            self._ended(stream)

    def _ended(self, stream: Stream) -> None:
        stream.over = True
        if stream in self.running:
            self.running.remove(stream)

    def _lost(self, name: str) -> None:
        """A generation has lost its name: it is taken out of the base as soon as nobody runs on it."""
        if self.merged is not None and self.adapters.get(name) is self.merged:
            self.merged = None


def test_random_lives(model_dir: Path, tmp_path: Path) -> None:
    for seed, (content, targets) in enumerate(CONTENTS.items()):
        save_adapter(tiny_llama(), tmp_path / content, seed, r=4, target_modules=targets)
    shutil.copytree(tmp_path / "one", tmp_path / BROKEN)
    (tmp_path / BROKEN / "adapter_model.safetensors").write_bytes(b"\0" * 100)
    engine_config = EngineConfig(
        model=str(model_dir), device="cpu", dtype="float32", adapter_slots=2, merge_policy="manual"
    )
    config = ServerConfig(adapters_dir=tmp_path, adapter_poll_seconds=0)
    parts = build_engine(engine_config)
    with asyncio.Runner() as runner:
        context = running_engine(engine_config, config, parts, Metrics(CollectorRegistry()))
        Lives.loop, Lives.engine = runner.get_loop(), runner.run(context.__aenter__())
        try:
            Lives.expected = runner.run(_answers(Lives.engine))
            assert len({tuple(tokens) for tokens in Lives.expected.values()}) == len(CONTENTS) + 1
            run_state_machine_as_test(
                Lives,
                settings=settings(
                    max_examples=60,
                    stateful_step_count=30,
                    deadline=None,
                    derandomize=True,
                    suppress_health_check=list(HealthCheck),
                ),
            )
        finally:
            runner.run(context.__aexit__(None, None, None))


async def _answers(engine: AsyncEngine) -> dict[str, list[int]]:
    """What the base and each content say to the prompt, each alone."""
    answers: dict[str, list[int]] = {}
    for content in ("", *CONTENTS):
        outputs = engine.generate(PROMPT, PARAMS, {content: 1.0} if content else {})
        answers[content] = [token async for output in outputs for token in output.token_ids]
        if content:
            await engine.adapters.unload(content)
    return answers

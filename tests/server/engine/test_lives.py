"""Random lives of adapters on a running engine: whatever operators do, every stream says what its adapter says.

The model knows what each name means, who runs on what, and what is merged. How names and memory go together is
`tests.server.lora.test_life`'s; this is about tokens.
"""

import asyncio
import shutil
from collections.abc import AsyncGenerator, Sequence
from itertools import chain, product
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
from server.engine.answer import GenerationOutput
from server.engine.async_engine import AsyncEngine
from server.engine.build import build_engine
from server.engine.request import SamplingParams
from server.errors import AdapterExists, AdapterInUse, AdapterNotFound, AdapterUnloaded, InvalidAdapter
from server.lora.adapter import Adapter
from server.lora.unload_mode import UnloadMode
from server.metrics import Metrics
from server.serve import running_engine
from tests.conftest import save_adapter, tiny_llama

NAMES = ("a", "b", "c")
CONTENTS = {"one": ["q_proj", "v_proj"], "two": ["o_proj", "down_proj"]}  # and what they adapt
BROKEN = "broken"  # a content that is refused
NUM_SLOTS = 2
PROMPT = list(range(40, 60))  # over a block of the prefix cache
PARAMS = SamplingParams(max_tokens=16, ignore_eos=True)

names = st.sampled_from(NAMES)


class Stream:
    """A request that runs, and the adapters whose tokens it must give to its end."""

    def __init__(self, names: Sequence[str], contents: str, outputs: AsyncGenerator[GenerationOutput, None]) -> None:
        self.names = names
        self.contents = contents
        self.outputs = outputs
        self.generations: list[int] = []  # of its adapters
        self.tokens: list[int] = []
        self.over = False


class Lives(RuleBasedStateMachine):
    streams = Bundle("streams")
    # Set by the test: one engine for all lives.
    loop: asyncio.AbstractEventLoop
    engine: AsyncEngine
    expected: dict[str, list[int]]  # by contents; "" is the base model, "one+two" their sum

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
        users = [stream for stream in self.running if name in stream.names]
        on_current = [stream for stream in users if self.generation(name) in stream.generations]
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

    @rule(target=streams, wanted=st.lists(names, unique=True, max_size=NUM_SLOTS))
    def begin(self, wanted: list[str]) -> Any:
        """On the base, an adapter, or the sum of several."""
        contents = "+".join(self.meaning.get(name, "") for name in wanted)
        stream = Stream(wanted, contents, self.engine.generate(PROMPT, PARAMS, _weights(wanted)))
        try:
            self._read(stream)
        except AdapterNotFound:
            assert not self.meaning.keys() >= {*wanted}
            stream.over = True
        else:
            assert stream.generations == [self.generation(name) for name in wanted]
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
        self._finish(Stream((), "", self.engine.generate(PROMPT, PARAMS, {})))
        assert self.engine.adapters.num_bytes == sum(adapter.num_bytes for adapter in self.adapters.values())
        for name in self.meaning:
            self.run(self.engine.adapters.unload(name))
        assert self.engine.adapters.num_bytes == self.engine.merging.num_bytes == 0
        assert not any(self.engine.is_on_device(adapter) for adapter in self.adapters.values())

    def _read(self, stream: Stream) -> None:
        output = self.run(anext(stream.outputs))
        stream.generations = [identity.generation for identity in output.adapters]
        stream.tokens += output.token_ids
        assert stream.tokens == self.expected[stream.contents][: len(stream.tokens)]
        if output.finish_reason is not None:
            self.run(stream.outputs.aclose())
            assert stream.tokens == self.expected[stream.contents]
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
        model=str(model_dir), device="cpu", dtype="float32", adapter_slots=NUM_SLOTS, merge_policy="manual"
    )
    config = ServerConfig(adapters_dir=tmp_path, adapter_poll_seconds=0)
    parts = build_engine(engine_config)
    with asyncio.Runner() as runner:
        context = running_engine(engine_config, config, parts, Metrics(CollectorRegistry()))
        Lives.loop, Lives.engine = runner.get_loop(), runner.run(context.__aenter__())
        try:
            Lives.expected = runner.run(_answers(Lives.engine))
            assert len({tuple(tokens) for tokens in Lives.expected.values()}) == len(Lives.expected)
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
    """What the base, each content and each sum of them say to the prompt, each alone."""
    answers: dict[str, list[int]] = {}
    for contents in chain.from_iterable(product(CONTENTS, repeat=count) for count in range(NUM_SLOTS + 1)):
        loaded = NAMES[: len(contents)]
        for name, content in zip(loaded, contents, strict=True):
            await engine.adapters.load(name, content)
        outputs = engine.generate(PROMPT, PARAMS, _weights(loaded))
        answers["+".join(contents)] = [token async for output in outputs for token in output.token_ids]
        for name in loaded:
            await engine.adapters.unload(name)
    return answers


def _weights(names: Sequence[str]) -> dict[str, float]:
    """Several are summed, the first times a half: so they answer like none of them alone."""
    return {name: 0.5 if index == 0 and len(names) > 1 else 1.0 for index, name in enumerate(names)}

"""Answers whose clients read late, or never: they grow at the engine's pace, and hold nothing once they have ended."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import ExitStack, aclosing
from dataclasses import dataclass
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry

from server.config import EngineConfig, ServerConfig
from server.engine.answer import Answer
from server.engine.async_engine import AsyncEngine
from server.engine.build import EngineParts, build_engine
from server.engine.request import FinishReason, Request, SamplingParams, TokenOutput
from server.metrics import Metrics, RequestTimer
from server.serve import running_engine
from tests.conftest import byte_tokenizer

PROMPT = [1, 2, 3]


@dataclass(frozen=True)
class Served:
    engine: AsyncEngine
    parts: EngineParts
    metrics: Metrics

    def count(self, name: str, **labels: str) -> float:
        return self.metrics.registry.get_sample_value(f"loraplex_{name}", labels) or 0


@pytest.fixture
async def served(model_dir: Path, tmp_path: Path) -> AsyncIterator[Served]:
    engine_config = EngineConfig(model=str(model_dir), device="cpu", dtype="float32")
    parts, metrics = build_engine(engine_config), Metrics(CollectorRegistry())
    async with running_engine(engine_config, ServerConfig(adapters_dir=tmp_path), parts, metrics) as engine:
        yield Served(engine, parts, metrics)


async def test_what_nobody_reads_gives_its_place_back(served: Served) -> None:
    params = SamplingParams(max_tokens=20, ignore_eos=True)
    async with aclosing(served.engine.generate(PROMPT, params, {})) as outputs:
        first = await anext(outputs)
        assert await served.engine.admission.drain(grace=5)
        assert served.count("requests_total", finish_reason="length") == 1
        read = [first, *[output async for output in outputs]]
        assert len(read) <= 2  # all that came meanwhile at once
        assert sum(len(output.token_ids) for output in read) == read[-1].num_output_tokens == 20
        assert read[-1].finish_reason is FinishReason.LENGTH
    assert served.count("requests_total", finish_reason="length") == 1


async def test_a_stop_string_ends_what_nobody_reads(served: Served) -> None:
    async with aclosing(served.engine.generate(PROMPT, SamplingParams(max_tokens=200, ignore_eos=True), {})) as outputs:
        whole = "".join([output.text async for output in outputs])
    stop = whole[5:7]
    params = SamplingParams(max_tokens=200, ignore_eos=True, stop=(stop,))
    before = served.count("step_seconds_count")
    async with aclosing(served.engine.generate(PROMPT, params, {})) as outputs:
        read = [await anext(outputs)]
        async with asyncio.timeout(5):
            while served.parts.scheduler.has_work:
                await asyncio.sleep(0.001)
        assert served.count("step_seconds_count") - before < 150
        read += [output async for output in outputs]
        assert read[-1].finish_reason is FinishReason.STOP
        assert "".join([output.text for output in read]) == whole[: whole.index(stop)]


async def test_what_cannot_be_read_is_told_to_its_reader_alone() -> None:
    """A token that no text can be made of."""
    metrics = Metrics(CollectorRegistry())
    timers = [RequestTimer(metrics, len(PROMPT)) for _ in range(2)]
    answers = [
        Answer(
            Request(number, PROMPT, SamplingParams(), (), frozenset()),
            byte_tokenizer(),
            timer,
            ExitStack(),
        )
        for number, timer in enumerate(timers)
    ]
    for answer, token_id in zip(answers, (-1, 40), strict=True):
        answer.put(TokenOutput(0, token_id))
    assert [answer.ended for answer in answers] == [True, False]
    assert timers[0].outcome == "error"
    with pytest.raises(OverflowError):
        await answers[0].read()
    assert (await answers[1].read()).token_ids == [40]

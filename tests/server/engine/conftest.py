"""An engine without threads, and PEFT's answers to hold it against."""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft.tuners.lora import LoraLayer
from prometheus_client import CollectorRegistry
from transformers import PreTrainedModel

from adapters.format import read_adapter
from server.config import EngineConfig
from server.engine.build import build_engine
from server.engine.commands import Merge, MergeDone, Submit
from server.engine.core import EngineCore
from server.engine.forward_batch import ForwardBatch
from server.engine.merge_policy import MergeCosts, MergePolicy
from server.engine.request import Request, SamplingParams, TokenOutput
from server.engine.scheduler import ScheduledBatch, Scheduler
from server.lora.adapter import Adapter, WeightedAdapter
from server.metrics import Metrics
from tests.conftest import ADAPTERS, VOCAB_SIZE, tiny_llama

collect_ignore = [] if torch.cuda.is_available() else ["test_on_cuda.py"]


class Engine:
    """Steps an engine by hand."""

    def __init__(self, model: Path, **settings: Any) -> None:
        self.parts = build_engine(
            EngineConfig(**{"model": str(model), "device": "cpu", "dtype": "float32", **settings})
        )
        self._generation = 0
        self.restart(self.parts.scheduler)

    def restart(self, scheduler: Scheduler) -> None:
        """Goes on with another scheduler and no requests; slots and KV cache still hold what they were left with."""
        self.parts = replace(self.parts, scheduler=scheduler)
        self.metrics = Metrics(CollectorRegistry())
        self.core = EngineCore(self.parts.runner, scheduler, self.metrics, self.parts.merge_policy)
        self.core.connect(self._collect)
        self.outputs: dict[int, list[TokenOutput]] = {}

    def _collect(self, outputs: list[TokenOutput]) -> None:
        for output in outputs:
            self.outputs.setdefault(output.request_id, []).append(output)

    def submit(self, prompt: list[int], on: Adapter | Sequence[WeightedAdapter] | None = None, **params: Any) -> int:
        """`on`: nothing for the base model, an adapter, or a mixture."""
        request_id = len(self.outputs)
        self.outputs[request_id] = []
        settings = SamplingParams(**{"max_tokens": 12, **params})
        adapters = [WeightedAdapter(on)] if isinstance(on, Adapter) else on or []
        self.core.put(Submit(Request(request_id, prompt, settings, adapters, settings.stop_token_ids)))
        return request_id

    def run(self) -> None:
        self.core.step()
        while self.parts.scheduler.has_work:
            self.core.step()

    def merge(self, adapter: Adapter | None) -> float:
        done: Future[MergeDone] = Future()
        self.core.put(Merge(adapter, done))
        self.core.step()
        return done.result().seconds

    def tokens(self, request_id: int) -> list[int]:
        return [output.token_id for output in self.outputs[request_id] if output.token_id is not None]

    def generate(
        self, work: Sequence[tuple[list[int], Adapter | Sequence[WeightedAdapter] | None]], **params: Any
    ) -> list[list[int]]:
        """Submits everything at once and runs it to the end."""
        ids = [self.submit(prompt, on, **params) for prompt, on in work]
        self.run()
        assert self.parts.scheduler.allocator.num_free == self.parts.num_blocks
        return [self.tokens(request_id) for request_id in ids]

    def watch_logits(self, see: Callable[[int, torch.Tensor], None]) -> None:
        """Calls `see` with each request's id and logits as they are sampled from."""
        run = self.parts.runner.run

        def watched(batch: ScheduledBatch, computing: Callable[[], None]) -> Any:
            ids = [item.request.request_id for item in batch.requests if item.samples]
            forward = self.parts.runner.forward

            def forward_and_see(tensors: ForwardBatch) -> torch.Tensor:
                logits = forward(tensors)
                for request_id, row in zip(ids, logits, strict=True):
                    see(request_id, row)
                return logits

            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(self.parts.runner, "forward", forward_and_see)
                return run(batch, computing)

        self.parts.runner.run = watched  # type: ignore[assignment, method-assign]

    def load(self, folder: Path) -> Adapter:
        self._generation += 1
        files = read_adapter(folder, self.parts.base.linear_layers, max_rank=64)
        base = self.parts.runner.lora.base_weights
        return Adapter.from_files(files, folder.name, "1", self._generation, base, self.parts.lora_dtype)


def eager_policy() -> MergePolicy:
    """Merges whatever runs alone after a step or two: bypasses cost a second, and a merge nothing."""
    policy = MergePolicy(MergeCosts([(1, 1.0), (64, 2.0)], merge_seconds=1e-9, adapter_bytes=1))
    policy._worked = 1.0
    return policy


@pytest.fixture(scope="session")
def prompts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(1)
    lengths = torch.randint(1, 60, (16,), generator=generator).tolist()
    return [torch.randint(VOCAB_SIZE, (length,), generator=generator).tolist() for length in lengths]


@pytest.fixture(scope="session")
def reference(adapters_dir: Path) -> peft.PeftModel:
    """PEFT's model with every adapter of the session loaded."""
    return peft_model(tiny_llama(), adapters_dir)


def peft_model(base: PreTrainedModel, adapters_dir: Path) -> peft.PeftModel:
    """PEFT on a base of its own, with every adapter loaded."""
    names = list(ADAPTERS)
    model = peft.PeftModel.from_pretrained(base, str(adapters_dir / names[0]), adapter_name=names[0])
    for name in names[1:]:
        model.load_adapter(str(adapters_dir / name), adapter_name=name)
    return model.eval()


@contextlib.contextmanager
def peft_mixture(model: peft.PeftModel, weights: Mapping[str, float]) -> Iterator[None]:
    """Within, PEFT sums several adapters, each times its weight."""
    model.base_model.set_adapter(list(weights))  # type: ignore[operator]
    scaled = [
        (module.scaling, name, module.scaling[name], weight)
        for module in model.modules()
        if isinstance(module, LoraLayer)
        for name, weight in weights.items()
        if name in module.scaling
    ]
    for scaling, name, value, weight in scaled:
        scaling[name] = value * weight
    try:
        yield
    finally:
        for scaling, name, value, _ in scaled:
            scaling[name] = value


@torch.inference_mode()
def peft_logits(model: peft.PeftModel, token_ids: list[int], name: str | None) -> torch.Tensor:
    """[num_tokens, vocab_size] of PEFT's own forward; the empty name is the base, None is what is active already."""
    if name is not None:
        model.set_adapter(name or next(iter(ADAPTERS)))
    with model.disable_adapter() if name == "" else contextlib.nullcontext():
        logits: torch.Tensor = model(torch.tensor([token_ids])).logits[0]
    return logits


def peft_greedy(model: peft.PeftModel, prompt: list[int], name: str | None, num_tokens: int) -> list[int]:
    token_ids = list(prompt)
    for _ in range(num_tokens):
        token_ids.append(int(peft_logits(model, token_ids, name)[-1].argmax()))
    return token_ids[len(prompt) :]

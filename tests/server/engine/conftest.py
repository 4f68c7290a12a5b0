"""An engine without threads, and PEFT's answers to hold it against."""

import contextlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from prometheus_client import CollectorRegistry

from adapters.format import read_adapter
from server.config import EngineConfig
from server.engine.build import build_engine
from server.engine.core import EngineCore, Submit
from server.engine.forward_batch import ForwardBatch
from server.engine.request import Request, SamplingParams, TokenOutput
from server.engine.scheduler import ScheduledBatch
from server.lora.adapter import Adapter
from server.metrics import Metrics
from tests.conftest import ADAPTERS, VOCAB_SIZE, tiny_llama


class Engine:
    """Steps an engine by hand."""

    def __init__(self, model: Path, **settings: Any) -> None:
        self.parts = build_engine(EngineConfig(model=str(model), device="cpu", **{"dtype": "float32", **settings}))
        self.metrics = Metrics(CollectorRegistry())
        self.core = EngineCore(self.parts.runner, self.parts.scheduler, self.metrics)
        self.core.connect(self._collect)
        self._generation = 0
        self.outputs: dict[int, list[TokenOutput]] = {}

    def _collect(self, outputs: list[TokenOutput]) -> None:
        for output in outputs:
            self.outputs.setdefault(output.request_id, []).append(output)

    def submit(self, prompt: list[int], adapter: Adapter | None = None, **params: Any) -> int:
        request_id = len(self.outputs)
        self.outputs[request_id] = []
        settings = SamplingParams(**{"max_tokens": 12, **params})
        self.core.put(Submit(Request(request_id, prompt, settings, adapter, settings.stop_token_ids)))
        return request_id

    def run(self) -> None:
        self.core.step()
        while self.parts.scheduler.has_work:
            self.core.step()

    def tokens(self, request_id: int) -> list[int]:
        return [output.token_id for output in self.outputs[request_id] if output.token_id is not None]

    def generate(self, work: Sequence[tuple[list[int], Adapter | None]], **params: Any) -> list[list[int]]:
        """Submits everything at once and runs it to the end."""
        ids = [self.submit(prompt, adapter, **params) for prompt, adapter in work]
        self.run()
        assert self.parts.scheduler.allocator.num_free == self.parts.num_blocks
        return [self.tokens(request_id) for request_id in ids]

    def watch_logits(self, see: Callable[[int, torch.Tensor], None]) -> None:
        """Calls `see` with each request's id and logits as they are sampled from."""
        run = self.parts.runner.run

        def watched(batch: ScheduledBatch) -> Any:
            ids = [item.request.request_id for item in batch.requests if item.samples]
            forward = self.parts.runner.forward

            def forward_and_see(tensors: ForwardBatch) -> torch.Tensor:
                logits = forward(tensors)
                for request_id, row in zip(ids, logits, strict=True):
                    see(request_id, row)
                return logits

            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(self.parts.runner, "forward", forward_and_see)
                return run(batch)

        self.parts.runner.run = watched  # type: ignore[method-assign]

    def load(self, folder: Path) -> Adapter:
        self._generation += 1
        files = read_adapter(folder, self.parts.base.linear_layers, max_rank=64)
        return Adapter.from_files(files, folder.name, "1", self._generation)


@pytest.fixture(scope="session")
def prompts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(1)
    lengths = torch.randint(1, 60, (16,), generator=generator).tolist()
    return [torch.randint(VOCAB_SIZE, (length,), generator=generator).tolist() for length in lengths]


@pytest.fixture(scope="session")
def reference(adapters_dir: Path) -> peft.PeftModel:
    """PEFT's model with every adapter of the session loaded."""
    names = list(ADAPTERS)
    model = peft.PeftModel.from_pretrained(tiny_llama(), str(adapters_dir / names[0]), adapter_name=names[0])
    for name in names[1:]:
        model.load_adapter(str(adapters_dir / name), adapter_name=name)
    return model.eval()


@torch.inference_mode()
def peft_logits(model: peft.PeftModel, token_ids: list[int], name: str) -> torch.Tensor:
    """[num_tokens, vocab_size] of PEFT's own forward; the empty name is the base."""
    model.set_adapter(name or next(iter(ADAPTERS)))
    with contextlib.nullcontext() if name else model.disable_adapter():
        logits: torch.Tensor = model(torch.tensor([token_ids])).logits[0]
    return logits


def peft_greedy(model: peft.PeftModel, prompt: list[int], name: str, num_tokens: int) -> list[int]:
    token_ids = list(prompt)
    for _ in range(num_tokens):
        token_ids.append(int(peft_logits(model, token_ids, name)[-1].argmax()))
    return token_ids[len(prompt) :]

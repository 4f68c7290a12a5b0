"""What CUDA runs, on the CPU: flash attention by a stand-in, Triton's kernels interpreted, graphs recorded."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from server.device import Device
from server.engine import build
from server.engine.attention import PagedCache
from server.engine.cuda_kv_cache import CudaKVCache
from server.engine.fixed_shapes import FixedShapes
from server.engine.kv_cache import KVShape, TorchKVCache
from server.lora.adapter import WeightedAdapter
from tests.server.engine.conftest import Engine
from tests.server.engine.recording import Recorder
from tests.server.engine.varlen import varlen_attn
from tests.server.kernels.interpreted import interpreted_triton_ops

CPU = torch.device("cpu")
SETTINGS = {"max_num_seqs": 3, "adapter_slots": 2, "max_model_len": 96}


class CudaStandIn(Device):
    """Chooses as on CUDA; the tensors are float32 on the CPU."""

    def block_size(self, shape: KVShape) -> int:
        return CudaKVCache.page_size

    def fixed_shapes(self, shape: KVShape, block_size: int) -> bool:
        return True

    def paged_cache(self, shape: KVShape, num_blocks: int, block_size: int) -> PagedCache:
        return CudaKVCache(shape, num_blocks, block_size, self.dtype, self.torch_device, varlen_attn)


@dataclass(frozen=True)
class Cuda:
    engine: Engine
    recorder: Recorder
    launched: list[str]  # names of the kernels, in order


@pytest.fixture
def cuda(model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Cuda]:
    recorder = Recorder()
    with interpreted_triton_ops() as module, recorder.kernels(module, "shrink", "expand", "embed") as launched:
        device = CudaStandIn(CPU, torch.float32, "float32", module.triton_kernels(CPU, torch.float32, 64), native=False)
        monkeypatch.setattr(build, "pick_device", lambda _: device)
        engine = Engine(model_dir, **SETTINGS)
        engine.parts.runner.capture_graphs(recorder)
        yield Cuda(engine, recorder, launched)


@pytest.fixture
def plain(model_dir: Path) -> Engine:
    return Engine(model_dir, kernels="torch", **SETTINGS)


def test_replayed_steps_give_the_same_tokens(
    cuda: Cuda, plain: Engine, adapters_dir: Path, prompts: list[list[int]]
) -> None:
    """Requests end one after another, so sizes change; slots are written again after the graphs were captured."""
    for names in (
        ["", "plain"],
        ["", "rslora", "head"],
        ["", "dora-ends", "embedding"],
        ["", "dora", "lora-bias"],
        ["", "", ""],
    ):
        answers = []
        for engine in (cuda.engine, plain):
            ids = [
                engine.submit(prompts[row], engine.load(adapters_dir / name) if name else None, max_tokens=3 + row)
                for row, name in enumerate(names)
            ]
            engine.run()
            answers.append([engine.tokens(request_id) for request_id in ids])
        assert answers[0] == answers[1], names
    assert all(cuda.recorder.num_replays)


def test_what_no_graph_holds_runs_without(
    cuda: Cuda, plain: Engine, adapters_dir: Path, prompts: list[list[int]]
) -> None:
    """Several bypasses for a token, or other weights in the base."""
    answers = []
    for engine in (cuda.engine, plain):
        one, other = (engine.load(adapters_dir / name) for name in ("plain", "attention"))
        mixture = [WeightedAdapter(one, 0.5), WeightedAdapter(other, -1.0)]
        tokens = engine.generate([(prompts[0], mixture)], max_tokens=3)
        engine.parts.runner.merge(one)
        tokens += engine.generate([(prompts[0], one), (prompts[1], None)], max_tokens=3)
        answers.append(tokens)
    assert answers[0] == answers[1]
    assert not any(cuda.recorder.num_replays)
    for engine in (cuda.engine, plain):
        engine.parts.runner.merge(None)
    again = [engine.generate([(prompts[1], None)], max_tokens=3) for engine in (cuda.engine, plain)]
    assert again[0] == again[1]
    assert sum(cuda.recorder.num_replays) == 3  # a prompt of one token is a decode step too


def test_warming_up_launches_every_kernel(cuda: Cuda) -> None:
    del cuda.launched[:]
    cuda.engine.parts.runner.warm_up()
    num_groups = len(cuda.engine.parts.base.linear_groups)
    assert cuda.launched == ["embed", *["shrink", "expand"] * num_groups]


def test_what_a_graph_cannot_hold_is_not_recorded_here_either(plain: Engine) -> None:
    """Plain attention reads lengths on the host, so nothing of it is captured on CUDA."""
    runner = plain.parts.runner
    assert isinstance(runner.cache, TorchKVCache)
    step = FixedShapes(max_num_seqs=1, max_blocks=1, block_size=16, padding_block=0, device=CPU).step(1)
    with pytest.raises(AssertionError, match="cannot be captured"):
        Recorder()(lambda: runner.forward(step))

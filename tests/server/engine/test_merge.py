"""An adapter merged into the base: everybody's tokens stay the same."""

from concurrent.futures import Future
from itertools import cycle, islice
from pathlib import Path

import peft
import pytest

from server.engine import merge_policy
from server.engine.commands import Evict
from server.engine.model_runner import ModelRunner
from server.errors import ConfigError
from server.kernels import native
from server.lora.adapter import Adapter, WeightedAdapter
from tests.conftest import ADAPTERS
from tests.server.engine.conftest import Engine, eager_policy, peft_greedy, peft_mixture

NUM_TOKENS = 12
NAMES = ["", *ADAPTERS]
BLOCK_BYTES = 16 * 2 * 2 * 2 * 16 * 4  # block_size · (K, V) · layers · KV heads · head size · float32


@pytest.fixture(params=["native", "torch"])
def engine(model_dir: Path, request: pytest.FixtureRequest) -> Engine:
    if request.param == "native" and not native.available():
        pytest.skip("the native kernels are not built")
    return Engine(model_dir, kernels="torch" if request.param == "torch" else "auto")


@pytest.fixture
def adapters(engine: Engine, adapters_dir: Path) -> dict[str, Adapter]:
    return {name: engine.load(adapters_dir / name) for name in ADAPTERS}


@pytest.fixture(scope="module")
def expected(reference: peft.PeftModel, prompts: list[list[int]]) -> list[list[int]]:
    return [
        peft_greedy(reference, prompt, name, NUM_TOKENS) for prompt, name in zip(prompts, cycle(NAMES), strict=False)
    ]


def test_everybody_answers_as_before(
    engine: Engine,
    adapters: dict[str, Adapter],
    prompts: list[list[int]],
    expected: list[list[int]],
    reference: peft.PeftModel,
) -> None:
    """Each adapter in turn is merged; it, the others, the base and mixtures run in the same batch."""
    work = [(prompt, adapters.get(name)) for prompt, name in zip(prompts, cycle(NAMES), strict=False)]
    with peft_mixture(reference, {"plain": 0.7, "rslora": -0.5}):
        mixture_expected = peft_greedy(reference, prompts[0], None, NUM_TOKENS)
    mixture = [WeightedAdapter(adapters["plain"], 0.7), WeightedAdapter(adapters["rslora"], -0.5)]
    for adapter in adapters.values():
        assert engine.merge(adapter) > 0
        assert engine.core.merged is adapter
        assert engine.generate([*work, (prompts[0], mixture)]) == [*expected, mixture_expected], adapter.name


def test_merging_in_the_middle_of_requests(
    engine: Engine, adapters: dict[str, Adapter], prompts: list[list[int]], expected: list[list[int]]
) -> None:
    """K and V computed in one mode serve the other."""
    ids = [engine.submit(prompt, adapters.get(name)) for prompt, name in zip(prompts, cycle(NAMES), strict=False)]
    for adapter in islice(cycle([adapters["plain"], None, adapters["head"], adapters["rslora"]]), NUM_TOKENS):
        engine.merge(adapter)  # which takes a step too
    engine.run()
    assert [engine.tokens(request_id) for request_id in ids] == expected


@pytest.mark.parametrize("kernels", ["auto", "torch"])
@pytest.mark.parametrize("switches", [["plain"], ["plain", None, "head", "dora"]], ids=["merged", "switching"])
def test_preemption_while_merged(
    model_dir: Path,
    adapters_dir: Path,
    prompts: list[list[int]],
    expected: list[list[int]],
    kernels: str,
    switches: list[str | None],
) -> None:
    """Whoever gives its blocks back computes them again, perhaps with another adapter merged than before."""
    engine = Engine(model_dir, kernels=kernels, block_size=16, kv_cache_bytes=16 * BLOCK_BYTES)
    adapters = {name: engine.load(adapters_dir / name) for name in ADAPTERS}
    work = [(prompt, adapters.get(name)) for prompt, name in zip(prompts, cycle(NAMES), strict=False)]
    ids = [engine.submit(prompt, on) for prompt, on in work]
    wanted = cycle(switches)
    engine.core.step()
    while engine.parts.scheduler.has_work:
        name = next(wanted)
        engine.merge(adapters[name] if name else None)  # which takes a step too
    assert engine.parts.scheduler.num_preemptions > 0
    assert [engine.tokens(request_id) for request_id in ids] == expected


def test_memory_of_the_sums_is_counted_and_given_back(engine: Engine, adapters: dict[str, Adapter]) -> None:
    lora = engine.parts.runner.lora

    def sums(adapter: Adapter) -> int:
        shapes = [engine.parts.base.linear_layers[name] for name in adapter.weights]
        return sum(4 * shape.in_features * shape.out_features for shape in shapes)

    engine.merge(adapters["attention"])
    assert lora.merged_bytes == sums(adapters["attention"])
    engine.merge(adapters["dora"])
    # Beside its sums lies what takes them away: one over the gain, and B times the gain.
    dora = adapters["dora"].weights.values()
    assert lora.merged_bytes == sums(adapters["dora"]) + sum(
        layer.lora_b.nbytes + 4 * layer.lora_b.shape[1] for layer in dora
    )
    engine.merge(None)
    assert lora.merged_bytes == 0
    assert engine.core.merged is None


def test_every_switch_is_told_also_one_that_fails(
    engine: Engine, adapters: dict[str, Adapter], monkeypatch: pytest.MonkeyPatch
) -> None:
    heard: list[tuple[Adapter | None, Adapter | None]] = []
    monkeypatch.setattr(engine.core, "_switched", lambda *switch: heard.append(switch))
    plain, attention = adapters["plain"], adapters["attention"]
    for adapter in (plain, plain, attention, None, None, plain):
        engine.merge(adapter)
    _, last = engine.parts.runner.lora.groups[-1]
    with monkeypatch.context() as patch:
        patch.setattr(last, "merge", lambda weights: (_ for _ in ()).throw(MemoryError("no room")))
        with pytest.raises(MemoryError):
            engine.merge(attention)
    assert heard == [(plain, None), (attention, plain), (None, attention), (plain, None), (None, plain)]


def test_an_adapter_that_goes_is_unmerged(
    engine: Engine, adapters: dict[str, Adapter], prompts: list[list[int]], expected: list[list[int]]
) -> None:
    engine.merge(adapters["plain"])
    engine.core.put(Evict(adapters["plain"], Future()))
    assert engine.generate([(prompts[0], None)]) == expected[:1]
    assert engine.core.merged is None
    assert engine.parts.runner.lora.merged is None


@pytest.mark.skipif(not native.available(), reason="the native kernels are not built")
def test_half_width_weights(model_dir: Path, adapters_dir: Path, prompts: list[list[int]]) -> None:
    """Sums are rounded to the storage, so answers may part at near ties; first tokens must agree."""
    engine = Engine(model_dir, dtype="bfloat16")
    adapters = [engine.load(adapters_dir / name) for name in ("plain", "head")]
    work = [(prompt, adapters[index % 2]) for index, prompt in enumerate(prompts)]
    bypass = engine.generate(work, max_tokens=1)
    engine.merge(adapters[0])
    assert sum(a == b for a, b in zip(engine.generate(work, max_tokens=1), bypass, strict=True)) >= len(work) - 1


def test_auto_merges_what_runs_alone(
    model_dir: Path,
    adapters_dir: Path,
    prompts: list[list[int]],
    expected: list[list[int]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Whatever was measured, told to the policy as costs that make a merge worth its while, and one not."""
    monkeypatch.setattr(merge_policy, "MAX_COMPARED_TOKENS", 0)  # the times of tiny steps say nothing
    engine = Engine(model_dir, merge_policy="auto")
    plain = engine.load(adapters_dir / "plain")
    measured = engine.parts.merge_policy
    assert measured is not None
    assert measured.costs.merge_seconds > 0
    engine.core._merge_policy = eager_policy()
    alone = engine.generate([(prompts[1], plain)] * 3)
    assert engine.core.merged is plain
    assert alone == [expected[1]] * 3
    work = [(prompt, plain if name == "plain" else None) for prompt, name in zip(prompts, cycle(NAMES), strict=False)]
    mixed = engine.generate(work)
    assert engine.core.merged is None
    assert [mixed[0], mixed[1]] == [expected[0], expected[1]]


def test_auto_needs_weights_that_take_a_sum(model_dir: Path) -> None:
    if not native.available():
        pytest.skip("the native kernels are not built")
    with pytest.raises(ConfigError, match=r"--merge-policy auto.*quantized"):
        Engine(model_dir, merge_policy="auto", quantization="int8")


def test_auto_is_refused_where_a_merge_ends_the_graphs(model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ModelRunner, "replays_graphs", True)
    with pytest.raises(ConfigError, match=r"--merge-policy auto.*--no-cuda-graphs"):
        Engine(model_dir, merge_policy="auto")


def test_a_merge_that_fails_leaves_the_engine_as_it_was(
    model_dir: Path, adapters_dir: Path, prompts: list[list[int]], expected: list[list[int]], engine: Engine
) -> None:
    plain = engine.load(adapters_dir / "plain")
    _, last = engine.parts.runner.lora.groups[-1]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(last, "merge", lambda weights: (_ for _ in ()).throw(MemoryError("no room")))
        with pytest.raises(MemoryError):
            engine.merge(plain)
        engine.core._merge_policy = eager_policy()
        assert engine.generate([(prompts[1], plain)]) == [expected[1]]
    assert engine.core._merge_policy is None
    assert engine.core.merged is engine.parts.runner.lora.merged is None
    assert engine.generate([(prompts[0], None)]) == [expected[0]]


def test_auto_keeps_nothing_of_an_adapter_that_goes(
    engine: Engine, adapters: dict[str, Adapter], prompts: list[list[int]]
) -> None:
    policy = engine.core._merge_policy = eager_policy()
    engine.generate([(prompts[1], adapters["plain"])])
    assert engine.core.merged is policy._favourite is adapters["plain"]
    engine.core.put(Evict(adapters["plain"], Future()))
    engine.core.step()
    assert engine.core.merged is policy._favourite is None

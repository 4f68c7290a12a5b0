"""Adapters that are more than A and B, on a base with biases and tied embeddings: equal to PEFT, mixed in one batch."""

import shutil
from pathlib import Path
from typing import Any

import peft
import pytest
import safetensors.torch
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from adapters.errors import AdapterIncompatibleError
from adapters.format import read_adapter
from server.engine.forward_batch import ForwardBatch, MergedAdapter, build_forward_batch
from server.engine.model import prepare_base_model
from server.engine.request import Request, SamplingParams
from server.engine.scheduler import ScheduledRequest
from server.errors import InvalidRequest
from server.kernels import native
from server.lora.adapter import Adapter, WeightedAdapter
from tests.conftest import EOS, VOCAB_SIZE, save_adapter, save_base
from tests.server.engine.conftest import Engine
from tests.server.engine.test_model import CPU, SERVED, tiny, torch_runner

NUM_TOKENS = 10
INVOCATION = [7, 9]

ADAPTERS: dict[str, dict[str, Any]] = {
    "plain": {"target_modules": "all-linear"},
    "bias": {"target_modules": ["q_proj", "v_proj", "up_proj"], "bias": "lora_only"},
    "all biases": {"target_modules": ["q_proj"], "bias": "all"},
    "DoRA": {"target_modules": ["q_proj", "o_proj", "down_proj"], "use_dora": True, "use_rslora": True},
    "DoRA and bias": {"target_modules": ["v_proj", "gate_proj"], "use_dora": True, "bias": "all"},
    "bias of B": {"target_modules": ["k_proj", "down_proj"], "lora_bias": True, "bias": "lora_only"},
    "tied": {"target_modules": ["embed_tokens", "o_proj"], "ensure_weight_tying": True},
    "ends": {"target_modules": ["embed_tokens", "lm_head"], "use_dora": True, "save_embedding_layers": "auto"},
    "copies": {"target_modules": ["q_proj"], "save_embedding_layers": True},
    "whole": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "embed_tokens"]},
    "MiCA": {"target_modules": ["q_proj"], "init_lora_weights": "mica"},
    "aLoRA": {"target_modules": "all-linear", "alora_invocation_tokens": INVOCATION},
    "aLoRA, bias of B": {"target_modules": ["v_proj"], "lora_bias": True, "alora_invocation_tokens": INVOCATION},
}

pytestmark = [
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`:UserWarning"),
    pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning"),
]


def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCAB_SIZE,
            hidden_size=64,
            intermediate_size=96,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=16,
            max_position_embeddings=256,
            initializer_range=0.2,
            eos_token_id=EOS,
            bos_token_id=None,
            tie_word_embeddings=True,
            attention_bias=True,
            mlp_bias=True,
        )
    )
    for name, parameter in model.named_parameters():
        if name.endswith(".bias"):
            torch.nn.init.normal_(parameter, std=0.3)
    model.eval()
    return model


@pytest.fixture(scope="module")
def base_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_base(model(), tmp_path_factory.mktemp("wide") / "base")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("adapters")
    for seed, (name, config) in enumerate(ADAPTERS.items()):
        save_adapter(model(), root / name, seed, **{"r": 4, "lora_alpha": 8, **config})
    return {name: root / name for name in ADAPTERS}


@pytest.fixture(scope="module")
def prompts() -> dict[str, list[int]]:
    """One for each adapter and the base; all invoke aLoRA, twice, and no answer to them is a near tie."""
    generator = torch.Generator().manual_seed(4)

    def some(low: int, high: int) -> list[int]:
        length = int(torch.randint(low, high, (1,), generator=generator))
        return torch.randint(10, VOCAB_SIZE, (length,), generator=generator).tolist()

    return {name: some(1, 20) + INVOCATION + some(20, 40) + INVOCATION + some(0, 9) for name in ["", *ADAPTERS]}


@torch.inference_mode()
def peft_answer(folder: Path | None, prompt: list[int]) -> tuple[list[int], torch.Tensor]:
    """Greedy tokens and the logits that they were chosen from, of PEFT with one adapter on a base of its own."""
    reference: Any = model() if folder is None else peft.PeftModel.from_pretrained(model(), str(folder)).eval()
    token_ids, rows = list(prompt), []
    for _ in range(NUM_TOKENS):
        rows.append(reference(torch.tensor([token_ids])).logits[0, -1])
        token_ids.append(int(rows[-1].argmax()))
    return token_ids[len(prompt) :], torch.stack(rows)


@pytest.fixture(scope="module")
def expected(folders: dict[str, Path], prompts: dict[str, list[int]]) -> dict[str, tuple[list[int], torch.Tensor]]:
    return {name: peft_answer(folders.get(name), prompt) for name, prompt in prompts.items()}


def make_engine(base_dir: Path, **settings: Any) -> tuple[Engine, dict[int, list[torch.Tensor]]]:
    engine = Engine(base_dir, **settings)
    rows: dict[int, list[torch.Tensor]] = {}
    engine.watch_logits(lambda request_id, row: rows.setdefault(request_id, []).append(row.clone()))
    return engine, rows


@pytest.fixture(params=["native", "torch"])
def kernels(request: pytest.FixtureRequest) -> str:
    if request.param == "native" and not native.available():
        pytest.skip("the native kernels are not built")
    return "torch" if request.param == "torch" else "auto"


def test_every_adapter_matters(
    prompts: dict[str, list[int]], expected: dict[str, tuple[list[int], torch.Tensor]]
) -> None:
    for name, prompt in prompts.items():
        if name:
            assert not torch.allclose(expected[name][1][0], peft_answer(None, prompt)[1][0], rtol=0, atol=0.1), name


@pytest.mark.parametrize(
    "settings",
    [{"max_num_seqs": 1}, {}, {"max_num_batched_tokens": 16, "max_num_seqs": 16}, {"adapter_slots": 2}],
    ids=["alone", "mixed batch", "chunked prefill", "slot eviction"],
)
def test_logits_are_pefts(
    base_dir: Path,
    folders: dict[str, Path],
    prompts: dict[str, list[int]],
    expected: dict[str, tuple[list[int], torch.Tensor]],
    kernels: str,
    settings: dict[str, int],
) -> None:
    engine, rows = make_engine(base_dir, kernels=kernels, **settings)
    adapters = {name: engine.load(folder) for name, folder in folders.items()}
    answers = engine.generate(
        [(prompt, adapters.get(name)) for name, prompt in prompts.items()], max_tokens=NUM_TOKENS, ignore_eos=True
    )
    for row, (name, tokens) in enumerate(zip(prompts, answers, strict=True)):
        assert tokens == expected[name][0], name
        torch.testing.assert_close(torch.stack(rows[row]), expected[name][1], rtol=1e-4, atol=1e-4, msg=name)


def test_each_of_them_merged_beside_the_others(
    base_dir: Path,
    folders: dict[str, Path],
    prompts: dict[str, list[int]],
    expected: dict[str, tuple[list[int], torch.Tensor]],
    kernels: str,
) -> None:
    """What the merged one does is undone before others do theirs, and before an aLoRA is invoked."""
    engine, _ = make_engine(base_dir, kernels=kernels, max_num_batched_tokens=64, max_num_seqs=16)
    adapters = {name: engine.load(folder) for name, folder in folders.items()}
    work = [(prompt, adapters.get(name)) for name, prompt in prompts.items()]
    for merged in adapters.values():
        engine.merge(merged)
        answers = engine.generate(work, max_tokens=NUM_TOKENS, ignore_eos=True)
        assert answers == [tokens for tokens, _ in expected.values()], merged.name


@pytest.mark.skipif(not native.available(), reason="the native kernels are not built")
@pytest.mark.parametrize("storage", [{}, {"dtype": "bfloat16"}, {"quantization": "int8"}], ids=["f32", "bf16", "int8"])
def test_the_same_bits_in_any_batch(
    base_dir: Path, folders: dict[str, Path], prompts: dict[str, list[int]], storage: dict[str, str]
) -> None:
    def logits(alone: bool, **settings: int) -> list[torch.Tensor]:
        engine, rows = make_engine(base_dir, **settings, **storage)
        adapters = {name: engine.load(folder) for name, folder in folders.items()}
        work = [(prompt, adapters.get(name)) for name, prompt in prompts.items()]
        for part in [[item] for item in work] if alone else [work]:
            engine.generate(part, max_tokens=NUM_TOKENS, ignore_eos=True)
        return [torch.stack(rows[request_id]) for request_id in range(len(work))]

    reference = logits(alone=True, prefix_cache=False)
    for settings in ({}, {"max_num_batched_tokens": 16, "max_num_seqs": 16}):
        assert all(map(torch.equal, logits(alone=False, **settings), reference)), settings


def test_tokens_before_the_invocation_are_the_bases(base_dir: Path, folders: dict[str, Path], kernels: str) -> None:
    """Their KV blocks are shared with the base and with other aLoRA requests, and none after the invocation is."""
    engine, _ = make_engine(base_dir, kernels=kernels)
    adapter, other = engine.load(folders["aLoRA"]), engine.load(folders["aLoRA"])
    generator = torch.Generator().manual_seed(4)
    common = torch.randint(10, VOCAB_SIZE, (40,), generator=generator).tolist()
    tail = torch.randint(10, VOCAB_SIZE, (20,), generator=generator).tolist()
    once = [*common, *INVOCATION, *tail]
    twice = [*once, *INVOCATION]  # what was the adapter's in the shorter prompt is the base's in this one
    cached = []
    for prompt, on in ((once, None), (once, adapter), (once, adapter), (once, other), (twice, adapter), (twice, None)):
        answer = engine.generate([(prompt, on)], max_tokens=NUM_TOKENS, ignore_eos=True)
        assert answer == [peft_answer(folders["aLoRA"] if on else None, prompt)[0]]
        cached.append(engine.outputs[max(engine.outputs)][0].num_cached_tokens)
    assert cached == [0, 32, 48, 32, 48, 48]


def test_whatever_an_adapter_does_takes_one_pass_as_a_plain_one_does(
    base_dir: Path, folders: dict[str, Path], prompts: dict[str, list[int]]
) -> None:
    engine, _ = make_engine(base_dir)
    forward, passes = engine.parts.runner.forward, []

    def counted(batch: ForwardBatch) -> torch.Tensor:
        passes.append((len(batch.passes), len(batch.logits_passes)))
        return forward(batch)

    engine.parts.runner.forward = counted  # type: ignore[method-assign]
    for on in ("", *ADAPTERS):
        adapter = engine.load(folders[on]) if on else None
        passes.clear()
        engine.generate([(prompts["aLoRA"], adapter)], max_tokens=1)
        assert passes == [(0, 0) if adapter is None else (1, 1)], on


@pytest.mark.parametrize(("name", "reason"), [("DoRA", "DoRA"), ("bias of B", "biases"), ("aLoRA", "aLoRA")])
def test_what_is_no_sum_is_not_scaled_or_mixed(
    base_dir: Path, folders: dict[str, Path], name: str, reason: str
) -> None:
    engine, _ = make_engine(base_dir)
    adapter, plain = engine.load(folders[name]), engine.load(folders["plain"])
    for parts, field in (
        ([WeightedAdapter(adapter, 0.5)], "adapter_scale"),
        ([WeightedAdapter(plain), WeightedAdapter(adapter)], "mix.adapter"),
    ):
        with pytest.raises(InvalidRequest, match=rf"'{name}' cannot be scaled or mixed: .*{reason}") as error:
            engine.submit(INVOCATION, parts)
        assert error.value.field == field


def test_an_adapter_that_is_not_invoked_is_refused(base_dir: Path, folders: dict[str, Path]) -> None:
    engine, _ = make_engine(base_dir)
    with pytest.raises(InvalidRequest, match=r"'aLoRA' would do nothing: .*\[7, 9\]"):
        engine.submit([7, 8, 9], engine.load(folders["aLoRA"]))


@pytest.mark.parametrize("bias", ["lora_only", "all"])
def test_an_invoked_adapter_with_biases_of_the_base_is_refused(base_dir: Path, tmp_path: Path, bias: str) -> None:
    """PEFT applies them to the tokens before the invocation, too."""
    save_adapter(model(), tmp_path, 0, target_modules=["q_proj"], bias=bias, alora_invocation_tokens=INVOCATION)
    engine, _ = make_engine(base_dir)
    with pytest.raises(AdapterIncompatibleError, match=rf"bias='{bias}' .*every token"):
        engine.load(tmp_path)


ARCHITECTURES: list[tuple[str, dict[str, Any]]] = [
    ("gpt2", {"target_modules": ["c_attn", "c_fc", "wte"], "use_dora": True, "fan_in_fan_out": True}),
    ("gpt2", {"target_modules": ["c_proj"], "bias": "lora_only", "fan_in_fan_out": True}),
    ("gemma3_text", {"target_modules": ["embed_tokens", "q_proj"]}),
    ("gemma3_text", {"target_modules": ["embed_tokens"], "use_dora": True}),
    ("qwen2", {"target_modules": ["k_proj", "lm_head"], "use_dora": True, "bias": "all"}),
    ("phi", {"target_modules": ["q_proj", "lm_head"], "use_dora": True}),
]


@pytest.mark.parametrize(("model_type", "config"), ARCHITECTURES)
def test_other_architectures(model_type: str, config: dict[str, Any], tmp_path: Path) -> None:
    """Transposed weights, embeddings that scale their rows, a head with a bias: as a bypass and merged."""

    def base_model() -> Any:
        made = tiny(model_type, SERVED[model_type])
        for name, parameter in made.named_parameters():
            if name.endswith(".bias"):
                torch.nn.init.normal_(parameter, std=0.3)
        return made.eval()

    save_adapter(base_model(), tmp_path / "adapter", 5, std=0.2, r=3, lora_alpha=6, **config)
    prompt = [5, 17, 33, 4, 60, 21, 9]
    with torch.inference_mode():
        expected = peft.PeftModel.from_pretrained(base_model(), str(tmp_path / "adapter"))(
            torch.tensor([prompt])
        ).logits
        plain = base_model()(torch.tensor([prompt])).logits

    runner = torch_runner(prepare_base_model(base_model(), model_type, CPU))
    base = runner.lora.base_weights
    adapter = Adapter.from_files(read_adapter(tmp_path / "adapter", base.shapes, 8), "a", "1", 1, base)
    runner.lora.write(0, adapter)
    requests = [
        Request(row, prompt, SamplingParams(), on, frozenset())
        for row, on in enumerate(([], [WeightedAdapter(adapter)]))
    ]
    requests[0].block_table, requests[1].block_table = [0, 1], [2, 3]
    requests[1].adapter_slots = (0,)
    for merged in (None, MergedAdapter(adapter, runner.lora.merged_slot)):
        runner.merge(merged and merged.adapter)
        scheduled = [ScheduledRequest(request, len(prompt)) for request in requests]
        logits = runner.forward(build_forward_batch(scheduled, 4, CPU, merged=merged))
        torch.testing.assert_close(logits[0], plain[0, -1], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(logits[1], expected[0, -1], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(logits[0], logits[1], rtol=0.01, atol=0.01)


def test_a_trained_norm_is_refused(tmp_path: Path) -> None:
    made = tiny("gpt2", SERVED["gpt2"])
    save_adapter(made, tmp_path / "adapter", 0, target_modules=["c_attn"], bias="all", fan_in_fan_out=True)
    shapes = prepare_base_model(tiny("gpt2", SERVED["gpt2"]), "gpt2", CPU).linear_layers
    with pytest.raises(AdapterIncompatibleError, match=r"ln_1\.bias.*the bias of no linear layer"):
        read_adapter(tmp_path / "adapter", shapes, 8)


@pytest.mark.parametrize("storage", [{}, {"dtype": "bfloat16"}, {"quantization": "int8"}], ids=["f32", "bf16", "int8"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_copies_of_the_base_are_held_against_it(
    base_dir: Path, folders: dict[str, Path], tmp_path: Path, storage: dict[str, str], dtype: torch.dtype
) -> None:
    """Whatever either side was rounded to; a copy that was trained is refused, and so is one that has grown."""
    if storage and not native.available():
        pytest.skip("the native kernels are not built")
    engine = Engine(base_dir, **storage)
    for name in ("ends", "copies", "whole"):
        folder = tmp_path / name
        shutil.copytree(folders[name], folder)
        tensors = safetensors.torch.load_file(folder / "adapter_model.safetensors")
        copies = [key for key in tensors if key.endswith(("base_layer.weight", "lm_head.weight", "tokens.weight"))]
        assert copies
        for key in copies:
            tensors[key] = tensors[key].to(dtype)
        safetensors.torch.save_file(tensors, folder / "adapter_model.safetensors")
        engine.load(folder)
        tensors[copies[0]][3] *= 1.1
        safetensors.torch.save_file(tensors, folder / "adapter_model.safetensors")
        with pytest.raises(AdapterIncompatibleError, match="trained whole"):
            engine.load(folder)
        tensors[copies[0]] = torch.zeros(VOCAB_SIZE + 8, 64)
        safetensors.torch.save_file(tensors, folder / "adapter_model.safetensors")
        with pytest.raises(AdapterIncompatibleError, match="the vocabulary was resized"):
            engine.load(folder)

import re

import pytest
import torch
from torch import Tensor, nn
from transformers import CLIPVisionConfig, CLIPVisionModel, LlamaConfig, LlamaForCausalLM
from transformers.pytorch_utils import Conv1D

from adapters.lora import LoRALinear, Targets, inject_lora, target_modules, trainable_share
from tests.adapters.conftest import logits, randomize


def test_worked_example() -> None:
    base = nn.Linear(4, 4, bias=False)
    base.weight.data = torch.tensor(
        [[1.0, 0.5, -0.2, 0.1], [0.3, 1.2, 0.8, -0.5], [-0.1, 0.4, 0.9, 0.2], [0.5, -0.3, 0.1, 1.1]]
    )
    layer = LoRALinear(base, rank=2, alpha=2)
    layer.lora_a.weight.data = torch.tensor([[0.2, -0.1, 0.3, 0.05], [0.1, 0.4, -0.2, 0.15]])
    layer.lora_b.weight.data = torch.tensor([[0.5, 0.0], [0.1, 0.3], [-0.2, 0.4], [0.0, -0.1]])
    delta = torch.tensor(
        [
            [0.10, -0.05, 0.15, 0.025],
            [0.05, 0.11, -0.03, 0.050],
            [0.00, 0.18, -0.14, 0.050],
            [-0.01, -0.04, 0.02, -0.015],
        ]
    )
    torch.testing.assert_close(layer.delta_weight(), delta, rtol=0, atol=1e-7)

    x = torch.randn(5, 4)
    expected = x @ (base.weight + delta).T
    torch.testing.assert_close(layer(x), expected)
    layer.merge()
    torch.testing.assert_close(layer.base.weight, base.weight)
    torch.testing.assert_close(layer(x), expected)


@pytest.mark.parametrize(("rslora", "scaling"), [(False, 4.0), (True, 8.0)])
def test_scaling(rslora: bool, scaling: float) -> None:
    layer = LoRALinear(nn.Linear(3, 3), rank=4, alpha=16, rslora=rslora)
    assert layer.scaling == scaling
    nn.init.ones_(layer.lora_b.weight)
    torch.testing.assert_close(layer.delta_weight(), scaling * layer.lora_a.weight.sum(0).expand(3, 3))


def test_starts_as_the_base_with_a_live_a(model: LlamaForCausalLM) -> None:
    before = logits(model)
    layers = inject_lora(model, "all-linear", rank=4, alpha=8)
    assert torch.equal(logits(model), before)
    for layer in layers.values():
        assert not layer.lora_b.weight.any()
        assert layer.lora_a.weight.any(dim=1).all()


def test_the_seed_decides_a() -> None:
    def initial(seed: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        return inject_lora(nn.Sequential(nn.Linear(8, 8)), "0", rank=2, alpha=2, generator=generator)["0"].lora_a.weight

    assert torch.equal(initial(7), initial(7))
    assert not torch.equal(initial(7), initial(8))


@pytest.mark.parametrize(
    ("targets", "names"),
    [
        ("q_proj", {"model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj"}),
        ("self_attn.q_proj", {"model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj"}),
        ("model.layers.1.mlp.up_proj", {"model.layers.1.mlp.up_proj"}),
        (re.compile(r".*\.0\..*\.(k|v)_proj"), {"model.layers.0.self_attn.k_proj", "model.layers.0.self_attn.v_proj"}),
        (
            ["model.layers.1.mlp.up_proj", re.compile("lm_.*")],
            {"model.layers.1.mlp.up_proj", "lm_head"},
        ),
    ],
)
def test_targets(model: LlamaForCausalLM, targets: Targets, names: set[str]) -> None:
    layers = inject_lora(model, targets, rank=2, alpha=2)
    assert layers.keys() == names
    assert {name for name, module in model.named_modules() if isinstance(module, LoRALinear)} == names


@pytest.mark.parametrize(("target", "spared"), [("all-linear", {"lm_head"}), (nn.Linear, set())])
def test_all_linear_layers_but_the_head(model: LlamaForCausalLM, target: Targets, spared: set[str]) -> None:
    linear = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    assert inject_lora(model, target, rank=2, alpha=2).keys() == linear - spared


@pytest.mark.parametrize("target", ["proj", "mlp", re.compile("q_proj"), nn.Conv2d])
def test_a_target_that_matches_nothing_is_named(model: LlamaForCausalLM, target: Targets) -> None:
    name = target.__name__ if isinstance(target, type) else repr(target)
    with pytest.raises(
        ValueError, match=re.escape(f"target {name} matches no linear layer; their names end in ['down")
    ):
        inject_lora(model, ["q_proj", target], rank=2, alpha=2)  # type: ignore[list-item]
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_a_second_injection_is_refused(model: LlamaForCausalLM) -> None:
    inject_lora(model, "q_proj", rank=2, alpha=2)
    with pytest.raises(ValueError, match="has LoRA layers already"):
        inject_lora(model, "v_proj", rank=2, alpha=2)


def test_a_layer_whose_weight_is_read_past_it_is_no_target() -> None:
    with pytest.raises(ValueError, match="matches no linear layer"):
        inject_lora(nn.ModuleList([nn.MultiheadAttention(4, 2)]), "all-linear", rank=2, alpha=2)


def test_only_the_bypass_trains(model: LlamaForCausalLM) -> None:
    total = sum(parameter.numel() for parameter in model.parameters())
    inject_lora(model, "q_proj", rank=4, alpha=8)
    trains = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert trains == [
        f"model.layers.{layer}.self_attn.q_proj.lora_{part}.weight" for layer in (0, 1) for part in "ab"
    ]  # fmt: skip
    bypass = 2 * 4 * (64 + 64)
    assert trainable_share(model) == (bypass, total + bypass)


def test_dropout_only_in_training() -> None:
    assert not LoRALinear(nn.Linear(64, 64).eval(), rank=4, alpha=4, dropout=0.5).training
    layer = LoRALinear(nn.Linear(64, 64), rank=4, alpha=4, dropout=0.5)
    nn.init.ones_(layer.lora_b.weight)
    x = torch.randn(3, 64)
    assert not torch.equal(layer(x), layer(x))
    layer.eval()
    assert torch.equal(layer(x), layer(x))
    torch.testing.assert_close(layer(x), layer.base(x) + x @ layer.delta_weight().T)


def test_conv1d() -> None:
    model = nn.Sequential(Conv1D(6, 4))  # 4 in, 6 out
    layers = inject_lora(model, Conv1D, rank=2, alpha=2)
    randomize(layers)
    layer, x = layers["0"], torch.randn(3, 4)
    assert layer.weights().lora_a.shape == (2, 4)
    assert layer.weights().lora_b.shape == (6, 2)
    expected = model(x)
    torch.testing.assert_close(expected, layer.base(x) + x @ layer.delta_weight())
    layer.merge()
    torch.testing.assert_close(model(x), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merging_is_undone_bit_for_bit(model: LlamaForCausalLM, dtype: torch.dtype) -> None:
    for parameter in model.parameters():
        parameter.data = parameter.to(dtype)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    layers = inject_lora(model, "all-linear", rank=4, alpha=8)
    randomize(layers)
    unmerged = logits(model)
    for _ in range(3):
        for layer in layers.values():
            layer.merge()
            layer.merge()
        if dtype == torch.float32:
            torch.testing.assert_close(logits(model), unmerged, rtol=1e-4, atol=1e-4)
        for layer in layers.values():
            layer.unmerge()
            layer.unmerge()
    assert torch.equal(logits(model), unmerged)
    after = {name.replace(".base.", "."): parameter for name, parameter in model.named_parameters()}
    assert all(torch.equal(after[name], parameter) for name, parameter in before.items())


def test_merging_a_tied_head_spares_the_embedding() -> None:
    config = LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        tie_word_embeddings=True,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    layers = inject_lora(model, "lm_head", rank=2, alpha=2)
    randomize(layers)
    embedding = model.get_input_embeddings().weight
    before, expected = embedding.clone(), logits(model)
    layers["lm_head"].merge()
    assert torch.equal(embedding, before)
    torch.testing.assert_close(logits(model), expected)
    layers["lm_head"].unmerge()
    assert layers["lm_head"].base.weight is embedding


def test_a_vision_encoder_trains_by_its_bypass_alone() -> None:
    torch.manual_seed(0)
    config = CLIPVisionConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=8, patch_size=4
    )

    class Classifier(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder = CLIPVisionModel(config)
            self.head = nn.Linear(16, 2)

        def forward(self, images: Tensor) -> Tensor:
            result: Tensor = self.head(self.encoder(pixel_values=images).pooler_output)
            return result

    model = Classifier()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    layers = inject_lora(model, ["q_proj", "v_proj", "fc1", "head"], rank=4, alpha=8)
    assert len(layers) == 2 * 3 + 1
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert len(parameters) == 2 * len(layers)
    optimizer = torch.optim.AdamW(parameters, lr=1e-2)
    images = torch.randn(8, 3, 8, 8)
    classes = (images.mean(dim=(1, 2, 3)) > 0).long()
    losses = []
    for _ in range(12):
        loss = nn.functional.cross_entropy(model(images), classes)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]

    state = model.state_dict()
    after = {name.replace(".base.", "."): value for name, value in state.items() if ".lora_" not in name}
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], value) for name, value in before.items())

    with torch.no_grad():
        bypass = model(images)
        for layer in layers.values():
            layer.merge()
        torch.testing.assert_close(model(images), bypass, rtol=1e-4, atol=1e-5)
        for layer in layers.values():
            layer.unmerge()
        assert torch.equal(model(images), bypass)


def test_saved_targets_are_short_where_they_say_the_same(model: LlamaForCausalLM) -> None:
    layers = inject_lora(model, ["q_proj", "down_proj"], rank=2, alpha=2)
    assert target_modules(model, layers) == ("down_proj", "q_proj")

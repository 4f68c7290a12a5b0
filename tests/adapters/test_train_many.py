"""Adapters that are trained at once come out as each would alone."""

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from adapters.data import IGNORED, Example
from adapters.train import train, train_many
from adapters.train_config import TrainConfig
from adapters.train_job import StepReport, TrainingDiverged, TrainJob, TrainResult
from tests.adapters.conftest import logits
from tests.conftest import EOS, tiny_llama

CONFIG = TrainConfig(rank=4, alpha=8, dropout=0.0, learning_rate=5e-3, batch_tokens=40, max_steps=6, eval_every=3)


def words(count: int, length: int, seed: int) -> list[Example]:
    """Prompts of 1 to `length` tokens, all with one answer."""
    source = torch.Generator().manual_seed(seed)
    examples = []
    for index in range(count):
        prompt = torch.randint(0, 64, (1 + index % length,), generator=source).tolist()
        answer = (70 + seed, 71, EOS)
        examples.append(Example((*prompt, *answer), (*[IGNORED] * len(prompt), *answer)))
    return examples


def job(length: int = 4, seed: int = 0, **changes: object) -> TrainJob:
    config = replace(CONFIG, **changes)  # type: ignore[arg-type]
    examples = words(40, length, seed)
    return TrainJob(train_examples=examples[:30], eval_examples=examples[30:], config=config, name=f"job {seed}")


JOBS = [
    job(),
    job(length=9, seed=1, rank=2, targets=("q_proj", "down_proj"), learning_rate=1e-2, max_steps=3),
    job(length=2, seed=2, accumulate=3, rslora=True, epochs=2, max_steps=0),
    job(length=3, seed=3, targets=("k_proj", "lm_head"), batch_tokens=20, max_steps=9, eval_every=1, patience=1),
]


def weights(result: TrainResult) -> dict[str, Tensor]:
    return {
        f"{name}.{part}": tensor
        for name, layer in result.layers.items()
        for part, tensor in (("a", layer.weights().lora_a), ("b", layer.weights().lora_b))
    }


def test_each_as_it_would_be_alone(
    make_model: Callable[[], LlamaForCausalLM], tokenizer: PreTrainedTokenizerFast
) -> None:
    """Lengths, ranks, targets, numbers of steps and of batches in a step: all of them differ."""
    seen: list[list[StepReport]] = [[] for _ in JOBS]
    results = train_many(make_model(), tokenizer, JOBS, lambda index, report: seen[index].append(report))
    assert len({len(reports) for reports in seen}) == len(JOBS)
    for one, result, reports in zip(JOBS, results, seen, strict=True):
        alone = train(make_model(), tokenizer, one.train_examples, one.eval_examples, one.config)
        assert reports == result.reports
        assert result.best_step == alone.best_step
        for report, expected in zip(result.reports, alone.reports, strict=True):
            assert report.loss == pytest.approx(expected.loss, rel=1e-4)
            assert report.eval_loss == (expected.eval_loss and pytest.approx(expected.eval_loss, rel=1e-4))
            assert (report.num_steps, report.num_tokens) == (expected.num_steps, expected.num_tokens)
        torch.testing.assert_close(weights(result), weights(alone), rtol=1e-3, atol=1e-5)


def test_the_model_is_what_it_was(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    before, modules = logits(model), [name for name, _ in model.named_modules()]
    train_many(model, tokenizer, [job(), job(seed=1)])
    assert torch.equal(logits(model), before)
    assert [name for name, _ in model.named_modules()] == modules
    assert not model.training


def test_dropout_falls_on_each(tokenizer: PreTrainedTokenizerFast) -> None:
    def losses(dropout: float, seed: int) -> list[list[float]]:
        jobs = [job(seed=1, dropout=dropout), job(seed=2, dropout=0.0)]
        jobs = [replace(one, config=replace(one.config, seed=seed)) for one in jobs]
        return [[report.loss for report in result.reports] for result in train_many(tiny_llama(), tokenizer, jobs)]

    with_dropout, without = losses(0.3, seed=0), losses(0.0, seed=0)
    assert with_dropout == losses(0.3, seed=0)
    assert with_dropout[0] != without[0]
    assert with_dropout[1] == pytest.approx(without[1], rel=1e-4)


def test_one_that_diverges_is_named(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(TrainingDiverged, match=r"^job 1: step \d: the loss is nan; lower the learning rate of inf$"):
        train_many(model, tokenizer, [job(), job(seed=1, learning_rate=math.inf)])


def test_a_model_that_mixes_the_examples_of_a_batch(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a mixture of experts does, whose layers see tokens of all examples in a row."""
    mlp = model.model.layers[1].mlp
    forward = mlp.forward
    monkeypatch.setattr(mlp, "forward", lambda x: forward(x.flatten(0, 1)).view(x.shape))
    train_many(model, tokenizer, [job()])
    with pytest.raises(ValueError, match=r"can only be trained one at a time"):
        train_many(model, tokenizer, [job(), job(seed=1)])

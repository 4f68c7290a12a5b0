import math

import pytest
import torch
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from adapters.data import Example, batches
from adapters.loss import evaluate
from adapters.train import train
from adapters.train_config import TrainConfig
from adapters.train_job import StepReport, TrainingDiverged
from tests.adapters.conftest import letters
from tests.conftest import tiny_llama

FAST = TrainConfig(rank=4, alpha=8, learning_rate=1e-2, batch_tokens=40, max_steps=20, eval_every=5)


def run(config: TrainConfig, model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> list[StepReport]:
    return train(model, tokenizer, letters(40), letters(10, seed=1), config).reports


def test_training_lowers_the_loss(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    base = {name: parameter.clone() for name, parameter in model.named_parameters()}
    seen: list[StepReport] = []
    result = train(model, tokenizer, letters(40), letters(10, seed=1), FAST, seen.append)
    assert seen == result.reports
    assert [report.step for report in seen] == list(range(1, 21))
    assert seen[-1].loss < 0.2 * seen[0].loss
    assert seen[-1].num_tokens == 20 * 8 * 5
    assert [report.step for report in seen if report.eval_loss is not None] == [5, 10, 15, 20]
    assert not model.training
    after = {name.replace(".base.", "."): parameter for name, parameter in model.named_parameters()}
    assert all(torch.equal(after[name], parameter) for name, parameter in base.items())


def test_the_same_seed_gives_the_same_adapter(tokenizer: PreTrainedTokenizerFast) -> None:
    def losses(seed: int) -> list[float]:
        config = TrainConfig(rank=4, dropout=0.2, batch_tokens=40, max_steps=4, seed=seed)
        return [report.loss for report in run(config, tiny_llama(), tokenizer)]

    assert losses(1) == losses(1) != losses(2)


def test_accumulated_batches_are_one_large_batch(tokenizer: PreTrainedTokenizerFast) -> None:
    def losses(batch_tokens: int, accumulate: int) -> list[float]:
        config = TrainConfig(
            rank=4, dropout=0.0, batch_tokens=batch_tokens, accumulate=accumulate, epochs=3, patience=0
        )
        return [report.loss for report in run(config, tiny_llama(), tokenizer)]

    assert losses(200, 1) == pytest.approx(losses(50, 4), rel=1e-4)


def test_early_stopping_keeps_the_best(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    other = [Example((first, 70, 75, 76, 256), (-100, -100, 75, 76, 256)) for first in range(10)]
    config = TrainConfig(rank=4, alpha=8, learning_rate=2e-2, batch_tokens=40, max_steps=60, eval_every=2, patience=3)
    result = train(model, tokenizer, letters(40), other, config)
    losses = {report.step: report.eval_loss for report in result.reports if report.eval_loss is not None}
    assert result.reports[-1].step == result.best_step + 6 < 60
    assert losses[result.best_step] == min(losses.values())
    (batch,) = batches(other, 1000, pad_id=0)
    assert evaluate(model, [batch]) == pytest.approx(losses[result.best_step], rel=1e-5)


def test_without_evaluation_the_last_weights_stay(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    result = train(model, tokenizer, letters(40), [], FAST)
    assert result.best_step == result.reports[-1].step == 20
    (batch,) = batches(letters(40), 1000, pad_id=0)
    assert evaluate(model, [batch]) < 0.5 * result.reports[0].loss


def test_a_loss_that_is_no_number_stops(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    torch.nn.init.constant_(model.lm_head.weight, math.inf)
    with pytest.raises(TrainingDiverged, match=r"^step 1: the loss is nan; lower the learning rate of 0.01$"):
        train(model, tokenizer, letters(40), [], FAST)


@pytest.mark.parametrize(
    ("setting", "reason"),
    [({"rank": 0}, "rank is 0; more than 0"), ({"dropout": 1.0}, "dropout is 1.0; at least 0 and less than 1")],
)
def test_settings_out_of_range(setting: dict[str, float], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        TrainConfig(**setting)  # type: ignore[arg-type]

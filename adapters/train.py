"""Trains LoRA adapters on a frozen base model, one or several at once.

The base takes part in the forward and the backward pass but gets no gradients of its own weights. Adapters that are
trained at once share these passes where their batches are of like length: they are joined, and each has its bypass on
its own rows alone, so that none meets another.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from adapters.config import AdapterConfig
from adapters.data import Batch, Example, batches, bundles, join, padding_of
from adapters.folder import write_adapter
from adapters.learner import Learner
from adapters.lora import LoRALinear, inject_lora, remove_lora, target_modules
from adapters.loss import completion_losses, evaluate
from adapters.shared_linear import Rows, shared_layers
from adapters.train_config import TrainConfig
from adapters.train_job import StepReport, TrainJob, TrainResult


def train(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    train_examples: Sequence[Example],
    eval_examples: Sequence[Example],
    config: TrainConfig,
    progress: Callable[[StepReport], None] = lambda report: None,
) -> TrainResult:
    """Injects LoRA layers into `model` and trains them; `model` keeps them, in evaluation mode.

    With `eval_examples`, the weights of the best evaluation are kept and training may stop early; without any, the
    last weights are kept. Seeds torch's global generator.

    Raises:
        ValueError: a target of the configuration matches no layer.
        TrainingDiverged: a loss was not finite.
    """
    torch.manual_seed(config.seed)
    job = TrainJob(train_examples=train_examples, eval_examples=eval_examples, config=config)
    pad_id = padding_of(tokenizer)
    learner = _learner(model, inject(model, config), job, pad_id)
    _run(model, [learner], Rows(), pad_id, lambda _, report: progress(report))
    return learner.finish()


def train_many(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    jobs: Sequence[TrainJob],
    progress: Callable[[int, StepReport], None] = lambda job, report: None,
) -> list[TrainResult]:
    """Trains an adapter for each job, all at once; `model` is without them afterwards, frozen, in evaluation mode.

    Each comes out as `train` alone would have made it, up to rounding, and up to what dropout draws. Jobs may end at
    different steps; the memory of a step is that of all their batches. `progress` gets the index of the job too.

    Raises:
        ValueError: a target of a configuration matches no layer, or the model mixes the examples of a batch.
        TrainingDiverged: a loss was not finite.
    """
    torch.manual_seed(jobs[0].config.seed)
    pad_id = padding_of(tokenizer)
    adapters = []
    for job in jobs:
        adapters.append(inject(model, job.config))
        remove_lora(model, adapters[-1])
    learners = [_learner(model, layers, job, pad_id) for layers, job in zip(adapters, jobs, strict=True)]
    with shared_layers(model, adapters) as rows:
        _run(model, learners, rows, pad_id, progress)
    return [learner.finish() for learner in learners]


def save_adapter(
    folder: Path,
    model: nn.Module,
    layers: Mapping[str, LoRALinear],
    config: TrainConfig,
    base_model: str,
    base_fingerprint: str = "",
) -> None:
    """Writes trained layers as an adapter folder in PEFT's format.

    Args:
        model: with the layers, or without.
        base_fingerprint: of the model before the layers were injected.

    Raises:
        FileExistsError: `folder` holds something else.
    """
    adapter_config = AdapterConfig(
        rank=config.rank,
        alpha=config.alpha,
        use_rslora=config.rslora,
        dropout=config.dropout,
        target_modules=target_modules(model, layers),
        base_model=base_model,
        fan_in_fan_out=any(layer.transposed for layer in layers.values()),
    )
    weights = {name: layer.weights() for name, layer in layers.items()}
    write_adapter(folder, adapter_config, weights, base_fingerprint)


def inject(model: PreTrainedModel, config: TrainConfig) -> dict[str, LoRALinear]:
    """The layers that a configuration calls for, in `model`, with their first weights."""
    return inject_lora(
        model,
        config.targets,
        rank=config.rank,
        alpha=config.alpha,
        dropout=config.dropout,
        rslora=config.rslora,
        generator=torch.Generator().manual_seed(config.seed),
    )


def _learner(model: PreTrainedModel, layers: dict[str, LoRALinear], job: TrainJob, pad_id: int) -> Learner:
    make_batches = partial(batches, batch_tokens=job.config.batch_tokens, pad_id=pad_id, device=model.device)
    return Learner(layers, job, make_batches)


def _run(
    model: PreTrainedModel,
    learners: Sequence[Learner],
    rows: Rows,
    pad_id: int,
    progress: Callable[[int, StepReport], None],
) -> None:
    """Makes the steps of all learners; a step is one of each that is not done."""
    start = time.perf_counter()
    model.train()
    while running := [index for index, learner in enumerate(learners) if not learner.is_done]:
        groups = {index: learners[index].next_group() for index in running}
        for index, loss in _backward(model, groups, rows, pad_id).items():
            learner, eval_loss = learners[index], None
            learner.learn(loss, groups[index])
            if learner.is_to_be_evaluated:
                rows.give_all(index)
                eval_loss = evaluate(model, learner.eval_batches)
            progress(index, learner.end_step(loss, eval_loss, time.perf_counter() - start))
    model.eval()


def _backward(
    model: PreTrainedModel, groups: Mapping[int, Sequence[Batch]], rows: Rows, pad_id: int
) -> dict[int, float]:
    """Adds the gradients of each learner's mean loss per token with loss over its group, and returns those losses."""
    num_targets = {index: sum(batch.num_targets for batch in group) for index, group in groups.items()}
    totals = dict.fromkeys(groups, 0.0)
    for number in range(max(map(len, groups.values()))):
        parts = {index: group[number] for index, group in groups.items() if number < len(group)}
        for bundle in bundles(parts):
            counts = {index: len(batch.input_ids) for index, batch in bundle.items()}
            rows.give(counts)
            sums = completion_losses(model, join(list(bundle.values()), pad_id), list(counts.values()))
            losses = {index: loss / num_targets[index] for index, loss in zip(bundle, sums, strict=True)}
            torch.stack(list(losses.values())).sum().backward()
            for index, loss in losses.items():
                totals[index] += loss.item()
    return totals

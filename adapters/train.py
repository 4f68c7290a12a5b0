"""Trains one LoRA adapter on a frozen base model.

The base takes part in the forward and the backward pass but gets no gradients of its own weights, and its output head,
often the largest layer, only runs where there is a token to learn.
"""

import inspect
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import count, islice
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from adapters.config import AdapterConfig
from adapters.data import IGNORED, Batch, Example, batches
from adapters.folder import write_adapter
from adapters.lora import LoRALinear, inject_lora, target_modules
from adapters.train_config import TrainConfig


class TrainingDiverged(RuntimeError):
    """The loss is no longer a number."""


@dataclass(frozen=True, slots=True)
class StepReport:
    """What a step did; `eval_loss` is there if the step was followed by an evaluation. Losses are nats a token."""

    step: int  # from 1
    num_steps: int
    loss: float
    eval_loss: float | None
    num_tokens: int  # trained on so far, without padding
    seconds: float  # since the start


@dataclass(frozen=True, slots=True)
class TrainResult:
    """The trained layers, which are in the model with their best weights, and how they came about."""

    layers: dict[str, LoRALinear]
    reports: list[StepReport]
    best_step: int

    @property
    def last(self) -> StepReport:
        return self.reports[-1]


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
    layers = inject_lora(
        model,
        config.targets,
        rank=config.rank,
        alpha=config.alpha,
        dropout=config.dropout,
        rslora=config.rslora,
        generator=torch.Generator().manual_seed(config.seed),
    )
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = AdamW(parameters, lr=config.learning_rate, weight_decay=config.weight_decay)

    pad_id = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    make_batches = partial(batches, batch_tokens=config.batch_tokens, pad_id=pad_id, device=model.device)
    eval_batches = make_batches(eval_examples)
    steps_per_epoch = math.ceil(len(make_batches(train_examples)) / config.accumulate)
    num_steps = config.max_steps or config.epochs * steps_per_epoch
    schedule = LambdaLR(optimizer, lambda step: warmup_cosine(step, num_steps, config.warmup))

    best = _Best(parameters)
    reports: list[StepReport] = []
    num_tokens, start = 0, time.perf_counter()
    model.train()
    for step, group in enumerate(islice(_groups(train_examples, make_batches, config), num_steps), start=1):
        loss = _backward(model, group)
        if not math.isfinite(loss):
            raise TrainingDiverged(
                f"step {step}: the loss is {loss}; lower the learning rate of {config.learning_rate:g}"
            )
        nn.utils.clip_grad_norm_(parameters, config.clip_norm)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        num_tokens += sum(int(batch.attention_mask.sum()) for batch in group)

        eval_loss = None
        if eval_batches and (step % config.eval_every == 0 or step == num_steps):
            eval_loss = evaluate(model, eval_batches)
            best.offer(eval_loss, step)
        reports.append(StepReport(step, num_steps, loss, eval_loss, num_tokens, time.perf_counter() - start))
        progress(reports[-1])
        if config.patience and best.num_worse == config.patience:
            break
    model.eval()
    best.restore()
    return TrainResult(layers, reports, best.step or reports[-1].step)


def completion_loss(model: PreTrainedModel, batch: Batch) -> Tensor:
    """Cross entropy in nats, summed over the tokens with loss.

    The output head runs at the positions that some example of the batch predicts a target from, and at no other.
    """
    kept = (batch.labels[:, 1:] != IGNORED).any(dim=0).nonzero().squeeze(1)  # [num_kept]
    narrow = {"logits_to_keep": kept} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}
    output = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False, **narrow)
    logits = output.logits if narrow else output.logits[:, kept]  # [num_examples, num_kept, vocabulary]
    targets = batch.labels[:, kept + 1]
    return functional.cross_entropy(
        logits.flatten(0, 1).float(), targets.flatten(), ignore_index=IGNORED, reduction="sum"
    )


@torch.no_grad()
def evaluate(model: PreTrainedModel, eval_batches: Sequence[Batch]) -> float:
    """Mean loss per token with loss, without dropout; the model comes back in the mode it was in."""
    was_training = model.training
    model.eval()
    total = sum(completion_loss(model, batch).item() for batch in eval_batches)
    model.train(was_training)
    return total / sum(batch.num_targets for batch in eval_batches)


def warmup_cosine(step: int, num_steps: int, warmup: float) -> float:
    """Factor of the peak learning rate at `step` (from 0): up in a line over the `warmup` share, down as a cosine."""
    num_warmup = round(warmup * num_steps)
    if step < num_warmup:
        return (step + 1) / (num_warmup + 1)
    return 0.5 + 0.5 * math.cos(math.pi * (step - num_warmup) / max(1, num_steps - num_warmup))


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


def _backward(model: PreTrainedModel, group: Sequence[Batch]) -> float:
    """Adds the gradients of a step's mean loss per token with loss, and returns that loss."""
    num_targets = sum(batch.num_targets for batch in group)
    total = 0.0
    for batch in group:
        loss = completion_loss(model, batch) / num_targets
        loss.backward()
        total += loss.item()
    return total


class _Best:
    """The weights with the lowest evaluation loss so far."""

    def __init__(self, parameters: Sequence[nn.Parameter]) -> None:
        self.parameters = parameters
        self.weights: list[Tensor] = []
        self.loss = math.inf
        self.step = 0
        self.num_worse = 0  # evaluations since then

    def offer(self, loss: float, step: int) -> None:
        self.num_worse += 1
        if loss < self.loss:
            self.loss, self.step, self.num_worse = loss, step, 0
            self.weights = [parameter.detach().clone() for parameter in self.parameters]

    @torch.no_grad()
    def restore(self) -> None:
        for parameter, weight in zip(self.parameters, self.weights, strict=False):  # none before the first evaluation
            parameter.copy_(weight)


def _groups(
    examples: Sequence[Example], make_batches: Callable[..., list[Batch]], config: TrainConfig
) -> Iterator[Sequence[Batch]]:
    """The batches of one step after the other, in a new order every epoch, without end."""
    for epoch in count():
        order = make_batches(examples, seed=hash((config.seed, epoch)))  # of integers: the same in every process
        yield from (order[first : first + config.accumulate] for first in range(0, len(order), config.accumulate))

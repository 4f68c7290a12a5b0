"""One adapter in training: its optimizer, its batches, and how far it has come."""

import math
from collections.abc import Callable, Iterator, Sequence
from itertools import count

import torch
from torch import Tensor, nn
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR

from adapters.data import Batch, Example
from adapters.lora import LoRALinear
from adapters.train_config import TrainConfig
from adapters.train_job import StepReport, TrainingDiverged, TrainJob, TrainResult

MakeBatches = Callable[..., list[Batch]]  # `data.batches` for one model: takes examples, and a seed


class Learner:
    """Owns the optimizer and the best weights of one adapter, whose layers are in the model while it learns."""

    def __init__(self, layers: dict[str, LoRALinear], job: TrainJob, make_batches: MakeBatches) -> None:
        config = job.config
        self.eval_batches = make_batches(job.eval_examples)
        self._layers, self._job = layers, job
        self._parameters = [
            parameter for layer in layers.values() for parameter in layer.parameters() if parameter.requires_grad
        ]
        steps_per_epoch = math.ceil(len(make_batches(job.train_examples)) / config.accumulate)
        self._num_steps = config.max_steps or config.epochs * steps_per_epoch
        self._optimizer = AdamW(self._parameters, lr=config.learning_rate, weight_decay=config.weight_decay, fused=True)
        self._schedule = LambdaLR(self._optimizer, lambda step: warmup_cosine(step, self._num_steps, config.warmup))
        self._groups = groups(job.train_examples, make_batches, config)
        self._best = _Best(self._parameters)
        self._num_tokens = 0
        self._reports: list[StepReport] = []

    @property
    def is_done(self) -> bool:
        patience = self._job.config.patience
        return len(self._reports) == self._num_steps or 0 < patience == self._best.num_worse

    def next_group(self) -> Sequence[Batch]:
        """The batches of the step that comes."""
        return next(self._groups)

    def learn(self, loss: float, group: Sequence[Batch]) -> None:
        """Follows the gradients that the layers have, of the mean loss over the group.

        Raises:
            TrainingDiverged: the loss is not finite.
        """
        if not math.isfinite(loss):
            name = f"{self._job.name}: " if self._job.name else ""
            raise TrainingDiverged(
                f"{name}step {len(self._reports) + 1}: the loss is {loss}; lower the learning rate of "
                f"{self._job.config.learning_rate:g}"
            )
        nn.utils.clip_grad_norm_(self._parameters, self._job.config.clip_norm)
        self._optimizer.step()
        self._schedule.step()
        self._optimizer.zero_grad()
        self._num_tokens += sum(int(batch.attention_mask.sum()) for batch in group)

    @property
    def is_to_be_evaluated(self) -> bool:
        """Whether the step that is being made is followed by an evaluation."""
        step = len(self._reports) + 1
        return bool(self.eval_batches) and (step % self._job.config.eval_every == 0 or step == self._num_steps)

    def end_step(self, loss: float, eval_loss: float | None, seconds: float) -> StepReport:
        report = StepReport(len(self._reports) + 1, self._num_steps, loss, eval_loss, self._num_tokens, seconds)
        self._reports.append(report)
        if eval_loss is not None:
            self._best.offer(eval_loss, report.step)
        return report

    def finish(self) -> TrainResult:
        """Gives the layers their best weights, or leaves them the last ones where nothing was evaluated."""
        self._best.restore()
        return TrainResult(self._layers, self._reports, self._best.step or len(self._reports))


def warmup_cosine(step: int, num_steps: int, warmup: float) -> float:
    """Factor of the peak learning rate at `step` (from 0): up in a line over the `warmup` share, down as a cosine."""
    num_warmup = round(warmup * num_steps)
    if step < num_warmup:
        return (step + 1) / (num_warmup + 1)
    return 0.5 + 0.5 * math.cos(math.pi * (step - num_warmup) / max(1, num_steps - num_warmup))


def groups(examples: Sequence[Example], make_batches: MakeBatches, config: TrainConfig) -> Iterator[Sequence[Batch]]:
    """The batches of one step after the other, in a new order every epoch, without end."""
    for epoch in count():
        order = make_batches(examples, seed=hash((config.seed, epoch)))  # of integers: the same in every process
        yield from (order[first : first + config.accumulate] for first in range(0, len(order), config.accumulate))


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

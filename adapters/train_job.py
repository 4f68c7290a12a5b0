"""What goes into the training of an adapter, and what comes out."""

from collections.abc import Sequence
from dataclasses import dataclass

from adapters.data import Example
from adapters.lora import LoRALinear
from adapters.train_config import TrainConfig


class TrainingDiverged(RuntimeError):
    """The loss is no longer a number."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainJob:
    """What one adapter is to learn, and how; errors begin with `name`, if it has one."""

    train_examples: Sequence[Example]
    eval_examples: Sequence[Example]
    config: TrainConfig
    name: str = ""


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
    """The trained layers with their best weights, and how they came about."""

    layers: dict[str, LoRALinear]
    reports: list[StepReport]
    best_step: int

    @property
    def last(self) -> StepReport:
        return self.reports[-1]

"""How an adapter is trained. Kept free of torch, so that the command line can read it at no cost."""

from dataclasses import dataclass
from typing import Annotated


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainConfig:
    """Every setting, once: the flags of `loraplex train` and their help come from these fields."""

    rank: Annotated[int, "Inner width of the bypass."] = 8
    alpha: Annotated[float, "The bypass is scaled by alpha / rank."] = 16.0
    rslora: Annotated[bool, "Scale by alpha / √rank instead."] = False
    dropout: Annotated[float, "Share of the bypass's inputs that is dropped in training."] = 0.05
    targets: Annotated[tuple[str, ...], "Layers to adapt: names or ends of names, or all-linear."] = ("all-linear",)
    learning_rate: Annotated[float, "Peak learning rate."] = 1e-3
    warmup: Annotated[float, "Share of the steps in which the learning rate rises; then it falls as a cosine."] = 0.1
    weight_decay: Annotated[float, "Weight decay of the bypass."] = 0.0
    clip_norm: Annotated[float, "Largest norm of a step's gradient."] = 1.0
    epochs: Annotated[int, "Passes over the training data."] = 3
    max_steps: Annotated[int, "Number of steps, whatever the epochs; 0: what the epochs take."] = 0
    batch_tokens: Annotated[int, "Tokens of a batch, padding included."] = 1024
    accumulate: Annotated[int, "Batches of a step."] = 1
    max_tokens: Annotated[int, "Longest record allowed, in tokens."] = 1024
    eval_every: Annotated[int, "Steps between evaluations; there is one at the end as well."] = 20
    patience: Annotated[int, "Evaluations without a better loss before training stops; 0: never stop."] = 3
    seed: Annotated[int, "Of the initial bypass, the order of the data, its split, and the dropout."] = 0

    def __post_init__(self) -> None:
        for name in (
            "rank",
            "alpha",
            "learning_rate",
            "clip_norm",
            "epochs",
            "batch_tokens",
            "accumulate",
            "eval_every",
        ):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} is {getattr(self, name)}; more than 0 is needed")
        for name in ("dropout", "warmup"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; at least 0 and less than 1 is needed")

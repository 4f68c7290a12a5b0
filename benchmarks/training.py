"""Training on Loraplex and on PEFT with transformers' Trainer: the same steps from the same weights, and their time."""

import json
import statistics
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

from adapters.data import Batch, Example, batches, padding_of, read_examples
from adapters.learner import groups
from adapters.tasks import write_task
from adapters.train import inject, save_adapter
from adapters.train_config import TrainConfig
from benchmarks import peers
from benchmarks.process import run_process

_PEER = Path(peers.__file__).with_name("peft_training.py")


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """Adapters to train, equal but for their data; adapter i learns task i mod the number of them."""

    tasks: Sequence[str]
    jobs: int
    rank: int
    batch_tokens: int
    steps: int

    @property
    def config(self) -> TrainConfig:
        """No dropout, which draws other numbers there, and no warm-up, which is counted otherwise there."""
        return TrainConfig(
            rank=self.rank,
            alpha=2 * self.rank,
            dropout=0.0,
            warmup=0.0,
            batch_tokens=self.batch_tokens,
            max_steps=self.steps,
        )


def measure_training(
    model: Path,
    work: Work,
    peft: Path | None,
    *,
    rounds: int,
    threads: int,
    timeout: int,
    progress: Callable[[str], None],
) -> dict[str, Any]:
    """Trains on each in turn, `rounds` times, every time in a process of its own; see `summary`.

    Raises:
        RunFailed: one did not come to its end.
    """
    with tempfile.TemporaryDirectory() as folder:
        job = str(_write_job(Path(folder), model, work, threads))
        commands = {"loraplex": [sys.executable, "-m", "benchmarks.own_training", job]}
        if peft:
            commands["peft"] = [str(peft), "-I", "-B", str(_PEER), job]
        runs: dict[str, list[dict[str, Any]]] = {name: [] for name in commands}
        for number in range(1, rounds + 1):
            for name, command in commands.items():
                runs[name].append(run_process(command, threads=threads, timeout=timeout))
                progress(f"round {number}: {name} {_rate(runs[name][-1]):.0f} tokens/s")
    return summary(runs)


def summary(runs: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """Tokens/s without padding, by contender; the ratios round by round; first and last losses of each job."""
    rates = {name: [_rate(run) for run in of_one] for name, of_one in runs.items()}
    result: dict[str, Any] = {
        "tok_s": {name: statistics.median(of_one) for name, of_one in rates.items()},
        "losses": {name: [[losses[0], losses[-1]] for losses in of_one[0]["losses"]] for name, of_one in runs.items()},
        "versions": {name: of_one[0]["version"] for name, of_one in runs.items()},
    }
    if "peft" in rates:
        ratios = [own / theirs for own, theirs in zip(rates["loraplex"], rates["peft"], strict=True)]
        result |= {"ratio": statistics.median(ratios), "ratios": [min(ratios), max(ratios)]}
        result["largest_difference_of_losses"] = max(
            abs(own - theirs)
            for of_own, of_theirs in zip(runs["loraplex"][0]["losses"], runs["peft"][0]["losses"], strict=True)
            for own, theirs in zip(of_own, of_theirs, strict=True)
        )
    return result


def _rate(run: dict[str, Any]) -> float:
    rate: float = run["tokens"] / run["seconds"]
    return rate


def _write_job(folder: Path, model: Path, work: Work, threads: int) -> Path:
    """Examples for Loraplex; for the peer the batches that Loraplex makes of them, and the weights it begins with."""
    tokenizer, config = AutoTokenizer.from_pretrained(model), work.config
    make_batches = partial(batches, batch_tokens=config.batch_tokens, pad_id=padding_of(tokenizer))
    examples: list[list[Example]] = []
    for number in range(work.jobs):
        write_task(work.tasks[number % len(work.tasks)], folder / str(number), seed=number)
        examples.append(read_examples(folder / str(number) / "train.jsonl", tokenizer, config.max_tokens))
    _write_first_weights(folder / "adapter", model, config)
    job = {
        "model": str(model),
        "threads": threads,
        "config": asdict(config),
        "examples": [[(example.input_ids, example.labels) for example in of_job] for of_job in examples],
        "adapter": str(folder / "adapter"),
        "learning_rate": config.learning_rate,
        "batches": [
            [_as_lists(batch) for (batch,) in islice(groups(of_job, make_batches, config), work.steps)]
            for of_job in examples
        ],
    }
    path = folder / "job.json"
    path.write_text(json.dumps(job))
    return path


def _write_first_weights(folder: Path, model: Path, config: TrainConfig) -> None:
    transformers.utils.logging.disable_progress_bar()
    base = AutoModelForCausalLM.from_pretrained(model)
    save_adapter(folder, base, inject(base, config), config, str(model))


def _as_lists(batch: Batch) -> dict[str, Any]:
    return {name: getattr(batch, name).tolist() for name in ("input_ids", "attention_mask", "labels")}

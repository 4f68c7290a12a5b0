"""PEFT under transformers' Trainer, in its own environment: `python -I …/peft_training.py JOB.json`.

It trains one adapter at a time, so several come one after the other. Batches and first weights are given, and the rest
is set so that each step does what Loraplex's does. The result is the last line of standard output, as JSON.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import peft
import torch
import transformers


class Clock(transformers.TrainerCallback):
    """When each step ended."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.times.append(time.perf_counter())


def main(job_file: str) -> None:
    job = json.loads(Path(job_file).read_text())
    torch.set_num_threads(job["threads"])
    runs = [train(job, batches) for batches in job["batches"]]
    result = {
        "version": f"peft {peft.__version__}, transformers {transformers.__version__}, torch {torch.__version__}",
        "tokens": sum(tokens for tokens, _, _ in runs),
        "seconds": sum(seconds for _, seconds, _ in runs),
        "losses": [losses for _, _, losses in runs],
    }
    print(json.dumps(result), flush=True)


def train(job: dict[str, Any], batches: list[dict[str, Any]]) -> tuple[int, float, list[float]]:
    """Tokens, without padding, and seconds of all steps after the first, which warms up; the loss of every step."""
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(job["model"], dtype=torch.float32)
    model = peft.PeftModel.from_pretrained(model, job["adapter"], is_trainable=True)
    clock = Clock()
    with tempfile.TemporaryDirectory() as folder:
        trainer = transformers.Trainer(
            model=model,
            args=transformers.TrainingArguments(
                output_dir=folder,
                max_steps=len(batches),
                per_device_train_batch_size=1,  # an item is a batch
                train_sampling_strategy="sequential",
                learning_rate=job["learning_rate"],
                lr_scheduler_type="cosine",
                logging_steps=1,
                save_strategy="no",
                remove_unused_columns=False,
                use_cpu=True,
                disable_tqdm=True,
            ),
            train_dataset=[{name: torch.tensor(rows) for name, rows in batch.items()} for batch in batches],
            data_collator=lambda items: items[0],
            callbacks=[clock],
        )
        trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    tokens = sum(sum(map(sum, batch["attention_mask"])) for batch in batches[1:])
    return tokens, clock.times[-1] - clock.times[0], losses


if __name__ == "__main__":
    main(*sys.argv[1:])

"""Trains the jobs of a file at once, in this process: `python -m benchmarks.own_training JOB.json`.

The result is the last line of standard output, as JSON.
"""

import json
import sys
from importlib.metadata import version
from pathlib import Path

from server.openmp import bound_spinning


def main(job_file: str) -> None:
    bound_spinning()
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from adapters.data import Example
    from adapters.train import train_many
    from adapters.train_config import TrainConfig
    from adapters.train_job import TrainJob

    job = json.loads(Path(job_file).read_text())
    torch.set_num_threads(job["threads"])
    config = TrainConfig(**job["config"])
    jobs = [
        TrainJob(
            train_examples=[Example(tuple(ids), tuple(labels)) for ids, labels in examples],
            eval_examples=[],
            config=config,
        )
        for examples in job["examples"]
    ]
    model = AutoModelForCausalLM.from_pretrained(job["model"], dtype=torch.float32)
    results = train_many(model, AutoTokenizer.from_pretrained(job["model"]), jobs)
    firsts, lasts = [result.reports[0] for result in results], [result.last for result in results]
    found = {
        "version": f"loraplex {version('loraplex')}, torch {torch.__version__}",
        "tokens": sum(last.num_tokens - first.num_tokens for first, last in zip(firsts, lasts, strict=True)),
        "seconds": lasts[-1].seconds - firsts[-1].seconds,  # the first step warms up
        "losses": [[report.loss for report in result.reports] for result in results],
    }
    print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])

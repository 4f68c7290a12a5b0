"""Runs one job on one peer, with the Python of the peer's own environment: `python -I …/peers NAME JOB.json`.

Everything in this folder imports the standard library and the peer, nothing else: the rest of the project is not
installed there. The result is the last line of standard output, as JSON.
"""

from __future__ import annotations

import gc
import importlib
import json
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

WARM_UP_TOKENS = 8

Generate = Callable[[int], list[list[int]]]  # number of tokens → the tokens of every request
Loaded = tuple[str, Generate]
"""What a peer's `load(job)` gives: its versions, and the function that runs all requests at once, greedily."""


@dataclass(frozen=True)
class Job:
    """All requests are there at once, each on an adapter, or on the base where there are no adapters."""

    model: str  # a folder or file in the peer's own format
    adapters: list[str]  # the same
    choices: list[int]  # the adapter of each request, by its place; none of none
    prompts: list[list[int]]  # all of one length
    output_tokens: int  # of every request, no early stop
    threads: int
    options: dict[str, str]

    def groups(self) -> list[tuple[int | None, list[int]]]:
        """Adapter index (None: the base) and its requests, for peers that run one adapter after the other."""
        if not self.adapters:
            return [(None, list(range(len(self.prompts))))]
        return [
            (index, [row for row, choice in enumerate(self.choices) if choice == index])
            for index in sorted(set(self.choices))
        ]


def main(peer: str, job_file: str) -> None:
    job = Job(**json.loads(Path(job_file).read_text()))
    load: Callable[[Job], AbstractContextManager[Loaded]] = importlib.import_module(f"{peer}_peer").load
    with load(job) as (version, generate):
        generate(min(WARM_UP_TOKENS, job.output_tokens))
        gc.collect()
        started = time.perf_counter()
        outputs = generate(job.output_tokens)
        wall = time.perf_counter() - started
    print(json.dumps({"version": version, "wall_s": wall, "outputs": outputs}), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])

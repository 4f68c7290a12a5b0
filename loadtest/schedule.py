"""A workload as a list of arrivals: pure, and the same for the same seed."""

import csv
import math
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import numpy.typing as npt

from loadtest.workload import Workload, WorkloadError

Ids = npt.NDArray[np.int64]
Seconds = npt.NDArray[np.float64]

_TRACE_COLUMNS = ("TIMESTAMP", "ContextTokens", "GeneratedTokens")


@dataclass(frozen=True, slots=True)
class Arrival:
    """One request to be sent."""

    due: float  # seconds from the start; of no meaning in a closed loop
    adapter: str  # empty: the base model
    prompt: int  # which prompt; equal numbers and lengths are equal tokens
    prompt_tokens: int
    output_tokens: int


@dataclass(frozen=True, slots=True)
class Schedule:
    """All arrivals of a run, in the order of time."""

    arrivals: tuple[Arrival, ...]
    unplayed: int = 0  # items of a trace after `num_requests` or `duration`
    dropped: int = 0  # items of a trace that are too long for the server

    @property
    def span(self) -> float:
        """Seconds from the start to the last arrival."""
        return self.arrivals[-1].due


def make_schedule(workload: Workload, adapters: Sequence[str], max_model_len: int) -> Schedule:
    """Draws a workload.

    Args:
        adapters: names of adapters 0, 1, …; the most popular first. Empty: the base model.
        max_model_len: most tokens of a request, prompt and output, on this server.

    Raises:
        WorkloadError: the trace cannot be read, or requests are too long for the server.
    """
    # One legacy generator and this order of draws: the same arrivals as S-LoRA's own script with the same seed.
    random = np.random.RandomState(workload.seed % 2**32)
    due, prompts, outputs, unplayed = _trace(workload) if workload.trace else (None, None, None, 0)
    total = workload.total if due is None else len(due)
    ids = _adapter_ids(workload, total, max(len(adapters), 1), random)
    if due is None or prompts is None or outputs is None:
        prompts, outputs = _lengths(workload, total, random)
        longest = int((prompts + outputs).max())
        if longest > max_model_len:
            raise WorkloadError(
                f"requests of up to {longest:,} tokens, and the server takes {max_model_len:,}: lower prompt_tokens "
                "and output_tokens (max_tokens with punica lengths), or raise the server's --max-model-len"
            )
        due = _arrival_times(workload, total, random)
    if workload.drift_seconds and adapters:
        ids = (ids + (due // workload.drift_seconds).astype(np.int64)) % len(adapters)
    names = list(adapters) or [""]
    arrivals = tuple(
        Arrival(float(due[i]), names[ids[i]], i, int(prompts[i]), int(outputs[i]))
        for i in range(total)
        if prompts[i] + outputs[i] <= max_model_len
    )
    if not arrivals:
        raise WorkloadError(f"{workload.trace}: no item fits into {max_model_len:,} tokens (--max-model-len)")
    return Schedule(arrivals, unplayed, dropped=total - len(arrivals))


def _adapter_ids(workload: Workload, total: int, num_adapters: int, random: np.random.RandomState) -> Ids:
    if workload.popularity == "power":  # P(id < k) = (k / n) ** alpha
        return (random.power(workload.alpha, total) * num_adapters).astype(np.int64)
    if workload.popularity == "distinct":  # in turn: none comes again while another has not come
        return np.arange(total) % num_adapters
    sizes = group_sizes(workload.popularity, total, num_adapters)
    ids = np.repeat(np.arange(len(sizes)), sizes) % num_adapters
    random.shuffle(ids)
    return ids


def group_sizes(popularity: str, total: int, num_adapters: int) -> list[int]:
    """Requests per adapter in Punica's classes, the most popular first; `skewed` is its `zipf:1.5`.

    `skewed` may have more groups than there are adapters: each takes every n-th, and shares still grow by about 1.5.
    """
    if popularity == "identical":
        return [total]
    if popularity == "uniform":
        count = min(math.ceil(math.sqrt(total)), num_adapters)
        return [total // count + (index < total % count) for index in range(count)]
    sizes: list[int] = []
    while sum(sizes) + (size := math.floor(1.5 ** len(sizes))) < total:
        sizes.append(size)
    return sorted([*sizes, total - sum(sizes)], reverse=True)


def _lengths(workload: Workload, total: int, random: np.random.RandomState) -> tuple[Ids, Ids]:
    if workload.lengths == "uniform":
        prompts = random.randint(*workload.prompt_tokens, total)
        return prompts, random.randint(*workload.output_tokens, total)
    # Punica: a log-normal prompt, then an end drawn over the whole context.
    rng = np.random.Generator(np.random.PCG64(workload.seed))
    limit = workload.max_tokens
    prompts = np.clip(-1 + 18 * np.exp(0.8 * rng.standard_normal(total)), 1, limit - 2).astype(np.int64)
    ends = np.maximum(prompts + 2, rng.integers(0, limit, total))
    return prompts, ends - prompts


def _arrival_times(workload: Workload, total: int, random: np.random.RandomState) -> Seconds:
    if workload.concurrency:
        return np.zeros(total)
    shape = 1 / workload.cv**2
    return np.cumsum(random.gamma(shape, workload.cv**2 / workload.rate, total))


def _trace(workload: Workload) -> tuple[Seconds, Ids, Ids, int]:
    """Arrivals and lengths of a trace, stretched to the rate and cut; the number of items that were cut off."""
    path = Path(workload.trace)
    times, prompts, outputs = [], [], []
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            rows = csv.DictReader(file)
            if missing := set(_TRACE_COLUMNS) - set(rows.fieldnames or ()):
                raise WorkloadError(f"{path}: no column {', '.join(sorted(missing))}; a trace has {_TRACE_COLUMNS}")
            for row in rows:
                try:
                    stamp = datetime.fromisoformat(row["TIMESTAMP"])
                    times.append((stamp if stamp.tzinfo else stamp.replace(tzinfo=UTC)).timestamp())
                    prompts.append(max(1, int(row["ContextTokens"])))
                    outputs.append(max(1, int(row["GeneratedTokens"])))
                except (ValueError, TypeError) as error:
                    raise WorkloadError(f"{path}, line {rows.line_num}: {error}") from error
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise WorkloadError(f"cannot read trace {path}: {error}") from error
    if len(times) < 2:
        raise WorkloadError(f"{path}: a trace needs at least two items")
    order = np.argsort(times, kind="stable")[: workload.num_requests or None]
    due = np.asarray(times)[order]
    due = due - due[0]
    if workload.rate and due[-1]:
        due = due * ((len(due) - 1) / due[-1] / workload.rate)
    if workload.duration:
        order, due = order[due <= workload.duration], due[due <= workload.duration]
    return due, np.asarray(prompts)[order], np.asarray(outputs)[order], len(times) - len(due)

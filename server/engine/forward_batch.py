"""From a scheduled batch to the flat tensors of one forward. A pure function; engine thread only."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain, groupby, zip_longest
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from server.engine.scheduler import ScheduledRequest
from server.kernels import Pass, Segment
from server.lora.adapter import Adapter

Bypass = tuple[int, float]  # an adapter slot, and the factor on its output


class Run(NamedTuple):
    """Rows in a row that take the same bypasses."""

    bypasses: tuple[Bypass, ...]
    num_rows: int


class MergedAdapter(NamedTuple):
    """An adapter that is part of the base's weights for now, and the slot that holds it too."""

    adapter: Adapter
    slot: int


@dataclass(frozen=True, slots=True)
class ForwardBatch:
    """All tokens of a step in one row: the requests one after another, each with the tokens that it computes."""

    input_ids: Tensor  # [1, num_tokens] int64
    position_ids: Tensor  # [1, num_tokens] int64
    slot_mapping: Tensor  # [num_tokens] int64: where each token's K and V go, block * block_size + offset
    query_start_loc: Tensor  # [num_requests + 1] int32: where each request's tokens start
    context_lens: Tensor  # [num_requests] int32: tokens in the cache after this step
    block_tables: Tensor  # [num_requests, most blocks of a request] int32, padded with 0
    logits_indices: Tensor  # [num_sampled] int64: rows whose logits are needed
    passes: tuple[Pass, ...]  # the bypasses that tokens take; none in a step without adapters
    logits_passes: tuple[Pass, ...]  # the same over the rows of logits_indices
    query_lens: tuple[int, ...]  # host copies for loops over requests
    kv_lens: tuple[int, ...]

    @property
    def num_tokens(self) -> int:
        return int(self.input_ids.shape[1])

    @property
    def decodes(self) -> bool:
        """Whether every request computes a single token and samples the next."""
        return self.num_tokens == len(self.query_lens) == len(self.logits_indices)


def build_forward_batch(
    scheduled: Sequence[ScheduledRequest],
    block_size: int,
    device: torch.device,
    *,
    merged: MergedAdapter | None = None,
    all_logits: bool = False,
) -> ForwardBatch:
    """Builds the tensors of a step for requests that are ordered by adapter slot.

    With an adapter `merged` into the base's weights its own requests take no bypass, all others take it away first.
    `all_logits` asks for the logits of each request's last row even where it does not sample yet.
    """
    requests = [item.request for item in scheduled]
    query_lens = np.array([item.num_tokens for item in scheduled], dtype=np.int64)
    computed = np.array([request.num_computed_tokens for request in requests], dtype=np.int64)
    starts = np.concatenate(([0], np.cumsum(query_lens)))
    num_tokens = int(starts[-1])

    token_ids = np.fromiter(
        chain.from_iterable(
            item.request.token_ids[
                item.request.num_computed_tokens : item.request.num_computed_tokens + item.num_tokens
            ]
            for item in scheduled
        ),
        dtype=np.int64,
        count=num_tokens,
    )
    request_of_token = np.repeat(np.arange(len(requests)), query_lens)
    positions = np.arange(num_tokens) + np.repeat(computed - starts[:-1], query_lens)

    block_tables = np.zeros((len(requests), max(len(request.block_table) for request in requests)), dtype=np.int32)
    for row, request in enumerate(requests):
        block_tables[row, : len(request.block_table)] = request.block_table
    slot_mapping = block_tables[request_of_token, positions // block_size].astype(np.int64) * block_size
    slot_mapping += positions % block_size

    sampled = [row for row, item in enumerate(scheduled) if item.samples or all_logits]
    runs = [_runs(item, merged) for item in scheduled]

    def to_device(array: np.ndarray) -> Tensor:
        return torch.from_numpy(array).to(device, non_blocking=True)

    return ForwardBatch(
        input_ids=to_device(token_ids)[None],
        position_ids=to_device(positions)[None],
        slot_mapping=to_device(slot_mapping),
        query_start_loc=to_device(starts.astype(np.int32)),
        context_lens=to_device((computed + query_lens).astype(np.int32)),
        block_tables=to_device(block_tables),
        logits_indices=to_device(starts[1:][sampled] - 1),
        passes=_passes(list(chain.from_iterable(runs))),
        logits_passes=_passes([Run(runs[row][-1].bypasses, 1) for row in sampled]),
        query_lens=tuple(query_lens.tolist()),
        kv_lens=tuple((computed + query_lens).tolist()),
    )


def _runs(item: ScheduledRequest, merged: MergedAdapter | None) -> list[Run]:
    """A request's tokens of this step: those before its adapters work, and those from there on."""
    request = item.request
    correction = () if merged is None else ((merged.slot, -1.0),)
    own = tuple((slot, part.weight) for slot, part in zip(request.adapter_slots, request.adapters, strict=True))
    is_merged = merged is not None and request.sole_adapter is merged.adapter
    num_before = min(item.num_tokens, max(0, request.adapted_from - request.num_computed_tokens))
    before = Run(correction, num_before)
    after = Run(() if is_merged else (*correction, *own), item.num_tokens - num_before)
    return [run for run in (before, after) if run.num_rows]


def _passes(runs: Sequence[Run]) -> tuple[Pass, ...]:
    """The n-th pass holds every row's n-th bypass, neighbours with the same one in one segment."""
    lengths = [run.num_rows for run in runs]
    return tuple(_segments(nth, lengths) for nth in zip_longest(*(run.bypasses for run in runs)))


def _segments(bypasses: Sequence[Bypass | None], lengths: Sequence[int]) -> Pass:
    segments, start = [], 0
    for bypass, run in groupby(zip(bypasses, lengths, strict=True), key=lambda pair: pair[0]):
        end = start + sum(length for _, length in run)
        if bypass is not None:
            slot, scale = bypass
            segments.append(Segment(slot, start, end, scale))
        start = end
    return tuple(segments)

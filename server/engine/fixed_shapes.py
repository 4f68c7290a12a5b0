"""Decode steps padded to a few sizes, in tensors that stay in place: what CUDA graphs need. Engine thread only."""

from dataclasses import replace

import torch

from server.engine.forward_batch import ForwardBatch


class FixedShapes:
    """Owns the tensors of decode steps, one row for each request or for nobody.

    Rows of nobody compute one token without an adapter, over a KV block that belongs to no request.
    """

    def __init__(
        self, *, max_num_seqs: int, max_blocks: int, block_size: int, padding_block: int, device: torch.device
    ) -> None:
        """
        Args:
            max_blocks: most KV blocks of a request.
            padding_block: a KV block that no request is ever given.
        """
        self.sizes = _sizes(max_num_seqs)
        self._padding_block = padding_block
        self._padding_slot = padding_block * block_size
        largest = self.sizes[-1]
        self._input_ids = torch.zeros(largest, dtype=torch.int64, device=device)
        self._position_ids = torch.zeros(largest, dtype=torch.int64, device=device)
        self._slot_mapping = torch.full((largest,), self._padding_slot, dtype=torch.int64, device=device)
        self._context_lens = torch.ones(largest, dtype=torch.int32, device=device)
        self._block_tables = torch.full((largest, max_blocks), padding_block, dtype=torch.int32, device=device)
        self._query_start_loc = torch.arange(largest + 1, dtype=torch.int32, device=device)
        self._rows = torch.arange(largest, device=device)

    def pad(self, batch: ForwardBatch) -> ForwardBatch | None:
        """Writes a step into the tensors and pads it to the next size; None: it is no decode step, or does not fit."""
        num_requests, num_blocks = batch.block_tables.shape
        if not batch.decodes or num_requests > self.sizes[-1] or num_blocks > self._block_tables.shape[1]:
            return None
        size = next(size for size in self.sizes if size >= num_requests)
        for buffer, rows, padding in (
            (self._input_ids, batch.input_ids[0], 0),
            (self._position_ids, batch.position_ids[0], 0),
            (self._slot_mapping, batch.slot_mapping, self._padding_slot),
            (self._context_lens, batch.context_lens, 1),
            (self._block_tables[:, :num_blocks], batch.block_tables, self._padding_block),
        ):
            buffer[:num_requests].copy_(rows)
            buffer[num_requests:size].fill_(padding)
        return replace(
            self.step(size),
            passes=batch.passes,
            logits_passes=batch.logits_passes,
            kv_lens=batch.kv_lens + (1,) * (size - num_requests),
        )

    def step(self, size: int) -> ForwardBatch:
        """The tensors' first `size` rows as a step without adapters, whatever they hold."""
        return ForwardBatch(
            input_ids=self._input_ids[None, :size],
            position_ids=self._position_ids[None, :size],
            slot_mapping=self._slot_mapping[:size],
            query_start_loc=self._query_start_loc[: size + 1],
            context_lens=self._context_lens[:size],
            block_tables=self._block_tables[:size],
            logits_indices=self._rows[:size],
            passes=(),
            logits_passes=(),
            query_lens=(1,) * size,
            kv_lens=(1,) * size,
        )


def _sizes(largest: int) -> tuple[int, ...]:
    """Powers of two below the largest size, and that one."""
    return *(1 << power for power in range((largest - 1).bit_length())), largest

"""Which KV blocks are free. Ids only; engine thread only."""


class BlockAllocator:
    """Owns the ids of all KV blocks. A block is either free or in exactly one request's block table."""

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size  # tokens
        self._free = list(range(num_blocks - 1, -1, -1))  # popped from the end: low ids first

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def usage(self) -> float:
        """Share of blocks in use, 0 to 1."""
        return 1 - len(self._free) / self.num_blocks

    def num_blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size)

    def grow(self, block_table: list[int], num_tokens: int) -> bool:
        """Extends `block_table` to hold `num_tokens`; leaves it as it is and says False when blocks run out."""
        missing = self.num_blocks_for(num_tokens) - len(block_table)
        if missing > len(self._free):
            return False
        block_table.extend(self._free.pop() for _ in range(missing))
        return True

    def release(self, block_table: list[int]) -> None:
        """Takes all blocks of a table back and empties it."""
        self._free.extend(reversed(block_table))
        block_table.clear()

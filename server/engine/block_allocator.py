"""Which KV blocks are free, in use, or kept for whoever needs the same prefix. Ids only; engine thread only."""

from collections import OrderedDict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import NamedTuple


class IdentityChange(NamedTuple):
    """From a token on, other weights compute a sequence's K and V than before it."""

    token: int
    identity: Hashable


@dataclass(slots=True)
class _Content:
    """What a full block holds: its tokens, after everything that its parent stands for."""

    key: tuple[Hashable, tuple[int, ...]]  # what it follows: parent's serial, or the identity; this block's tokens
    serial: int  # names this content for ever: a block that is reused never passes for its old self


class BlockAllocator:
    """Owns the ids of all KV blocks and counts their users.

    A full block stays known by its content after its last user is gone, until the block is needed for something else;
    the least recently used one goes first. Content is matched exactly, as a chain of whole blocks from the start of the
    sequence under an identity (which weights computed it, for whom), so requests of different identity never share.
    Where the identity changes within a sequence, the blocks before the change are shared under the first one.
    """

    def __init__(self, num_blocks: int, block_size: int, *, prefix_cache: bool = True) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size  # tokens
        self._prefix_cache = prefix_cache
        self._num_users = [0] * num_blocks
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(num_blocks))  # the next to be taken first
        self._contents: dict[int, _Content] = {}  # of full blocks
        self._blocks: dict[tuple[Hashable, tuple[int, ...]], int] = {}  # content key → block
        self._num_serials = 0

    @property
    def num_free(self) -> int:
        """Blocks without a user, those with known content included."""
        return len(self._free)

    @property
    def usage(self) -> float:
        """Share of blocks in use, 0 to 1."""
        return 1 - len(self._free) / self.num_blocks

    def grow(self, block_table: list[int], num_tokens: int) -> bool:
        """Extends `block_table` to hold `num_tokens`; leaves it as it is and says False when blocks run out."""
        missing = -(-num_tokens // self.block_size) - len(block_table)
        if missing > len(self._free):
            return False
        for _ in range(missing):
            block, _ = self._free.popitem(last=False)
            self._forget(block)
            self._num_users[block] = 1
            block_table.append(block)
        return True

    def release(self, block_table: list[int]) -> None:
        """Gives up one use of every block of a table, and empties it."""
        for block in reversed(block_table):  # the end of a sequence is the first to be forgotten
            self._num_users[block] -= 1
            if not self._num_users[block]:
                self._free[block] = None
                if block not in self._contents:
                    self._free.move_to_end(block, last=False)
        block_table.clear()

    def share(self, identity: Hashable, token_ids: Sequence[int], change: IdentityChange | None = None) -> list[int]:
        """A block table with the longest known prefix of `token_ids`; the last token is left to be computed."""
        block_table: list[int] = []
        parent = identity
        for end in range(self.block_size, len(token_ids), self.block_size):
            parent = self._changed(parent, end - self.block_size, change)
            block = self._blocks.get((parent, tuple(token_ids[end - self.block_size : end])))
            if block is None:
                break
            self._free.pop(block, None)
            self._num_users[block] += 1
            block_table.append(block)
            parent = self._contents[block].serial
        return block_table

    def publish(
        self,
        identity: Hashable,
        token_ids: Sequence[int],
        block_table: Sequence[int],
        computed: int,
        change: IdentityChange | None = None,
    ) -> None:
        """Makes the full blocks known among the first `computed` tokens of a sequence."""
        if not self._prefix_cache:
            return
        parent = identity
        for index in range(computed // self.block_size):
            block = block_table[index]
            content = self._contents.get(block)
            if content is None:
                parent = self._changed(parent, index * self.block_size, change)
                key = (parent, tuple(token_ids[index * self.block_size : (index + 1) * self.block_size]))
                if key in self._blocks:
                    return  # somebody computed the same beside us; theirs is the one that is shared
                self._num_serials += 1
                content = self._contents[block] = _Content(key, self._num_serials)
                self._blocks[key] = block
            parent = content.serial

    def _changed(self, parent: Hashable, start: int, change: IdentityChange | None) -> Hashable:
        """What the block from token `start` on follows: the first one after a change, or over it, follows that too."""
        if change is not None and start <= change.token < start + self.block_size:
            return parent, change
        return parent

    def _forget(self, block: int) -> None:
        content = self._contents.pop(block, None)
        if content is not None:
            del self._blocks[content.key]

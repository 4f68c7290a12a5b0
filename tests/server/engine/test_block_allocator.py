"""KV blocks over plain ids: taken, shared, kept for later, forgotten in order."""

from server.engine.block_allocator import BlockAllocator, IdentityChange


def filled(allocator: BlockAllocator, identity: object, token_ids: list[int]) -> list[int]:
    """A sequence that starts from what is known and computes the rest."""
    table = allocator.share(identity, token_ids)
    assert allocator.grow(table, len(token_ids))
    allocator.publish(identity, token_ids, table, len(token_ids))
    return table


def test_blocks_run_out_and_come_back() -> None:
    allocator = BlockAllocator(3, block_size=4)
    table: list[int] = []
    assert allocator.grow(table, 9)
    assert len(set(table)) == 3
    assert not allocator.grow([], 1)
    assert allocator.grow(table, 12)
    assert allocator.usage == 1
    allocator.release(table)
    assert table == []
    assert allocator.num_free == 3


def test_a_prefix_is_shared_while_in_use_and_after() -> None:
    allocator = BlockAllocator(8, block_size=4)
    first = filled(allocator, "a", list(range(10)))
    second = filled(allocator, "a", [*range(8), 90, 91])
    assert second[:2] == first[:2]
    assert second[2] != first[2]
    allocator.release(first)
    allocator.release(second)
    assert allocator.num_free == 8
    assert len(allocator.share("a", list(range(10)))) == 2


def test_the_last_token_is_always_computed() -> None:
    allocator = BlockAllocator(8, block_size=4)
    allocator.release(filled(allocator, "a", list(range(8))))
    assert len(allocator.share("a", list(range(8)))) == 1
    assert len(allocator.share("a", list(range(9)))) == 2


def test_nothing_is_shared_across_identities_or_positions() -> None:
    allocator = BlockAllocator(16, block_size=4)
    filled(allocator, "a", list(range(12)))
    assert allocator.share("b", list(range(12))) == []
    assert allocator.share("a", list(range(4, 12))) == [], "the same tokens after another beginning"
    assert allocator.share("a", [99, *range(1, 12)]) == []


def test_the_least_recently_used_content_is_forgotten_first() -> None:
    allocator = BlockAllocator(4, block_size=4)
    for old in [filled(allocator, name, list(range(5))) for name in "ab"]:  # two blocks each, the second not full
        allocator.release(old)
    table: list[int] = []
    assert allocator.grow(table, 8), "blocks without content go first"
    allocator.release(allocator.share("a", list(range(5))))  # a is used again
    assert allocator.grow(table, 12)
    assert allocator.share("b", list(range(5))) == []
    assert len(allocator.share("a", list(range(5)))) == 1


def test_a_reused_block_never_passes_for_its_old_self() -> None:
    """A child outlives its parent in the table of contents; it must not be found under the parent's successor."""
    allocator = BlockAllocator(2, block_size=4)
    table = filled(allocator, "a", list(range(8)))
    allocator.release(table[:1])
    del table[0]
    other: list[int] = []
    assert allocator.grow(other, 4)  # takes the parent's block
    allocator.publish("a", [7, 7, 7, 7], other, 4)
    assert len(allocator.share("a", [7, 7, 7, 7, 4, 5, 6, 7, 0])) == 1


def test_blocks_before_a_change_of_identity_are_shared_under_the_first() -> None:
    allocator, token_ids = BlockAllocator(16, block_size=4), list(range(16))
    change = IdentityChange(6, "adapter")  # in the second block
    table: list[int] = []
    assert allocator.grow(table, 16)
    allocator.publish("base", token_ids, table, 8, change)
    allocator.publish("base", token_ids, table, 16, change)
    assert allocator.share("base", token_ids, change) == table[:3]
    for other in (None, IdentityChange(6, "other"), IdentityChange(5, "adapter"), IdentityChange(16, "adapter")):
        assert allocator.share("base", token_ids, other) == table[:1], other
    assert allocator.share("base", token_ids, IdentityChange(0, "adapter")) == []
    assert allocator.share("other", token_ids, change) == []


def test_it_can_be_switched_off() -> None:
    allocator = BlockAllocator(8, block_size=4, prefix_cache=False)
    filled(allocator, "a", list(range(10)))
    assert allocator.share("a", list(range(10))) == []

"""Native paged attention against plain torch, on every instruction set this processor has."""

import math

import pytest
import torch
from torch import Tensor

from server.kernels import native_attention

pytestmark = pytest.mark.usefixtures("isa")


class Sequences:
    """Sequences of keys and values in a cache whose blocks are shuffled; blocks of no sequence hold NaN."""

    def __init__(self, lengths: list[int], kv_heads: int, head_dim: int, dtype: torch.dtype = torch.float32) -> None:
        self.lengths = lengths
        self.keys = [torch.randn(length, kv_heads, head_dim).to(dtype).float() for length in lengths]
        self.values = [torch.randn(length, kv_heads, head_dim).to(dtype).float() for length in lengths]
        blocks = [-(-length // native_attention.BLOCK_SIZE) for length in lengths]
        order = torch.randperm(sum(blocks) + 2, dtype=torch.int32)
        self.cache = native_attention.KVCacheLayer(len(order), kv_heads, head_dim, dtype)
        self.cache.keys.fill_(math.nan)
        self.cache.values.fill_(math.nan)
        self.block_tables = torch.full((len(lengths), max(blocks)), -1, dtype=torch.int32)
        for row, pieces in zip(self.block_tables, order.split([*blocks, 2])[:-1], strict=True):
            row[: len(pieces)] = pieces
        for sequence, length in enumerate(lengths):
            self.store(sequence, 0, length)

    def store(self, sequence: int, start: int, end: int) -> None:
        positions = torch.arange(start, end)
        blocks = self.block_tables[sequence].long()[positions // native_attention.BLOCK_SIZE]
        mapping = blocks * native_attention.BLOCK_SIZE + positions % native_attention.BLOCK_SIZE
        native_attention.write_kv(self.cache, self.keys[sequence][start:end], self.values[sequence][start:end], mapping)

    def attend(
        self, queries: list[Tensor], starts: list[int], options: native_attention.AttentionOptions
    ) -> list[Tensor]:
        """The outputs of each sequence's queries [n, heads, head_dim] from position start on, in one call."""
        sizes = [len(query) for query in queries]
        batch = native_attention.AttentionBatch(
            self.block_tables,
            torch.tensor([0, *sizes]).cumsum(0).int(),
            torch.cat([torch.arange(start, start + size) for start, size in zip(starts, sizes, strict=True)]),
        )
        out = native_attention.paged_attention(torch.cat(queries), self.cache, options, batch)
        return list(out.split(sizes))

    def reference(
        self,
        sequence: int,
        query: Tensor,
        start: int,
        scaling: float,
        softcap: float | None = None,
        window: int | None = None,
        sinks: Tensor | None = None,
    ) -> Tensor:
        group = query.shape[1] // self.keys[sequence].shape[1]
        keys = self.keys[sequence].double().repeat_interleave(group, dim=1)
        values = self.values[sequence].double().repeat_interleave(group, dim=1)
        scores = torch.einsum("thd,shd->hts", query.double(), keys) * scaling
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        distance = torch.arange(start, start + len(query))[:, None] - torch.arange(len(keys))
        visible = distance >= 0 if window is None else (distance >= 0) & (distance < window)
        scores = scores.masked_fill(~visible, -math.inf)
        if sinks is not None:
            column = sinks.double()[:, None, None].expand(-1, len(query), 1)
            scores = torch.cat([scores, column], dim=2)
        weights = scores.softmax(dim=2)[:, :, : len(keys)]
        return torch.einsum("hts,shd->thd", weights, values)


@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim"),
    [(9, 3, 64), (8, 1, 80), (7, 1, 24), (4, 4, 8), (2, 1, 128), (3, 1, 96), (14, 2, 40), (1, 1, 256)],
)
@pytest.mark.parametrize("variant", ["plain", "softcap", "window", "sinks", "all"])
def test_attention(heads: int, kv_heads: int, head_dim: int, variant: str) -> None:
    softcap = 5.0 if variant in ("softcap", "all") else None
    window = 37 if variant in ("window", "all") else None
    sinks = torch.randn(heads) if variant in ("sinks", "all") else None
    sequences = Sequences([1, 5, 16, 130, 100], kv_heads, head_dim)
    starts = [0, 0, 15, 0, 63]  # a prompt of one, whole prompts, decode, a chunk
    queries = [
        2 * torch.randn(length - start, heads, head_dim)
        for start, length in zip(starts, sequences.lengths, strict=True)
    ]
    scaling = head_dim**-0.5
    options = native_attention.AttentionOptions(heads, scaling, softcap=softcap, sliding_window=window, sinks=sinks)
    for sequence, out in enumerate(sequences.attend(queries, starts, options)):
        expected = sequences.reference(sequence, queries[sequence], starts[sequence], scaling, softcap, window, sinks)
        torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("head_dim", [64, 72, 80, 96, 128])
@pytest.mark.parametrize("window", [None, 37])
def test_attention_on_a_bfloat16_cache(head_dim: int, window: int | None) -> None:
    sequences = Sequences([70, 9], 2, head_dim, torch.bfloat16)
    queries = [torch.randn(length, 6, head_dim) for length in sequences.lengths]
    outs = sequences.attend(queries, [0, 0], native_attention.AttentionOptions(6, 0.1, sliding_window=window))
    for sequence, out in enumerate(outs):
        expected = sequences.reference(sequence, queries[sequence], 0, 0.1, window=window)
        torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("head_dim", [64, 80, 96, 128])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("window", [None, 50])
def test_attention_rows_do_not_depend_on_chunks_or_batch(window: int | None, dtype: torch.dtype, head_dim: int) -> None:
    heads, lengths = 6, [150, 33, 90]
    sequences = Sequences(lengths, 2, head_dim, dtype)
    options = native_attention.AttentionOptions(heads, 0.125, sliding_window=window, sinks=torch.randn(heads))
    queries = [torch.randn(length, heads, head_dim) for length in lengths]
    whole = sequences.attend(queries, [0, 0, 0], options)
    for _ in range(4):
        starts = [int(torch.randint(0, length, ()).item()) for length in lengths]
        ends = [
            int(torch.randint(start + 1, length + 1, ()).item()) for start, length in zip(starts, lengths, strict=True)
        ]
        chunks = [query[start:end] for query, start, end in zip(queries, starts, ends, strict=True)]
        for out, expected, start, end in zip(
            sequences.attend(chunks, starts, options), whole, starts, ends, strict=True
        ):
            assert torch.equal(out, expected[start:end])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("window", [None, 1100])
@pytest.mark.parametrize("has_sinks", [False, True])
def test_parts_of_a_long_context_are_joined(has_sinks: bool, window: int | None, dtype: torch.dtype) -> None:
    """The same bits whether a task has all parts of the keys, in a prompt, or each has its own, in decoding."""
    heads, lengths = 6, [2200, 40, 1025]
    sequences = Sequences(lengths, 2, 64, dtype)
    sinks = 3 * torch.randn(heads) if has_sinks else None
    options = native_attention.AttentionOptions(heads, 0.125, sliding_window=window, sinks=sinks)
    queries = [torch.randn(length, heads, 64) for length in lengths]
    whole = sequences.attend(queries, [0, 0, 0], options)
    for sequence, out in enumerate(whole):
        expected = sequences.reference(sequence, queries[sequence], 0, 0.125, window=window, sinks=sinks)
        torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-5)
    for sizes in ([1, 1, 1], [3, 2, 1], [16, 1, 2], [1200, 1, 1]):
        starts = [length - size for length, size in zip(lengths, sizes, strict=True)]
        chunks = [query[start:] for query, start in zip(queries, starts, strict=True)]
        for out, expected, start in zip(sequences.attend(chunks, starts, options), whole, starts, strict=True):
            assert torch.equal(out, expected[start:])
    early = sequences.attend([queries[0][1023:1025], queries[1], queries[2][:1]], [1023, 0, 0], options)
    assert torch.equal(early[0], whole[0][1023:1025])


def test_attention_does_not_read_past_its_own_position() -> None:
    sequences = Sequences([80], 1, 64)
    queries = [torch.randn(80, 2, 64)]
    options = native_attention.AttentionOptions(2, 0.125)
    (clean,) = sequences.attend(queries, [0], options)
    sequences.keys[0][70:], sequences.values[0][70:] = math.nan, math.inf
    sequences.store(0, 70, 80)
    (out,) = sequences.attend(queries, [0], options)
    assert torch.equal(out[:70], clean[:70])
    assert out[70:].isnan().all()


def test_write_kv_skips_negative_positions_and_takes_strides() -> None:
    cache = native_attention.KVCacheLayer(2, 2, 8)
    k, v = torch.randn(3, 40)[:, 4:20].unflatten(1, (2, 8)), torch.randn(3, 2, 8)
    native_attention.write_kv(cache, k, v, torch.tensor([5, -1, 30]))
    assert torch.equal(cache.keys[0, :, :, 5], k[0])
    assert torch.equal(cache.values[1, :, 14, :8], v[2])
    assert int((cache.values != 0).sum()) == 32

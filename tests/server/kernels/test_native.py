"""The native CPU kernels against plain torch, on every instruction set this processor has."""

import math
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from server.kernels import LayerWeights, Segment, Storage, native, native_attention, native_fused, native_lora
from server.kernels.torch_ops import TorchEmbeddingBypass, add_lora

pytestmark = pytest.mark.skipif(not native.available(), reason="the native kernels are not built")

STORAGES: list[Storage] = ["float32", "bfloat16", "int8"]


def supported_isas() -> list[str]:
    """The instruction sets of this processor that the kernels are built for, the widest first."""
    every = ["avx512_bf16", "avx512", "avx2", "generic"]
    return every[every.index(native.isa()) :] if native.available() else every


@pytest.fixture(params=supported_isas(), autouse=True)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    name: str = request.param
    native.set_isa(name)
    torch.manual_seed(0)
    yield name
    native.set_isa(None)


def random_split(total: int) -> list[int]:
    """Sizes of random pieces of `total`."""
    sizes: list[int] = []
    while sum(sizes) < total:
        sizes.append(min(int(torch.randint(1, 40, ()).item()), total - sum(sizes)))
    return sizes


# ---------------------------------------------------------------------------------------------------- packed linear


def as_multiplied(x: Tensor, storage: Storage) -> Tensor:
    """x as a layer reads it: processors that multiply pairs of bfloat16 round it for weights of that type."""
    return x.bfloat16().float() if storage == "bfloat16" and native.isa() == "avx512_bf16" else x


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize(
    ("out_features", "in_features"), [(576, 192), (192, 576), (33, 17), (100, 301), (1, 5), (16, 1)]
)
def test_linear(out_features: int, in_features: int, storage: Storage) -> None:
    weight, bias = torch.randn(out_features, in_features), torch.randn(out_features)
    packed = native.pack_linear(weight, bias, storage)
    reference = packed.unpack().double()
    tolerance = {"float32": 0.0, "bfloat16": 2**-8, "int8": 0.5 / 127}[storage]
    assert (reference - weight).abs().max() <= tolerance * weight.abs().max() + 1e-12
    for rows in (1, 2, 3, 4, 7, 16, 17, 25, 200):
        x = torch.randn(rows, in_features)
        expected = as_multiplied(x, storage).double() @ reference.T + bias
        torch.testing.assert_close(native.linear(x, packed).double(), expected, rtol=1e-5, atol=1e-4)


def test_linear_packs_transposed_parameters() -> None:
    weight, bias = torch.nn.Parameter(torch.randn(40, 50)), torch.nn.Parameter(torch.randn(50))
    packed = native.pack_linear(weight.T, bias)
    assert torch.equal(packed.unpack(), weight.T)
    x = torch.randn(3, 40)
    y = native.linear(x, packed)
    assert not y.requires_grad
    torch.testing.assert_close(y, x @ weight.detach() + bias.detach())


def test_linear_takes_bfloat16_weights_and_leading_dimensions() -> None:
    weight = torch.randn(48, 64, dtype=torch.bfloat16)
    x = torch.randn(1, 5, 64)
    packed = native.pack_linear(weight, storage="bfloat16")
    assert torch.equal(packed.unpack(), weight.float())
    torch.testing.assert_close(native.linear(x, packed), as_multiplied(x, "bfloat16") @ weight.float().T)


@pytest.mark.parametrize("storage", STORAGES)
def test_linear_rows_do_not_depend_on_their_batch(storage: Storage) -> None:
    packed = native.pack_linear(torch.randn(90, 300), torch.randn(90), storage)
    x = torch.randn(900, 300)
    whole = native.linear(x, packed)
    for _ in range(3):
        pieces = [native.linear(piece, packed) for piece in x.split(random_split(900))]
        assert torch.equal(torch.cat(pieces), whole)


def test_linear_bits_do_not_depend_on_threads_or_grouping() -> None:
    layers = [native.pack_linear(torch.randn(out, 300)) for out in (90, 32, 7)]
    x = torch.randn(50, 300)
    expected = [native.linear(x, layer) for layer in layers]
    threads = torch.get_num_threads()
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            for y, alone in zip(native.linear_many(x, native.LinearGroup(layers)), expected, strict=True):
                assert torch.equal(y, alone)
    finally:
        torch.set_num_threads(threads)


# ---------------------------------------------------------------------------------------------------- LoRA

POPULARITY = {
    "distinct": [1] * 12,
    "identical": [70],
    "uniform": [5, 5, 5, 5],
    "skewed": [40, 9, 3, 1, 1],
}


class Adapters:
    """Slots of two layers that share x, with a rank of its own in each, and their reference."""

    def __init__(self, ranks: list[int], in_features: int, outs: tuple[int, ...], dtype: torch.dtype) -> None:
        self.layers = [native_lora.LoRASlots(in_features, out, len(ranks)) for out in outs]
        self.group = native_lora.LoRAGroup(self.layers)
        for layer in self.layers:
            for slot, rank in enumerate(ranks):
                a = torch.randn(rank, in_features).to(dtype) / math.sqrt(in_features)
                b = torch.randn(rank, layer.out_features).to(dtype)
                layer.set(slot, LayerWeights(a, b, 0.5 + slot))

    def reference(self, layer: int, slot: int, x: Tensor) -> Tensor:
        weights = self.layers[layer].weights[slot]
        assert weights is not None
        return weights.scaling * (x.double() @ weights.lora_a.double().T) @ weights.lora_b.double()


def segments_of(lengths: list[int], start: int = 2) -> list[Segment]:
    """One segment a slot, in order, after `start` rows without an adapter."""
    segments = []
    for slot, length in enumerate(lengths):
        segments.append(Segment(slot, start, start + length, 0.5 - slot % 2))
        start += length
    return segments


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("popularity", POPULARITY)
@pytest.mark.parametrize(("in_features", "outs"), [(96, (64, 144)), (37, (19, 100))])
def test_add_lora(in_features: int, outs: tuple[int, ...], popularity: str, dtype: torch.dtype) -> None:
    lengths = POPULARITY[popularity]
    ranks = [(8, 1, 16, 3, 64, 13)[slot % 6] for slot in range(len(lengths))]
    adapters = Adapters(ranks, in_features, outs, dtype)
    segments = segments_of(lengths)
    x = torch.randn(segments[-1].end + 3, in_features)
    before = [torch.randn(len(x), out) for out in outs]
    ys = [y.clone() for y in before]
    native_lora.add_lora(ys, x, adapters.group, native_lora.Segments(segments))
    for layer, (y, base) in enumerate(zip(ys, before, strict=True)):
        expected = base.double()
        for slot, start, end, scale in segments:
            expected[start:end] += scale * adapters.reference(layer, slot, x[start:end])
        torch.testing.assert_close(y.double(), expected, rtol=1e-5, atol=1e-4)
        assert torch.equal(y[:2], base[:2])
        assert torch.equal(y[-3:], base[-3:])


def test_add_lora_halves_are_exact() -> None:
    numbers = [1.0, -2.5, 65504.0, 6e-8, -3.0e-5, 0.0, math.inf, math.nan]
    layer = native_lora.LoRASlots(1, 8, 1)
    b = torch.tensor([numbers], dtype=torch.float16)
    layer.set(0, LayerWeights(torch.ones(1, 1, dtype=torch.float16), b, 1.0))
    y = torch.zeros(1, 8)
    native_lora.add_lora(
        [y], torch.ones(1, 1), native_lora.LoRAGroup([layer]), native_lora.Segments([Segment(0, 0, 1)])
    )
    expected = torch.tensor([numbers], dtype=torch.float16).float()
    assert torch.equal(y.nan_to_num(7.0), expected.nan_to_num(7.0))


@pytest.mark.parametrize("rank", [0, 5])
@pytest.mark.parametrize("extras", [(True, False), (False, True), (True, True)])
def test_add_lora_scales_and_shifts_what_comes_out(rank: int, extras: tuple[bool, bool]) -> None:
    """DoRA's output scale and a bias, with and without a bypass, whole and row by row; an emptied slot has neither."""
    layer = native_lora.LoRASlots(37, 75, 1)
    scale, bias = (torch.randn(75) if wanted else None for wanted in extras)
    layer.set(0, LayerWeights(torch.randn(rank, 37), torch.randn(rank, 75), 0.5, scale, bias))
    group, x, base = native_lora.LoRAGroup([layer]), torch.randn(20, 37), torch.randn(20, 75)
    reference, y, single = base.double(), base.clone(), base.clone()
    weights = layer.weights[0]
    assert weights is not None
    add_lora(reference, x.double(), [weights], [Segment(0, 3, 17, 2.0)])
    native_lora.add_lora([y], x, group, native_lora.Segments([Segment(0, 3, 17, 2.0)]))
    torch.testing.assert_close(y.double(), reference, rtol=1e-5, atol=1e-5)
    for row in range(3, 17):
        native_lora.add_lora([single], x, group, native_lora.Segments([Segment(0, row, row + 1, 2.0)]))
    assert torch.equal(single, y)
    layer.clear(0)
    after = base.clone()
    native_lora.add_lora([after], x, group, native_lora.Segments([Segment(0, 0, 20)]))
    assert torch.equal(after, base)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rank", [0, 1, 16, 21])
def test_add_embedding_lora(rank: int, dtype: torch.dtype) -> None:
    slots = native_lora.LoRASlots(50, 40, 2)
    weights = LayerWeights(
        torch.randn(rank, 50).to(dtype), torch.randn(rank, 40).to(dtype), 0.5, torch.randn(40), torch.randn(40)
    )
    slots.set(1, weights)
    token_ids, y = torch.randint(50, (12,)), torch.randn(12, 40)
    reference, single = y.double(), y.clone()
    bypass = TorchEmbeddingBypass(50, 40, 2)
    bypass.set_slot(1, weights)
    segments = [Segment(0, 0, 2), Segment(1, 2, 9, -1.5)]
    bypass(reference, token_ids, segments)
    native_lora.add_embedding_lora(y, token_ids, slots, native_lora.Segments(segments))
    torch.testing.assert_close(y.double(), reference, rtol=1e-5, atol=1e-5)
    for row in range(2, 9):
        native_lora.add_embedding_lora(single, token_ids, slots, native_lora.Segments([Segment(1, row, row + 1, -1.5)]))
    assert torch.equal(single, y)


def test_add_lora_rows_do_not_depend_on_their_segments() -> None:
    adapters = Adapters([13], 100, (90, 33), torch.float32)
    x = torch.randn(200, 100)
    whole = [torch.ones(200, 90), torch.ones(200, 33)]
    native_lora.add_lora(whole, x, adapters.group, native_lora.Segments([Segment(0, 0, 200)]))
    for _ in range(3):
        start, segments = 0, []
        for size in random_split(200):
            segments.append(Segment(0, start, start + size))
            start += size
        ys = [torch.ones(200, 90), torch.ones(200, 33)]
        native_lora.add_lora(ys, x, adapters.group, native_lora.Segments(segments))
        assert all(torch.equal(y, expected) for y, expected in zip(ys, whole, strict=True))


def test_add_lora_nan_stays_in_its_slot_and_empty_slots_add_nothing() -> None:
    adapters = Adapters([8, 8, 8], 32, (48,), torch.float32)
    x = torch.randn(9, 32)
    segments = native_lora.Segments([Segment(0, 0, 3), Segment(1, 3, 6), Segment(2, 6, 9)])
    clean = torch.zeros(9, 48)
    native_lora.add_lora([clean], x, adapters.group, segments)
    weights = adapters.layers[0].weights[1]
    assert weights is not None
    weights.lora_a.fill_(math.nan)
    y = torch.zeros(9, 48)
    native_lora.add_lora([y], x, adapters.group, segments)
    assert y[3:6].isnan().all()
    assert torch.equal(y[:3], clean[:3])
    assert torch.equal(y[6:], clean[6:])
    adapters.layers[0].clear(1)
    y = torch.zeros(9, 48)
    native_lora.add_lora([y], x, adapters.group, segments)
    assert torch.equal(y[3:6], torch.zeros(3, 48))


# ---------------------------------------------------------------------------------------------------- attention


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
    [(9, 3, 64), (8, 1, 80), (7, 1, 24), (4, 4, 8), (2, 1, 128), (14, 2, 40), (1, 1, 256)],
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


def test_attention_on_a_bfloat16_cache() -> None:
    sequences = Sequences([70, 9], 2, 72, torch.bfloat16)
    queries = [torch.randn(length, 6, 72) for length in sequences.lengths]
    outs = sequences.attend(queries, [0, 0], native_attention.AttentionOptions(6, 0.1))
    for sequence, out in enumerate(outs):
        torch.testing.assert_close(
            out.double(), sequences.reference(sequence, queries[sequence], 0, 0.1), rtol=1e-5, atol=1e-5
        )


@pytest.mark.parametrize("window", [None, 50])
def test_attention_rows_do_not_depend_on_chunks_or_batch(window: int | None) -> None:
    heads, head_dim, lengths = 6, 64, [150, 33, 90]
    sequences = Sequences(lengths, 2, head_dim)
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


# ---------------------------------------------------------------------------------------------------- small operations


@pytest.mark.parametrize(("rows", "n"), [(1, 576), (40, 576), (3, 37)])
def test_norms(rows: int, n: int) -> None:
    x, weight, bias, residual = torch.randn(rows, n), torch.randn(n), torch.randn(n), torch.randn(rows, n)
    expected = torch.nn.functional.rms_norm(x, (n,), weight, 1e-5)
    torch.testing.assert_close(native_fused.rms_norm(x, weight, 1e-5), expected)
    torch.testing.assert_close(
        native_fused.layer_norm(x, weight, bias, 1e-5), torch.nn.functional.layer_norm(x, (n,), weight, bias, 1e-5)
    )
    torch.testing.assert_close(
        native_fused.layer_norm(x, None, None, 1e-5), torch.nn.functional.layer_norm(x, (n,), None, None, 1e-5)
    )
    total = residual + x
    out = native_fused.rms_norm(x, weight, 1e-5, residual)
    assert torch.equal(residual, total)
    assert torch.equal(out, native_fused.rms_norm(total, weight, 1e-5))
    assert torch.equal(native_fused.rms_norm(total[-1:], weight, 1e-5), out[-1:])


@pytest.mark.parametrize(("head_dim", "rotary_dim"), [(64, 64), (80, 32), (24, 24)])
def test_rotary(head_dim: int, rotary_dim: int) -> None:
    tokens = 7
    packed = torch.randn(tokens, 3 * head_dim)
    q, k = packed[:, : 2 * head_dim].unflatten(1, (2, head_dim)), packed[:, 2 * head_dim :].unflatten(1, (1, head_dim))
    cos, sin = torch.randn(tokens, rotary_dim), torch.randn(tokens, rotary_dim)
    expected = []
    for x in (q, k):
        turned, rest = x.clone().split([rotary_dim, head_dim - rotary_dim], dim=2)
        first, second = turned.chunk(2, dim=2)
        turned = turned * cos[:, None] + torch.cat([-second, first], dim=2) * sin[:, None]
        expected.append(torch.cat([turned, rest], dim=2))
    native_fused.rotary(q, k, cos, sin)
    torch.testing.assert_close(q, expected[0])
    torch.testing.assert_close(k, expected[1])


@pytest.mark.parametrize(("rows", "n"), [(1, 64), (30, 1536), (2, 19)])
def test_gated_activations(rows: int, n: int) -> None:
    both = 6 * torch.randn(rows, 2 * n)
    both[0, :4] = torch.tensor([-200.0, 200.0, 0.0, -1e-3])
    gate, up = both.split(n, dim=1)
    silu = torch.nn.functional.silu(gate.double()) * up
    gelu = torch.nn.functional.gelu(gate.double(), approximate="tanh") * up
    torch.testing.assert_close(native_fused.silu_mul(gate, up).double(), silu, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(native_fused.gelu_tanh_mul(gate, up).double(), gelu, rtol=1e-6, atol=1e-6)

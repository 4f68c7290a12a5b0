"""The flat tensors of a step, by hand."""

import torch

from server.engine.forward_batch import MergedAdapter, build_forward_batch
from server.engine.request import Request, SamplingParams
from server.engine.scheduler import ScheduledRequest
from server.kernels import Segment
from server.lora.adapter import Adapter, WeightedAdapter

ADAPTER = Adapter("one", "1", 1, "", 8, (), {}, 0, 0)


def item(
    tokens: list[int],
    computed: int,
    num_tokens: int,
    blocks: list[int],
    adapter: Adapter = ADAPTER,
    **slots: float,
) -> ScheduledRequest:
    """`slots`: the weights of a request's adapters, by slot."""
    adapters = [WeightedAdapter(adapter, weight) for weight in slots.values()]
    request = Request(0, tokens, SamplingParams(), adapters, frozenset())
    request.num_computed_tokens, request.block_table = computed, blocks
    request.adapter_slots = tuple(int(name.removeprefix("slot")) for name in slots)
    return ScheduledRequest(request, num_tokens)


def test_every_tensor() -> None:
    batch = build_forward_batch(
        [
            item([10, 11, 12], computed=0, num_tokens=3, blocks=[7]),  # a whole prompt of the base
            item([20, 21, 22, 23, 24, 25], computed=5, num_tokens=1, blocks=[3, 1], slot0=1.0),  # decoding
            item([30, 31, 32, 33, 34, 35, 36], computed=2, num_tokens=3, blocks=[0, 2], slot0=1.0),  # a chunk
            item([40], computed=0, num_tokens=1, blocks=[5], slot2=1.0),
        ],
        block_size=4,
        device=torch.device("cpu"),
    )
    assert batch.input_ids.tolist() == [[10, 11, 12, 25, 32, 33, 34, 40]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 5, 2, 3, 4, 0]]
    assert batch.slot_mapping.tolist() == [28, 29, 30, 5, 2, 3, 8, 20]
    assert batch.query_start_loc.tolist() == [0, 3, 4, 7, 8]
    assert batch.context_lens.tolist() == [3, 6, 5, 1]
    assert batch.block_tables.tolist() == [[7, 0], [3, 1], [0, 2], [5, 0]]
    assert batch.logits_indices.tolist() == [2, 3, 7]
    assert batch.passes == ((Segment(0, 3, 7), Segment(2, 7, 8)),)
    assert batch.logits_passes == ((Segment(0, 1, 2), Segment(2, 2, 3)),)
    assert (batch.query_lens, batch.kv_lens) == ((3, 1, 3, 1), (3, 6, 5, 1))


def test_mixtures_take_one_pass_an_adapter() -> None:
    batch = build_forward_batch(
        [
            item([1, 2], computed=0, num_tokens=2, blocks=[0]),
            item([1, 2], computed=0, num_tokens=2, blocks=[1], slot0=0.5),
            item([1], computed=0, num_tokens=1, blocks=[2], slot0=0.5, slot3=-2.0, slot1=1.0),
            item([1], computed=0, num_tokens=1, blocks=[3], slot1=1.0, slot3=-2.0),
        ],
        block_size=4,
        device=torch.device("cpu"),
    )
    assert batch.passes == (
        (Segment(0, 2, 5, 0.5), Segment(1, 5, 6)),
        (Segment(3, 4, 6, -2.0),),
        (Segment(1, 4, 5),),
    )


def test_an_invoked_adapter_works_from_its_invocation_on() -> None:
    invoked = Adapter("two", "1", 2, "", 8, (), {}, 0, 0, invocation_tokens=(7, 9))
    tokens = [1, 7, 9, 2, 7, 9, 3]  # the last occurrence counts, at 4
    chunks = [
        item(tokens, computed=computed, num_tokens=num_tokens, blocks=[0, 1], adapter=invoked, slot0=1.0)
        for computed, num_tokens in ((0, 3), (2, 4), (4, 2), (6, 1))
    ]
    device = torch.device("cpu")
    batch = build_forward_batch(chunks, 4, device)
    assert batch.passes == ((Segment(0, 5, 10),),)
    assert batch.logits_passes == ((Segment(0, 0, 1),),)
    beside = build_forward_batch(chunks, 4, device, merged=MergedAdapter(ADAPTER, 8))
    assert beside.passes == ((Segment(8, 0, 10, -1.0),), (Segment(0, 5, 10),))
    into = build_forward_batch(chunks, 4, device, merged=MergedAdapter(invoked, 8))
    assert into.passes == ((Segment(8, 0, 5, -1.0),),)
    assert into.logits_passes == ()

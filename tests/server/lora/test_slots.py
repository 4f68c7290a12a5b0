"""Device slots over plain ids."""

from server.lora.adapter import Adapter
from server.lora.slots import AdapterSlots


def adapter(name: str) -> Adapter:
    return Adapter(name, "1", 1, "", 8, (), {}, 0, 0)


def test_a_slot_is_written_once_and_shared() -> None:
    slots, one = AdapterSlots(2), adapter("one")
    assert slots.acquire([one]) == [(0, True)]
    assert slots.acquire([one]) == [(0, False)]
    slots.release([one])
    slots.release([one])
    assert slots.acquire([one]) == [(0, False)], "an idle adapter keeps its slot"


def test_the_least_recently_used_idle_adapter_goes() -> None:
    slots, (a, b, c) = AdapterSlots(2), map(adapter, "abc")
    for item in (a, b):
        slots.acquire([item])
    assert slots.acquire([c]) is None, "both are in use"
    slots.release([b])
    slots.release([a])
    slots.acquire([a])
    assert slots.acquire([c]) == [(1, True)]
    assert slots.adapters() == [a, c]


def test_same_name_is_not_same_adapter() -> None:
    slots = AdapterSlots(2)
    assert slots.acquire([adapter("a")]) == [(0, True)]
    assert slots.acquire([adapter("a")]) == [(1, True)]


def test_remove_frees_only_what_is_idle() -> None:
    slots, one = AdapterSlots(1), adapter("one")
    slots.acquire([one])
    assert slots.remove(one) is None
    slots.release([one])
    assert slots.remove(one) == 0
    assert slots.remove(one) is None
    assert slots.acquire([adapter("two")]) == [(0, True)]

"""Which adapter sits in which device slot. Ids only; engine thread only."""

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

from server.lora.adapter import Adapter


@dataclass(slots=True)
class _Slot:
    index: int
    adapter: Adapter
    num_users: int = 0


class AdapterSlots:
    """Owns the map from adapters to device slots.

    A slot that no running request uses keeps its adapter until somebody needs the room; the least recently used one
    goes first. `acquire` and `release` come in pairs, one per running request with all the adapters that it mixes.
    """

    def __init__(self, num_slots: int) -> None:
        self.num_slots = num_slots
        self._slots: OrderedDict[Adapter, _Slot] = OrderedDict()  # least recently used first
        self._free = list(range(num_slots - 1, -1, -1))

    def acquire(self, adapters: Sequence[Adapter]) -> list[tuple[int, bool]] | None:
        """Each adapter's slot and whether its weights must be written there first; None, for all, if slots lack."""
        present = [slot for slot in self._slots.values() if slot.adapter in adapters]
        num_idle = sum(not slot.num_users for slot in self._slots.values() if slot.adapter not in adapters)
        if len(adapters) - len(present) > len(self._free) + num_idle:
            return None
        for slot in present:  # first, so that making room leaves them where they are
            slot.num_users += 1
        return [self._take(adapter) for adapter in adapters]

    def release(self, adapters: Sequence[Adapter]) -> None:
        for adapter in adapters:
            self._slots[adapter].num_users -= 1

    def remove(self, adapter: Adapter) -> int | None:
        """Frees the slot of an adapter that nobody uses; the slot's index, or None if there is nothing to free."""
        slot = self._slots.get(adapter)
        if slot is None or slot.num_users:
            return None
        del self._slots[adapter]
        self._free.append(slot.index)
        return slot.index

    def adapters(self) -> list[Adapter]:
        """The adapters that sit in a slot, the least recently used first."""
        return list(self._slots)

    def _take(self, adapter: Adapter) -> tuple[int, bool]:
        slot = self._slots.get(adapter)
        is_new = slot is None
        if slot is None:
            if not self._free:
                self.remove(next(slot.adapter for slot in self._slots.values() if not slot.num_users))
            slot = self._slots[adapter] = _Slot(self._free.pop(), adapter, num_users=1)
        self._slots.move_to_end(adapter)
        return slot.index, is_new

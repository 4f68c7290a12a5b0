"""What sits in the device's adapter slots. Engine thread; the snapshot may be read from any."""

import logging
from collections.abc import Iterable, Mapping

import torch

from server.adapter_metrics import AdapterMetrics
from server.engine.model_runner import ModelRunner
from server.lora.adapter import Adapter
from server.lora.slots import AdapterSlots

log = logging.getLogger(__name__)


class ResidentAdapters:
    """Writes and empties the slots that the scheduler gave out, and counts who came and went."""

    def __init__(self, runner: ModelRunner, slots: AdapterSlots, metrics: AdapterMetrics) -> None:
        self._runner = runner
        self._slots = slots
        self._metrics = metrics
        self.snapshot: frozenset[Adapter] = frozenset()  # replaced whole and never changed
        metrics.watch("device", lambda: self.snapshot)

    def write(self, slot_writes: Iterable[tuple[int, Adapter]]) -> dict[Adapter, float | None]:
        """Puts adapters into slots; says how many seconds each took, None where the device has no memory for it."""
        seconds: dict[Adapter, float | None] = {}
        for slot, adapter in slot_writes:
            try:
                seconds[adapter] = self._runner.write_slot(slot, adapter)
            except (MemoryError, torch.OutOfMemoryError):
                log.exception("no memory on the device for adapter %s", adapter.name)
                seconds[adapter] = None
        return seconds

    def book(self, written: Mapping[Adapter, float | None]) -> None:
        """The step for which slots were written has run."""
        if not written:
            return
        before = self.snapshot
        self._publish()
        for adapter, seconds in written.items():
            if seconds is not None:
                self._metrics.loaded(adapter.name, "device", seconds)
        for adapter in before - self.snapshot:
            self._metrics.evicted(adapter.name, "device")

    def empty(self, *adapters: Adapter) -> bool:
        """Takes adapters that no request uses out of their slots; says whether one of them sat in any."""
        slots = [slot for adapter in adapters if (slot := self._slots.remove(adapter)) is not None]
        for slot in slots:
            self._runner.lora.write(slot, None)
        self._publish()
        return bool(slots)

    def _publish(self) -> None:
        self.snapshot = frozenset(self._slots.adapters())

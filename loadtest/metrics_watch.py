"""The server's Prometheus endpoint during a run: its memory and its queue."""

import asyncio
import contextlib
import http.client
import time
import urllib.request
from collections.abc import AsyncIterator
from dataclasses import dataclass, field

from prometheus_client.parser import text_string_to_metric_families

from loadtest.observer import ServerUnreachable

_PERIOD = 1.0  # seconds between two samples
_TIMEOUT = 10.0  # seconds, of one
_MEMORY = "process_resident_memory_bytes"
_QUEUE = "queue_time_seconds"  # the end of the histogram's name, whatever its prefix


@dataclass(slots=True)
class MetricsWatch:
    """Owns the samples of a Prometheus endpoint, one a second; without a URL there are none."""

    url: str
    memory: list[tuple[float, float]] = field(default_factory=list)  # time.monotonic(), bytes
    _queue: list[tuple[float, float]] = field(default_factory=list)  # sum of seconds, number of requests
    _failures: list[str] = field(default_factory=list)  # of samples

    @contextlib.asynccontextmanager
    async def going_on(self) -> AsyncIterator[None]:
        """Samples before, during and after the block. Only the first one must succeed: it tells a wrong URL.

        Raises:
            ServerUnreachable
        """
        if not self.url:
            yield
            return
        await self._sample()
        watching = asyncio.create_task(self._watch())
        try:
            yield
        finally:
            watching.cancel()
            await asyncio.gather(watching, return_exceptions=True)
        await self._try_to_sample()

    @property
    def mean_queue_seconds(self) -> float | None:
        """Mean time in the server's queue between the first and the last sample; None if the server does not tell."""
        if not self._queue:
            return None
        (first_sum, first_count), (last_sum, last_count) = self._queue[0], self._queue[-1]
        return (last_sum - first_sum) / (last_count - first_count) if last_count > first_count else None

    @property
    def missed(self) -> str:
        """Which samples there are not, in one line; empty: all came."""
        if not self._failures:
            return ""
        return f"{len(self._failures)} samples of the metrics are missing, the last for: {self._failures[-1]}"

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(_PERIOD)
            await self._try_to_sample()

    async def _try_to_sample(self) -> None:
        try:
            await self._sample()
        except ServerUnreachable as error:
            self._failures.append(str(error))

    async def _sample(self) -> None:
        try:
            values = await asyncio.to_thread(_fetch, self.url)
        except (OSError, ValueError, http.client.HTTPException) as error:
            raise ServerUnreachable(f"--metrics-url {self.url}: {error or type(error).__name__}") from error
        if _MEMORY in values:
            self.memory.append((time.monotonic(), values[_MEMORY]))
        for name in values:
            if name.endswith(f"{_QUEUE}_sum"):
                self._queue.append((values[name], values[name.removesuffix("_sum") + "_count"]))


def _fetch(url: str) -> dict[str, float]:
    """Every metric by its name, summed over labels."""
    with urllib.request.urlopen(url, timeout=_TIMEOUT) as response:
        text: str = response.read().decode()
    values: dict[str, float] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            values[sample.name] = values.get(sample.name, 0.0) + sample.value
    return values

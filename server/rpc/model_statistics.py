"""How often models were asked through the Open Inference Protocol, and where the time went. Event loop only."""

import time
from collections.abc import Callable, Collection

from server.metrics import RequestTimer
from server.pb.inference import grpc_service_pb2 as pb

_FEW = 100  # models


class ModelStatistics:
    """Owns the counts, by model and version. Requests that a client gave up are not counted."""

    def __init__(self, exists: Callable[[str, str], bool]) -> None:
        """`exists`: whether there is such a version of such a model. The counts of others are dropped."""
        self._models: dict[tuple[str, str], pb.ModelStatistics] = {}
        self._exists = exists
        self._num_kept = _FEW

    def of(self, name: str, version: str) -> pb.ModelStatistics:
        return self._models.get((name, version)) or pb.ModelStatistics(name=name, version=version)

    def succeeded(self, name: str, version: str, started: float, timers: Collection[RequestTimer]) -> None:
        """Books a request that is answered by now.

        Args:
            started: when it came, by `time.monotonic`.
            timers: of its answers, at least one. Those of several run side by side, and count as one.
        """
        counts, ended = self._counts(name, version), time.monotonic()
        counts.inference_count += 1
        counts.execution_count += 1
        counts.last_inference = int(time.time() * 1e3)
        tokenized = min(timer.arrival for timer in timers)
        first_step = min(timer.first_step for timer in timers)
        last_token = max(timer.last_token for timer in timers)
        stats = counts.inference_stats
        _count(stats.success, ended - started)
        _count(stats.compute_input, tokenized - started)
        _count(stats.queue, first_step - tokenized)
        _count(stats.compute_infer, last_token - first_step)
        _count(stats.compute_output, ended - last_token)

    def failed(self, name: str, version: str, started: float) -> None:
        _count(self._counts(name, version).inference_stats.fail, time.monotonic() - started)

    def _counts(self, name: str, version: str) -> pb.ModelStatistics:
        if (name, version) not in self._models and len(self._models) >= 2 * self._num_kept:  # seldom: it looks at all
            self._models = {model: counts for model, counts in self._models.items() if self._exists(*model)}
            self._num_kept = max(len(self._models), _FEW)
        return self._models.setdefault((name, version), self.of(name, version))


def _count(duration: pb.StatisticDuration, seconds: float) -> None:
    duration.count += 1
    duration.ns += int(seconds * 1e9)

"""How often models were asked through the Open Inference Protocol, and how long it took. Event loop only."""

import time

from server.pb.inference import grpc_service_pb2 as pb


class ModelStatistics:
    """Owns the counts, by model and version. Requests that a client gave up are not counted."""

    def __init__(self) -> None:
        self._models: dict[tuple[str, str], pb.ModelStatistics] = {}

    def of(self, name: str, version: str) -> pb.ModelStatistics:
        return self._models.get((name, version)) or pb.ModelStatistics(name=name, version=version)

    def succeeded(self, name: str, version: str, seconds: float) -> None:
        counts = self._models.setdefault((name, version), self.of(name, version))
        counts.inference_count += 1
        counts.last_inference = int(time.time() * 1e3)
        _count(counts.inference_stats.success, seconds)

    def failed(self, name: str, version: str, seconds: float) -> None:
        counts = self._models.setdefault((name, version), self.of(name, version))
        _count(counts.inference_stats.fail, seconds)


def _count(duration: pb.StatisticDuration, seconds: float) -> None:
    duration.count += 1
    duration.ns += int(seconds * 1e9)

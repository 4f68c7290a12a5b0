"""Adapters chosen by their ranks, and what is said of ranks. A server knows the rank of what it has loaded once."""

from collections import Counter
from collections.abc import Iterable, Mapping

import grpc

from loadtest.workload import Numbers, WorkloadError
from server.pb.loraplex.v1.adapters_pb2 import PinAdapterRequest, UnpinAdapterRequest
from server.pb.loraplex.v1.adapters_pb2_grpc import AdaptersStub

_TIMEOUT = 300.0  # seconds, of loading one adapter


async def choose_by_rank(stub: AdaptersStub, known: Mapping[str, int], ranks: Numbers, count: int) -> dict[str, int]:
    """Adapters with their ranks, which are `ranks` in turn.

    Adapters of unknown rank are loaded until there are enough; one that cannot be loaded is left out.

    Args:
        known: every adapter's rank; 0: unknown.
        count: how many to choose; -1: as many full turns as there are.

    Raises:
        WorkloadError: there are too few.
        grpc.aio.AioRpcError: the server does not answer.
    """
    wanted = [ranks[index % len(ranks)] for index in range(count)]
    needed = Counter(wanted)
    found: dict[int, list[str]] = {rank: [] for rank in ranks}
    for name, rank in known.items():
        if count >= 0 and all(len(names) >= needed[rank] for rank, names in found.items()):
            break
        rank = rank or await _learn(stub, name)
        if rank in found:
            found[rank].append(name)
    if count < 0:
        wanted = list(ranks) * min(len(names) // ranks.count(rank) for rank, names in found.items())
    if not wanted or any(len(names) < needed[rank] for rank, names in found.items()):
        raise WorkloadError(
            f"num_adapters is {count} with ranks {', '.join(map(str, ranks))}, and the server has "
            + ", ".join(f"{len(names)} of rank {rank}" for rank, names in found.items())
            + ": lower --num-adapters, or give other --ranks"
        )
    return {found[rank].pop(0): rank for rank in wanted}


def describe(ranks: Iterable[int]) -> str:
    """How many adapters have which rank; 0: unknown."""
    counts = [
        f"{count} of {f'rank {rank}' if rank else 'unknown rank'}" for rank, count in sorted(Counter(ranks).items())
    ]
    return ", ".join(counts) or "none"


async def _learn(stub: AdaptersStub, name: str) -> int:
    """Loads an adapter that is not loaded, and leaves it to be evicted; 0 if it cannot be."""
    try:
        loaded = await stub.PinAdapter(PinAdapterRequest(name=name), timeout=_TIMEOUT)
        await stub.UnpinAdapter(UnpinAdapterRequest(name=name), timeout=_TIMEOUT)
    except grpc.aio.AioRpcError as error:
        if error.code() in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED):
            raise
        return 0
    return int(loaded.rank)

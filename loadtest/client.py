"""One request with the clock running, and many of them at once. Knows the server only by its generated stubs."""

import asyncio
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import grpc

from loadtest.channel import connect
from server.pb.loraplex.v1.inference_pb2 import AdapterIdentity, GenerateRequest
from server.pb.loraplex.v1.inference_pb2_grpc import InferenceStub

_TIERS = {AdapterIdentity.DISK: "disk", AdapterIdentity.HOST: "host", AdapterIdentity.DEVICE: "device"}


@dataclass(frozen=True, slots=True)
class CallResult:
    """What came back and when. Durations are seconds from the moment the call was due."""

    adapter: str
    request_id: str
    due: float  # time.monotonic()
    lateness: float  # until it was sent: the client's own fault
    first_token: float | None
    token_gaps: tuple[float, ...]  # see `gaps_between_tokens`
    total: float
    text: str
    token_ids: tuple[int, ...]
    code: str  # gRPC status; "OK"
    details: str
    generation: int = 0  # of the adapter that answered; 0: none, or the base model
    digest: str = ""
    same_weights: bool = True  # every message named the same generation
    tier: str = ""  # where the server found the adapter: disk, host or device; empty: it did not say, or there was none

    @property
    def ok(self) -> bool:
        return self.code == "OK"

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)

    @property
    def ended(self) -> float:
        """When it was over, by time.monotonic()."""
        return self.due + self.total


async def call(stub: InferenceStub, request: GenerateRequest, due: float, timeout: float | None = None) -> CallResult:
    """Sends one streaming request; never raises for what the server answers.

    Args:
        due: when the request should have been sent, by time.monotonic().
        timeout: the call's deadline in seconds.
    """
    pieces: list[str] = []
    arrivals: list[tuple[float, int]] = []  # of messages with tokens: when, and how many
    token_ids: list[int] = []
    generations: list[int] = []
    digest = tier = ""
    code, details = "OK", ""
    sent = time.monotonic()
    try:
        async for message in stub.GenerateStream(request, timeout=timeout):
            if message.token_ids:
                arrivals.append((time.monotonic() - due, len(message.token_ids)))
            pieces.append(message.text)
            token_ids.extend(message.token_ids)
            generations.append(message.adapter.generation)
            digest = message.adapter.digest
            tier = tier or _TIERS.get(message.adapter.tier, "")
    except grpc.aio.AioRpcError as error:
        code, details = error.code().name, error.details() or ""
    total = time.monotonic() - due
    return CallResult(
        adapter=request.adapter,
        request_id=request.request_id,
        due=due,
        lateness=sent - due,
        first_token=arrivals[0][0] if arrivals else None,
        token_gaps=tuple(gaps_between_tokens(arrivals)),
        total=total,
        text="".join(pieces),
        token_ids=tuple(token_ids),
        code=code,
        details=details,
        generation=generations[0] if generations else 0,
        digest=digest,
        same_weights=len(set(generations)) <= 1,
        tier=tier,
    )


def gaps_between_tokens(arrivals: Sequence[tuple[float, int]]) -> Iterator[float]:
    """Seconds from token to token after the first message: its tokens share the gap before a message in equal parts.

    Args:
        arrivals: of messages: when one came, and with how many tokens.
    """
    for (before, _), (now, count) in pairwise(arrivals):
        yield from [(now - before) / count] * count


async def volley(address: str, requests: Sequence[GenerateRequest], concurrency: int) -> tuple[list[CallResult], float]:
    """A closed loop: at most `concurrency` requests at a time, the next one when one ends.

    Returns:
        The results in the order of the requests, and the seconds from the first call to the last answer.
    """
    slots = asyncio.Semaphore(concurrency)
    async with connect(address) as channel:
        stub = InferenceStub(channel)

        async def one(request: GenerateRequest) -> CallResult:
            async with slots:
                return await call(stub, request, time.monotonic())

        started = time.monotonic()
        results = await asyncio.gather(*[one(request) for request in requests])
        return list(results), time.monotonic() - started

"""One request with the clock running, and many of them at once. Knows the server only by its generated stubs."""

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import grpc

from server.pb.loraplex.v1.inference_pb2 import GenerateRequest
from server.pb.loraplex.v1.inference_pb2_grpc import InferenceStub


@dataclass(frozen=True, slots=True)
class CallResult:
    """What came back and when; times in seconds from the moment the call was due."""

    adapter: str
    text: str
    num_tokens: int
    first_token: float | None
    token_gaps: tuple[float, ...]  # between messages
    total: float
    code: str  # gRPC status; "OK"
    details: str

    @property
    def ok(self) -> bool:
        return self.code == "OK"


async def call(stub: InferenceStub, request: GenerateRequest, due: float) -> CallResult:
    """Sends one streaming request; never raises for what the server answers."""
    pieces: list[str] = []
    times: list[float] = []
    num_tokens = 0
    code, details = "OK", ""
    try:
        async for message in stub.GenerateStream(request):
            times.append(time.monotonic() - due)
            pieces.append(message.text)
            num_tokens += len(message.token_ids)
    except grpc.aio.AioRpcError as error:
        code, details = error.code().name, error.details() or ""
    return CallResult(
        adapter=request.adapter,
        text="".join(pieces),
        num_tokens=num_tokens,
        first_token=times[0] if times else None,
        token_gaps=tuple(after - before for before, after in pairwise(times)),
        total=time.monotonic() - due,
        code=code,
        details=details,
    )


async def volley(address: str, requests: Sequence[GenerateRequest], concurrency: int) -> tuple[list[CallResult], float]:
    """A closed loop: at most `concurrency` requests at a time, the next one when one ends.

    Returns:
        The results in the order of the requests, and the seconds from the first call to the last answer.
    """
    slots = asyncio.Semaphore(concurrency)
    async with grpc.aio.insecure_channel(address) as channel:
        stub = InferenceStub(channel)

        async def one(request: GenerateRequest) -> CallResult:
            async with slots:
                return await call(stub, request, time.monotonic())

        started = time.monotonic()
        results = await asyncio.gather(*[one(request) for request in requests])
        return list(results), time.monotonic() - started

"""The server that does nothing, and does it for everybody."""

import asyncio
from collections import Counter

import grpc

from loadtest.client import call
from loadtest.null_server import null_server
from server.pb.loraplex.v1.inference_pb2 import GenerateRequest
from server.pb.loraplex.v1.inference_pb2_grpc import InferenceStub


async def test_a_burst_is_answered_whole() -> None:
    server = null_server()
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        stub = InferenceStub(channel)
        due = asyncio.get_running_loop().time()
        results = await asyncio.gather(*[call(stub, GenerateRequest(), due) for _ in range(4000)])
    await server.stop(grace=0)
    assert Counter(result.code for result in results) == {"OK": 4000}

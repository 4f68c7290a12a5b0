"""A server that answers every request at once with one message: what it cannot be offered is the client's own limit."""

import asyncio
import signal
from collections.abc import AsyncIterator

import grpc

from server.pb.loraplex.v1 import adapters_pb2, inference_pb2
from server.pb.loraplex.v1.adapters_pb2_grpc import AdaptersServicer, add_AdaptersServicer_to_server
from server.pb.loraplex.v1.inference_pb2_grpc import InferenceServicer, add_InferenceServicer_to_server

_MOST_PENDING = 1 << 20  # calls that the client has sent and the server has not yet taken


class NullInference(InferenceServicer):
    _ANSWER = inference_pb2.GenerateResponse(text=" ", token_ids=[0], finish_reason=inference_pb2.LENGTH)

    async def GenerateStream(
        self, request: inference_pb2.GenerateRequest, context: object
    ) -> AsyncIterator[inference_pb2.GenerateResponse]:
        yield self._ANSWER

    async def GetModelInfo(
        self, request: inference_pb2.GetModelInfoRequest, context: object
    ) -> inference_pb2.ModelInfo:
        return inference_pb2.ModelInfo(name="null", max_model_len=1 << 20, vocab_size=1 << 15)


class NullAdapters(AdaptersServicer):
    async def ListAdapters(
        self, request: adapters_pb2.ListAdaptersRequest, context: object
    ) -> adapters_pb2.ListAdaptersResponse:
        return adapters_pb2.ListAdaptersResponse()


def null_server() -> grpc.aio.Server:
    """Not bound, not started."""
    options = [
        ("grpc.so_reuseport", 0),
        # gRPC cancels calls at random where more than a thousand wait to be accepted: a burst must be answered whole.
        ("grpc.server.max_pending_requests", _MOST_PENDING),
        ("grpc.server.max_pending_requests_hard_limit", _MOST_PENDING),
    ]
    server = grpc.aio.server(options=options)
    add_InferenceServicer_to_server(NullInference(), server)
    add_AdaptersServicer_to_server(NullAdapters(), server)
    return server


async def serve_null(listen: str) -> None:
    """Serves until SIGTERM or SIGINT.

    Raises:
        OSError: the address cannot be had.
    """
    server = null_server()
    try:
        port = server.add_insecure_port(listen)
    except RuntimeError as error:
        raise OSError(f"cannot listen on {listen}: {error}") from error
    await server.start()
    print(f"ready: listening on port {port}", flush=True)
    stop = asyncio.Event()
    for signum in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(signum, stop.set)
    await stop.wait()
    await server.stop(grace=0)

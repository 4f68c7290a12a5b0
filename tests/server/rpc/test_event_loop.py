"""The event loop takes gRPC's wake-up calls together, and leaves everything else as it is."""

import asyncio
import functools
import socket
from collections.abc import AsyncIterator, Callable
from typing import TYPE_CHECKING, Any, TypeVarTuple

import grpc

from server.rpc.event_loop import GrpcEventLoop

if TYPE_CHECKING:
    from _typeshed import HasFileno

_Ts = TypeVarTuple("_Ts")

STREAMS, MESSAGES = 32, 20


class Counting(GrpcEventLoop):
    """Counts how often gRPC's reader is called."""

    calls = 0

    def add_reader(self, fd: "int | HasFileno", callback: Callable[[*_Ts], Any], *args: *_Ts) -> None:
        @functools.wraps(getattr(callback, "func", callback))
        def counted(*args: *_Ts) -> None:
            self.calls += 1
            callback(*args)

        super().add_reader(fd, counted, *args)


async def ask() -> None:
    """As many streams at once as a step may have, each with its messages, in order."""

    async def answer(request: bytes, _: object) -> AsyncIterator[bytes]:
        for number in range(MESSAGES):
            yield request + bytes([number])

    handlers: dict[str, Any] = {"Stream": grpc.unary_stream_rpc_method_handler(answer)}
    server = grpc.aio.server()
    server.add_registered_method_handlers("test", handlers)
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("test", handlers),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        stream: Any = channel.unary_stream("/test/Stream")

        async def read(index: int) -> list[bytes]:
            return [message async for message in stream(bytes([index]))]

        answers = await asyncio.gather(*[read(index) for index in range(STREAMS)])
    await server.stop(None)
    assert answers == [[bytes([index, number]) for number in range(MESSAGES)] for index in range(STREAMS)]


def test_grpc_is_woken_once_for_many_operations() -> None:
    """It completes two for each message here, one to send it and one to receive it."""
    loop = Counting()
    with asyncio.Runner(loop_factory=lambda: loop) as runner:
        runner.run(ask())
    assert 0 < loop.calls < STREAMS * MESSAGES


def test_other_readers_read_for_themselves() -> None:
    async def main() -> list[bytes]:
        ours, theirs = socket.socketpair()
        got: list[bytes] = []
        with ours, theirs:
            ours.setblocking(False)
            done = asyncio.Event()

            def read(size: int) -> None:
                got.append(ours.recv(size))
                if len(got) == 3:
                    done.set()

            loop = asyncio.get_running_loop()
            loop.add_reader(ours, read, 1)
            theirs.send(b"abc")
            await done.wait()
            loop.remove_reader(ours)
        return got

    with asyncio.Runner(loop_factory=GrpcEventLoop) as runner:
        assert runner.run(main()) == [b"a", b"b", b"c"]

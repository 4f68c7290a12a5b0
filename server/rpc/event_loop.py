"""An asyncio event loop that gRPC's Python binding wakes up once for many completed operations."""

import asyncio
import socket
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVarTuple

if TYPE_CHECKING:
    from _typeshed import HasFileno

_Ts = TypeVarTuple("_Ts")
_MANY = 1 << 16  # bytes that are read of a socket at once


class GrpcEventLoop(asyncio.SelectorEventLoop):
    """Reads gRPC's wake-up calls together.

    grpc.aio writes a byte into a socket for every operation that it completed. Its reader takes one byte, and all that
    is complete: after a step that sent a token to each of 64 streams the loop would turn 63 more times for nothing.
    """

    def add_reader(self, fd: "int | HasFileno", callback: Callable[[*_Ts], Any], *args: *_Ts) -> None:
        handler = getattr(callback, "func", callback)
        if isinstance(fd, socket.socket) and getattr(handler, "__name__", "") == "_handle_events":

            def handle() -> None:
                # One byte stays, for the reader to find. An operation is complete before its byte is written, so what
                # the other bytes stood for is among what the reader takes now.
                waiting = len(fd.recv(_MANY, socket.MSG_PEEK))
                if waiting > 1:
                    fd.recv(waiting - 1)
                callback(*args)

            super().add_reader(fd, handle)
        else:
            super().add_reader(fd, callback, *args)

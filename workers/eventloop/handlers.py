"""Handlers that are coroutines, for an AsyncioWorker; and which of them fits which server."""

import asyncio
import functools
import socket
from typing import Any

from prefork.errors import OptionError


class AsyncRequestHandler:
    """What the two handlers share. One is made for each request, as socketserver does, and lives for that request.

    May be overridden
    -----------------
    setup(), finish()
        Before and after `handle()`; plain functions or coroutine functions.
    handle()
        A coroutine function that serves the request.

    To be read
    ----------
    request, client_address, server

    An exception goes to the server's `handle_error()`. Past `request_timeout` the task is cancelled: `finally` blocks
    have 2 seconds, and `handle_error()` sees `RequestTimeout`. `self.server.worker` has `extend_deadline(seconds)`, and
    `leaving`, an `asyncio.Event`: set once the worker is to leave, for those who wait for a client that is idle.
    """

    def __init__(self, request: Any, client_address: Any, server: Any) -> None:
        self.request, self.client_address, self.server = request, client_address, server

    def setup(self) -> Any:
        """Before `handle()`."""

    async def handle(self) -> None:
        """Serve the request."""

    def finish(self) -> Any:
        """After `handle()`, also when it has raised."""

    async def serve(self) -> None:
        """The whole of it, as the worker calls it."""
        if (begun := self.setup()) is not None:
            await begun
        try:
            await self.handle()
        finally:
            if (done := self.finish()) is not None:
                await done


class AsyncStreamRequestHandler(AsyncRequestHandler):
    """For streams: `reader` and `writer` are asyncio's. What was written is sent before the connection is closed."""

    limit = 1 << 16  # bytes of the longest line that `reader.readline()` takes, as in asyncio.start_server()

    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter

    def __init__(self, request: Any, client_address: Any, server: Any) -> None:
        super().__init__(request, client_address, server)
        self.reader, self.writer = request


class AsyncDatagramRequestHandler(AsyncRequestHandler):
    """For datagrams: `packet` is the datagram that came, `await self.reply(data)` answers it."""

    packet: bytes
    socket: socket.socket

    def __init__(self, request: Any, client_address: Any, server: Any) -> None:
        super().__init__(request, client_address, server)
        self.packet, self.socket = request

    async def reply(self, data: bytes) -> None:
        """Send a datagram to the client.

        Raises
        ------
        OSError
            EMSGSIZE, ECONNREFUSED (a Unix client is gone), ...
        """
        pause = 0.001
        while True:
            try:
                self.socket.sendto(data, self.client_address)
                return
            except BlockingIOError:
                # Where the queue of a Unix client is full no poll tells when there is room again.
                await asyncio.sleep(pause)
                pause = min(2 * pause, 0.05)


def check_handler(handler: object, socket_type: int) -> None:
    """Raises OptionError for a handler that an AsyncioWorker cannot serve from this kind of socket."""
    handler = unwrapped(handler)
    wanted, other, bind = (
        (AsyncDatagramRequestHandler, AsyncStreamRequestHandler, "a stream")
        if socket_type == socket.SOCK_DGRAM
        else (AsyncStreamRequestHandler, AsyncDatagramRequestHandler, "a datagram")
    )
    if isinstance(handler, type) and issubclass(handler, wanted):
        return
    name = handler.__name__ if isinstance(handler, type) else repr(handler)
    if isinstance(handler, type) and issubclass(handler, other):
        raise OptionError(
            f"RequestHandlerClass: {name} is an {other.__name__}; use {wanted.__name__} or bind {bind} address",
            code="PF0106",
        )
    raise OptionError(
        f"RequestHandlerClass: {name} is not a handler for worker_class 'asyncio'; pass a subclass of "
        f"prefork.{wanted.__name__}, or choose another worker_class",
        code="PF0106",
    )


def unwrapped(handler: Any) -> Any:
    """The class behind a partial."""
    while isinstance(handler, functools.partial):
        handler = handler.func
    return handler

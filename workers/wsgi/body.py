"""The body of a request as the application reads it: what has not come yet is read from the client.

This is the only place where a request waits for its client.
"""

import io
import socket
from collections.abc import Callable
from typing import Any

from prefork.kernel.unpatched import select
from prefork.workers.wsgi.limits import DONTWAIT, READ, Client
from prefork.workers.wsgi.response import Exchange


class Refused(OSError):
    """The body cannot be read: it is malformed, too long or too slow, or the client is gone. `status` says which."""

    def __init__(self, status: int, text: str) -> None:
        super().__init__(text)
        self.status = status


class Body(io.RawIOBase):
    """The rest of a long body, read from the client as the application reads. Never held whole."""

    def __init__(self, client: Client, exchange: Exchange, go_on: Callable[[], None]) -> None:
        self._client, self._exchange, self._go_on = client, exchange, go_on

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        exchange = self._exchange
        while not exchange.body:
            if exchange.complete:
                return 0
            self._receive()
        part = exchange.body[0]
        room = len(buffer)
        if len(part) <= room:
            del exchange.body[0]
            buffer[: len(part)] = part
            return len(part)
        buffer[:room] = part[:room]
        exchange.body[0] = part[room:]
        return room

    def _receive(self) -> None:
        client, exchange = self._client, self._exchange
        if client.fault:
            raise Refused(client.fault, client.reason)
        if exchange.expects:
            exchange.expects = False
            self._go_on()
        try:
            data = receive(client.sock, client.listener.limits.BODY_TIMEOUT)
        except ConnectionError:
            data = b""  # an abrupt end, but an end
        if data is None:
            client.spoil(408, f"no part of the body arrived for {client.listener.limits.BODY_TIMEOUT:g} s")
        elif data:
            client.feed(data)
        else:
            client.spoil(400, "the client disconnected during its request")
            raise Refused(400, client.reason)


def receive(sock: socket.socket, seconds: float) -> bytes | None:
    """The bytes that come within so many seconds; None if none come, b"" at the end of the stream."""
    try:
        return sock.recv(READ, DONTWAIT)
    except BlockingIOError:
        pass
    poll = select.poll()
    poll.register(sock, select.POLLIN)
    if not poll.poll(seconds * 1000):
        return None
    return sock.recv(READ, DONTWAIT)

"""A transport that sends the head of an answer together with the first part of its body.

uvicorn writes the two one by one. An answer of few bytes costs a seventh more for the second system call, and its
client is woken twice.
"""

import asyncio
from typing import Any


class HeadBufferingTransport:
    """Keeps the head of an answer until the body follows or the turn of the loop ends, and sends both at once.

    All other attributes and methods are those of the transport behind it.

    Parameters
    ----------
    kept
        The transports that keep a head in this turn. Many share this list, so that one callback sends all heads.
    """

    LARGE = 1 << 14  # bytes; to copy more of a body costs as much as another system call

    def __init__(
        self, loop: asyncio.AbstractEventLoop, transport: asyncio.Transport, kept: "list[HeadBufferingTransport]"
    ) -> None:
        self._transport, self._soon, self._send, self._kept = transport, loop.call_soon, transport.write, kept
        self._head = b""
        self.is_closing = transport.is_closing  # asked after each answer

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)

    def write(self, data: Any) -> None:
        if self._head:
            if len(data) > self.LARGE:
                self.flush()
                self._send(data)
            else:
                both = self._head + data
                self._head = b""
                self._send(both)
        elif data[:5] == b"HTTP/" and type(data) is bytes:  # bytes cannot change while they are kept
            self._head = data
            kept = self._kept
            if not kept:
                self._soon(_flush_all, kept)
            kept.append(self)
        else:
            self._send(data)

    def flush(self) -> None:
        head, self._head = self._head, b""
        if head and not self.is_closing():
            self._send(head)

    def writelines(self, parts: Any) -> None:
        self.flush()
        self._transport.writelines(parts)

    def write_eof(self) -> None:
        self.flush()
        self._transport.write_eof()

    def close(self) -> None:
        if self._head:
            self.flush()
        self._transport.close()


def _flush_all(kept: list[HeadBufferingTransport]) -> None:
    transports = kept[:]
    kept.clear()
    for transport in transports:
        if transport._head:
            transport.flush()


def with_buffered_heads(protocol: Any, loop: asyncio.AbstractEventLoop) -> Any:
    """A subclass of a protocol whose transport is a `HeadBufferingTransport`."""
    kept: list[HeadBufferingTransport] = []

    def connection_made(self: Any, transport: asyncio.Transport) -> None:
        try:
            protocol.connection_made(self, HeadBufferingTransport(loop, transport, kept))
        except Exception:  # the system has refused to tell its address: nothing would ever end this connection
            self.connections.discard(self)
            transport.abort()
            raise

    return type(protocol.__name__, (protocol,), {"connection_made": connection_made})

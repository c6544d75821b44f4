"""The connections of a worker, and what is known of each from outside.

A connection is one of uvicorn's protocols. What it is doing follows from its attributes; all that this package knows of
these attributes is here and in `protocols`.
"""

import asyncio
from collections.abc import Callable
from typing import Any


class Connections(set[Any]):
    """The connections of a worker. uvicorn's protocols add and remove themselves.

    `fewer` is called in the next turn of the loop after some were removed: by then a WebSocket has taken the place of
    the protocol with which it began.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, fewer: Callable[[], object]) -> None:
        self._soon, self._fewer, self._is_due = loop.call_soon, fewer, False

    def discard(self, connection: Any) -> None:
        super().discard(connection)
        if not self._is_due:
            self._is_due = True
            self._soon(self._tell)

    def remove(self, connection: Any) -> None:
        if connection not in self:
            raise KeyError(connection)
        self.discard(connection)

    def _tell(self) -> None:
        self._is_due = False
        self._fewer()


def is_websocket(connection: Any) -> bool:
    return not hasattr(connection, "cycle")


def is_open_websocket(connection: Any) -> bool:
    """Whether its handshake is over: one that is closed before that gets a 500."""
    return bool(getattr(connection, "handshake_complete", True))


def is_between(connection: Any) -> bool:
    """Whether an HTTP connection has no request in progress: none yet, or the last connection is answered."""
    return connection.cycle is None or connection.cycle.response_complete


def has_begun(connection: Any) -> bool:
    """Whether the head of another request has come in part (the first connection's: with httptools only)."""
    if connection.cycle is None:
        return getattr(connection, "scope", None) is not None
    return connection.timeout_keep_alive_task is None


def silent_for(connection: Any, now: float) -> float:
    """Seconds since the last reply, or since the accept. `now` is on the loop's clock, the monotonic one."""
    timer = connection.timeout_keep_alive_task
    since = timer.when() - connection.timeout_keep_alive if timer is not None else connection.prefork_since
    return now - float(since)


def descriptor(connection: Any) -> int:
    """The descriptor of its socket; -1: it is closed."""
    sock = connection.transport.get_extra_info("socket")
    return -1 if sock is None or connection.transport.is_closing() else int(sock.fileno())

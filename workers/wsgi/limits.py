"""The bounds of the worker class `wsgi`, and what modules below the parser know of connections.

Nothing here parses, sends or waits.
"""

import socket
from collections.abc import Callable
from typing import Any, Protocol

from prefork.kernel.host_port import bracketed
from prefork.workers.wsgi.header_lines import Clock

DONTWAIT = int(socket.MSG_DONTWAIT)
READ = 65536  # bytes asked of the kernel at once

_UNLIMITED = 0x7FFF_FFFF_FFFF_FFFF


class Limits:
    """Bounds on what a client may send and how slowly. Class attributes of the worker class: a subclass may set others.

    Sizes are in bytes, times in seconds.
    """

    MAX_LINE = 8190  # the target of a request line: 414
    MAX_HEAD = 65536  # everything before the body, checked after each read: 431
    MAX_FIELDS = 100  # header lines: 431
    READ_AHEAD = 65536  # a body up to this is complete before the application is called, a longer body is streamed
    HEAD_TIMEOUT = 10.0  # from the connection, or the first byte of a later request, to the end of its head: 408
    BODY_TIMEOUT = 30.0  # for a body that is read ahead; of a longer body, without a byte: 408
    SEND_TIMEOUT = 30.0  # without the client taking a byte of the answer: the connection is given up
    LINGER = 2.0  # for input after the last byte of the answer
    MAX_KEPT = 10_000  # requests on one connection
    TICK = 0.5  # between two checks of the deadlines
    LAST_WORD = 0.5  # for which a leaving worker expects another request from a client, since the last request
    FIRST_WORD = 2.0  # the same for a first request, since the connection


class AnsweringWorker(Protocol):
    """What an answer reads of its worker: the Date, and whether the worker leaves."""

    clock: Clock
    draining: bool


class ListenerContext:
    """What all connections of one listener share.

    Parameters
    ----------
    base
        The keys of the environment that are the same for all requests.
    keep
        How many requests a connection may have; none is kept with 0.
    """

    __slots__ = ("application", "base", "keep", "keys", "limits", "line", "max_body", "verify", "worker")

    def __init__(
        self,
        application: Callable[..., Any],
        base: dict[str, Any],
        limits: Limits,
        max_body: int,
        keep: int,
        worker: AnsweringWorker,
    ) -> None:
        self.application, self.limits, self.max_body = application, limits, max_body or _UNLIMITED
        self.keep, self.worker = keep, worker
        self.base = base | {"SERVER_PROTOCOL": "HTTP/1.1"}
        self.verify: Callable[[Any, Any], bool] | None = None
        # Beside its headers a request adds method, path, query, and its client's port.
        self.line, self.keys = limits.MAX_LINE, limits.MAX_FIELDS + len(self.base) + 4


class Client(Protocol):
    """What an answer, and the body of a request, use of their connection."""

    sock: Any
    fd: int
    listener: ListenerContext
    served: int
    broken: bool
    fault: int
    reason: str

    def feed(self, data: bytes) -> None: ...

    def spoil(self, status: int, reason: str) -> None: ...


def server_name(address: Any) -> tuple[str, str]:
    """SERVER_NAME and SERVER_PORT for the address of a listener or of its end of a connection; never empty (PEP 3333).

    IPv6 in brackets (RFC 3875, 4.1.14), without its zone, which has no place in an `http` URL and no meaning elsewhere.
    """
    if isinstance(address, tuple):
        return bracketed(address[0].partition("%")[0]), str(address[1])
    return "localhost", "80"

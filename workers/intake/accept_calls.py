"""The cheapest call that takes from one listener what the server's `get_request()` takes from it.

A server that overrides `get_request()`, and a TLS listener, are called as they are.
"""

import errno
import os
import socketserver
import sys
from collections.abc import Callable
from typing import Any

import prefork.kernel.readiness as readiness
import prefork.link.scoreboard as scoreboard
from prefork.kernel.unpatched import socket, time

Take = Callable[[], tuple[Any, Any]]

ROOM = 0.002  # seconds between two looks whether a client has made room for an answer


def stock(server: Any) -> bool:
    """Whether `get_request` is socketserver's own."""
    return "get_request" not in vars(server) and type(server).get_request in (
        socketserver.TCPServer.get_request,
        socketserver.UDPServer.get_request,
    )


def has_plain_peers(server: Any) -> bool:
    """Whether the address of each client is a tuple that begins with host and port."""
    return stock(server) and server.socket.family in (socket.AF_INET, socket.AF_INET6)


def make_accept(server: Any, board: scoreboard.Slot, make: Callable[..., Any] = socket.socket) -> Take:
    """The cheapest call that does what the server's `get_request()` does. `make` makes connections."""
    get_request: Take = server.get_request
    listener = server.socket
    if listener.type == socket.SOCK_DGRAM:
        return _datagrams(server, board)
    if not stock(server) or type(listener) is not socket.socket:
        return get_request  # overridden, or a TLS listener
    if sys.platform == "linux" and socket.getdefaulttimeout() is None:
        # socket.accept() asks for family and type as enums, 0.85 us each, at every call. The new socket is blocking:
        # on Linux it inherits nothing.
        accept = listener._accept  # type: ignore[attr-defined]
        family, kind, proto = int(listener.family), int(listener.type), listener.proto

        def fast() -> tuple[Any, Any]:
            fd, peer = accept()
            return make(family, kind, proto, fd), peer

        return fast

    def plain() -> tuple[Any, Any]:
        request, peer = get_request()
        # Elsewhere it inherits O_NONBLOCK from a listener that is being drained.
        request.settimeout(socket.getdefaulttimeout())
        return request, peer

    return plain


class _Answers(socket.socket):
    """Waits for room at the receiver, as a blocking socket does. O_NONBLOCK, which it has in common with the listener,
    means the end of the queue there, or that there are several."""

    def sendto(self, *arguments: Any) -> int:
        while True:
            try:
                return super().sendto(*arguments)
            except BlockingIOError:
                if len(arguments) == 3 and arguments[1] & socket.MSG_DONTWAIT:
                    raise
                time.sleep(ROOM)  # a poll does not see the queue of a receiver without a connection to it


def _datagrams(server: Any, board: scoreboard.Slot) -> Take:
    """Receiving and answering need a descriptor each: a worker that leaves replaces that of receiving, and a handler
    may be about to answer then."""
    listener = server.socket
    # Not `listener.dup()`: that sets the timeout anew, and with it undoes the O_NONBLOCK of a stop, for every worker.
    answers = _Answers(listener.family, listener.type, listener.proto)
    os.dup2(listener.fileno(), answers.fileno(), inheritable=False)
    local = listener.family == socket.AF_UNIX
    if stock(server):
        server.socket = answers
        receive = listener.recvfrom

        def plain() -> tuple[Any, Any]:
            data, peer = receive(server.max_packet_size)
            if not (peer or data) and (not local or readiness.has_ended(answers.fileno())):
                # What SHUT_RD makes of a recvfrom: it is the master's where the whole pool stops.
                raise OSError(errno.EAGAIN if board.pool_drains else errno.EINVAL, "the listener was shut down")
            return (data, answers), peer

        return plain
    get_request = server.get_request

    def overridden() -> tuple[Any, Any]:
        request, peer = get_request()
        if isinstance(request, tuple) and len(request) == 2 and request[1] is listener:
            request = request[0], answers
        return request, peer

    return overridden

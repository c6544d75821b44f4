"""Whether an exception means that the client has left, or is an error of the program.

The connection to a database breaks with the same exceptions as that of the client, and that must be seen. So an
exception is the client's only if the request's own socket is broken and the exception came out of an operation on it,
as far as both can be known. In doubt it is the program's.
"""

import contextlib
import io
import socket
import socketserver
import traceback
from contextvars import ContextVar
from types import FrameType
from typing import Any

from prefork.kernel.unpatched import select

# The exception that `look_at_stream()` has recognised: when the server is told of it the socket is closed already.
_of_stream: ContextVar[BaseException | None] = ContextVar("_of_stream", default=None)

_BUFFERS = (io.BufferedReader, io.BufferedWriter)
_ANSWERS = socketserver.DatagramRequestHandler.finish.__code__


def is_clients(request: Any, error: BaseException | None) -> bool:
    """Whether `error`, which serving `request` has raised, says that the client has left."""
    if error is None:
        return False
    if error is _of_stream.get():
        return True
    if not isinstance(error, ConnectionError) and type(error).__name__ != "SSLEOFError":  # of ssl, imported or not
        return False
    if not (frames := _frames(error)):
        return False
    if isinstance(request, tuple):  # a datagram, which is answered in one place
        return any(frame.f_code is _ANSWERS and frame.f_locals["self"].request is request for frame in frames)
    if not isinstance(request, socket.socket):
        return False
    events = _events(request)
    if not events & select.POLLHUP:  # its client is there, or the program itself has shut it down
        return False
    raised_in = frames[-1].f_locals.get("self")
    if raised_in is request or getattr(raised_in, "_sock", None) is request:
        return True  # TLS; a file of socketserver's or prefork.servers.http's
    if isinstance(raised_in, socket.SocketIO):
        return _is_file(raised_in, frames, request)
    # A handler's own line, which may use other sockets too. An error that nobody was told of yet is still there.
    told = not events & select.POLLERR or request.family == socket.AF_UNIX
    here = frames[-1].f_locals.values()
    return told and (any(value is request for value in here) or bool(_handlers(frames[-1:], request)))


def look_at_stream(protocol: object, broken: BaseException | None, error: BaseException) -> None:
    """In a task that has served a connection with `error`: `is_clients()` will know it.

    Parameters
    ----------
    protocol, broken
        The connection's, and the exception of its reader: an event loop raises that one in a task that waits, and a new
        one in a task that writes later.
    """
    if isinstance(broken, OSError):
        late = isinstance(error, ConnectionError) and _frames(error)[-1].f_locals.get("self") is protocol
        _of_stream.set(error if error is broken or late else None)


def _frames(error: BaseException) -> list[FrameType]:
    return [frame for frame, _ in traceback.walk_tb(error.__traceback__)]


def _events(sock: socket.socket) -> int:
    poll = select.poll()
    try:
        poll.register(sock, 0)
        return dict(poll.poll(0)).get(sock.fileno(), 0)
    except (OSError, ValueError):  # closed
        return 0


def _is_file(file: socket.SocketIO, frames: list[FrameType], request: socket.socket) -> bool:
    """Whether it is `rfile` or `wfile` of the handler. A file that is closed, as these are by now, knows no socket."""
    for handler in _handlers(frames, request):
        for value in vars(handler).values():
            with contextlib.suppress(ValueError):  # it was detached
                if value is file or (isinstance(value, _BUFFERS) and value.raw is file):
                    return True
    return False


def _handlers(frames: list[FrameType], request: socket.socket) -> list[socketserver.BaseRequestHandler]:
    """The handlers of this request among the variables of frames."""
    values = [value for frame in frames for value in frame.f_locals.values()]
    # Asked is the type: an object of the program's may be a proxy, which does something when it is asked itself.
    handlers = [value for value in values if issubclass(type(value), socketserver.BaseRequestHandler)]
    return [handler for handler in handlers if any(value is request for value in vars(handler).values())]

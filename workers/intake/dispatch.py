"""The chain of socketserver's methods around one request, for every loop but the hottest: verify, process, finish, shut
down, and what becomes of an exception in it.

The chain may hand a request to another thread (`ThreadingMixIn`, an executor, whatever replaces its middle). That
request is over when it is shut down there. A worker that leaves waits for daemon threads too.
"""

import socket
import socketserver
from collections.abc import Callable, Mapping
from typing import Any, Protocol, TypeVar

from prefork.errors import OptionError, RequestTimeout

_COROUTINE = 0x80  # inspect.CO_COROUTINE; `inspect` takes 10 ms to import


class Begun(Protocol):
    """A request in progress, as the worker accounts for it."""

    thread: int

    def __enter__(self) -> object: ...

    def adopt(self) -> None: ...

    def part(self) -> None: ...

    def end(self) -> None: ...


R = TypeVar("R", bound=Begun)


class ChainWorker(Protocol[R]):
    """What the chain asks of the worker."""

    _handed: dict[int, R] | None

    def serving(self, peer: object) -> R: ...


def check_handler(handler: object, socket_type: int) -> None:
    """Raises OptionError for a handler that is none, or not for this kind of socket."""
    if not callable(handler):
        raise OptionError(
            f"RequestHandlerClass: {handler!r} is not a handler; pass a subclass of socketserver.BaseRequestHandler",
            code="PF0106",
        )
    if isinstance(handler, type):
        stream = issubclass(handler, socketserver.StreamRequestHandler)
        datagram = issubclass(handler, socketserver.DatagramRequestHandler)
        if stream and socket_type == socket.SOCK_DGRAM:
            raise OptionError(
                f"RequestHandlerClass: {handler.__name__} handles streams, the server takes datagrams; "
                "use DatagramRequestHandler or bind a stream address",
                code="PF0106",
            )
        if datagram and socket_type == socket.SOCK_STREAM:
            raise OptionError(
                f"RequestHandlerClass: {handler.__name__} handles datagrams, the server takes streams; "
                "use StreamRequestHandler or bind a datagram address",
                code="PF0106",
            )


def is_async(handler: object) -> bool:
    """Whether this is a handler class whose `handle` is a coroutine function."""
    code = getattr(getattr(handler, "handle", None), "__code__", None)
    return isinstance(handler, type) and code is not None and bool(code.co_flags & _COROUTINE)


def refuse_async(handler: Any, worker_class: str) -> None:
    """Raises OptionError for a handler whose coroutine nobody would await."""
    if is_async(handler):
        raise OptionError(
            f"RequestHandlerClass: {handler.__name__}.handle is a coroutine function, which {worker_class} does not "
            "await; use worker_class 'asyncio'",
            code="PF0106",
        )


def is_stock(server: Any, methods: Mapping[str, Any]) -> bool:
    """Whether these of the server's methods are socketserver's own, overridden neither on its class nor on itself."""
    return all(name not in vars(server) and getattr(type(server), name) is was for name, was in methods.items())


def verifier(server: Any) -> Callable[[Any, Any], bool] | None:
    """The server's `verify_request()`; None where it is socketserver's own, which lets everybody in."""
    if is_stock(server, {"verify_request": socketserver.BaseServer.verify_request}):
        return None
    verify: Callable[[Any, Any], bool] = server.verify_request
    return verify


def hands_over(server: Any) -> bool:
    """Whether the chain may end in another thread."""
    return not is_stock(server, {"process_request": socketserver.BaseServer.process_request})


def follow(worker: ChainWorker[R], server: Any) -> None:
    """Where the chain hands requests to another thread, have each request end when it is shut down there.

    With a TLS listener the handshake comes after the begin of the request, so that a silent client has a deadline. In
    the accept the handshake would hold the worker, and no deadline would be running. A client that fails in it is
    dropped, as an accept would have done.
    """
    secure = defer_handshake(server)
    if not (secure or hands_over(server)):
        return
    handed = worker._handed = {} if worker._handed is None else worker._handed
    finish, shutdown = server.finish_request, server.shutdown_request

    def finish_request(request: Any, client_address: Any) -> None:
        if active := handed.get(id(request)):
            active.adopt()
        if secure:
            try:
                request.do_handshake()
            except OSError:
                return
        finish(request, client_address)

    def shutdown_request(request: Any) -> None:
        try:
            shutdown(request)
        finally:
            if active := handed.pop(id(request), None):
                active.end()

    server.finish_request, server.shutdown_request = finish_request, shutdown_request


def run_chain(worker: ChainWorker[R], server: Any, request: Any, peer: Any, begun: R | None) -> None:
    """One request, through the whole chain, accounted for. One that has `begun` before is adopted."""
    active = worker.serving(peer) if begun is None else begun
    handed = worker._handed
    here = True  # whether the request is done when the chain returns
    try:
        active.__enter__() if begun is None else active.adopt()
        if handed is not None:
            handed[id(request)] = active
        if server.verify_request(request, peer):
            server.process_request(request, peer)
            here = handed is None or not hands_over(server) or _is_closed(request)
        else:
            server.shutdown_request(request)
        if here:
            active.thread = 0  # no RequestTimeout any more, from here to its end
    except Exception:
        failed(server, request, peer)
    except BaseException:
        server.shutdown_request(request)
        raise
    finally:
        if here:
            if handed is not None:
                handed.pop(id(request), None)
            active.end()
        else:
            active.part()


def failed(server: Any, request: Any, peer: Any) -> None:
    """What socketserver does about an exception in the chain, with a deadline that may pass meanwhile."""
    try:
        server.handle_error(request, peer)
        server.shutdown_request(request)
    except RequestTimeout:
        server.shutdown_request(request)


def defer_handshake(server: Any) -> bool:
    """Whether the listener speaks TLS; its accept then leaves the handshake to whoever serves."""
    listener = server.socket
    if not is_stock(server, {"get_request": socketserver.TCPServer.get_request}):
        return False
    if not getattr(listener, "do_handshake_on_connect", False):
        return False
    listener.do_handshake_on_connect = False
    return True


def _is_closed(request: Any) -> bool:
    return isinstance(request, socket.socket) and request.fileno() < 0

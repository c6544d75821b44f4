"""The chain of socketserver's methods around one request, for every loop but the hottest: verify, process, finish, shut
down, and what becomes of an exception in it.

Where the chain hands a request to another thread (`ThreadingMixIn`, an executor, whatever replaces its middle), the
request is over when it is shut down there; daemon threads are waited for too.
"""

import socket
import socketserver
from typing import Any, Protocol

from prefork.errors import OptionError, RequestTimeout


class Accounts(Protocol):
    """What the chain tells the worker."""

    def _enter(self, ticket: object, peer: object) -> object: ...

    def _adopt(self, ticket: object) -> None: ...

    def _leave(self, ticket: object) -> None: ...

    def _disarm(self) -> None: ...


def check_handler(handler: object, socket_type: int) -> None:
    """Raises OptionError for a handler that is none, or not for this kind of socket."""
    if not callable(handler):
        raise OptionError(
            f"RequestHandlerClass: {handler!r} is no handler; pass a subclass of socketserver.BaseRequestHandler"
        )
    if isinstance(handler, type):
        stream = issubclass(handler, socketserver.StreamRequestHandler)
        datagram = issubclass(handler, socketserver.DatagramRequestHandler)
        if stream and socket_type == socket.SOCK_DGRAM:
            raise OptionError(
                f"RequestHandlerClass: {handler.__name__} handles streams, the server takes datagrams; "
                "use DatagramRequestHandler or bind a stream address"
            )
        if datagram and socket_type == socket.SOCK_STREAM:
            raise OptionError(
                f"RequestHandlerClass: {handler.__name__} handles datagrams, the server takes streams; "
                "use StreamRequestHandler or bind a datagram address"
            )


def hands_over(server: Any) -> bool:
    """Whether the chain may end in another thread."""
    kind = type(server)
    return "process_request" in vars(server) or kind.process_request is not socketserver.BaseServer.process_request


def follow(worker: Accounts, server: Any) -> bool:
    """Have requests that the chain hands to another thread say when they are done; whether that was needed.

    With a TLS listener the handshake is done when the request has begun, so that a silent client has a deadline; in the
    accept it would hold the worker, and no deadline would be running. A client that fails in it is dropped, as an
    accept would have done.
    """
    secure = defer_handshake(server)
    if not (secure or hands_over(server)):
        return False
    finish, shutdown = server.finish_request, server.shutdown_request

    def finish_request(request: Any, client_address: Any) -> None:
        worker._adopt(id(request))
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
            worker._leave(id(request))

    server.finish_request, server.shutdown_request = finish_request, shutdown_request
    return True


def serve(worker: Accounts, server: Any, request: Any, peer: Any) -> None:
    """One request, through the whole chain, accounted."""
    ticket = id(request)
    worker._enter(ticket, peer)
    here = True  # whether the request is done when the chain returns
    try:
        if server.verify_request(request, peer):
            server.process_request(request, peer)
            here = not hands_over(server) or _is_closed(request)
        else:
            server.shutdown_request(request)
    except Exception:
        failed(server, request, peer)
    except BaseException:
        server.shutdown_request(request)
        raise
    finally:
        if here:
            worker._disarm()
            worker._leave(ticket)


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
    if not ("get_request" not in vars(server) and type(server).get_request is socketserver.TCPServer.get_request):
        return False
    if not getattr(listener, "do_handshake_on_connect", False):
        return False
    listener.do_handshake_on_connect = False
    return True


def _is_closed(request: Any) -> bool:
    return isinstance(request, socket.socket) and request.fileno() < 0

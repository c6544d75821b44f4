"""The shipped worker: one request at a time, the accept loop of the process.

One listener: a blocking `accept()` and nothing else between two requests. The kernel wakes one worker, the one that
waits longest: every worker gets the same share (Jain's index 1.00), and idle workers do not wake up at all. A shared
poll wakes the herd; EPOLLEXCLUSIVE starves; SO_REUSEPORT loses what is queued at a worker that dies.

To leave, the handler of TERM does not raise (that lost 784 requests in 1,803): it puts /dev/null in the place of the
worker's own copy of the listener. An `accept()` that was interrupted is retried (PEP 475) and fails with ENOTSOCK; a
connection that it had already returned is served. When the whole pool stops nothing is replaced: the listener says
EAGAIN once its queue is empty.

Several listeners: they are non-blocking, and each worker has an epoll of its own with EPOLLEXCLUSIVE, about 1.5 us
dearer a request.
"""

import contextlib
import errno
import logging
import os
import selectors
import socket
import socketserver
import sys
import time
from collections.abc import Callable, Sequence
from time import monotonic
from typing import Any

import prefork.scoreboard as scoreboard
from prefork.errors import RequestTimeout
from prefork.workers.base import Worker

log = logging.getLogger("prefork")

Take = Callable[[], tuple[Any, Any]]

_FULL = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)
_OVER = (errno.EAGAIN, errno.ENOTSOCK, errno.EBADF, errno.EINVAL)
_BROKEN = (errno.ENOTSOCK, errno.EBADF, errno.EINVAL, errno.EOPNOTSUPP)
_PAUSE = 0.05  # seconds without accepting while the system is full
_LAST_LOOK = 32  # connections that a leaving worker may still take from each of several listeners


class SyncWorker(Worker):
    """Serves any `socketserver` server, the whole chain of its methods, one request at a time.

    Where the chain hands requests to other threads (`ThreadingMixIn`, an executor), a worker that leaves waits for all
    of them, daemon threads too.
    """

    _null = -1
    _said = 0.0
    _fds: list[int]  # of the listeners, as they were inherited

    def run(self) -> None:
        self._fds = [_listener(server).fileno() for server in self.servers]
        takes = [_taker(server, self._board) for server in self.servers]
        # From here on `drain()` can replace a listener.
        self._null = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
        followed: list[socketserver.BaseServer] = []
        for server in self.servers:
            if (secure := _defer_handshake(server)) or _hands_over(server):
                self._follow(server, secure)
                followed.append(server)
        if self.draining:  # told to leave between ready and here
            self.drain()
        if len(self.servers) > 1:
            self._serve_several(takes)
        elif followed:
            self._serve_followed(self.server, *takes)
        else:
            self._serve_one(self.server, *takes)
        self._finish()

    def drain(self) -> None:
        if self._null >= 0 and not self._board.pool_drains and len(self.servers) == 1:
            os.dup2(self._null, self._fds[0], inheritable=False)

    # -- one listener ----------------------------------------------------------------------------------------------

    def _serve_one(self, server: socketserver.BaseServer, take: Take) -> None:
        """The hot path. Everything it needs is a local name; each line here was measured."""
        verify, process, shutdown = server.verify_request, server.process_request, server.shutdown_request
        if _nothing_to_shut(server):
            process = server.finish_request
        ints, floats = self._board.ints, self._board.floats
        since, due, count_at, spent = (
            scoreboard.BUSY_SINCE,
            scoreboard.DEADLINE,
            scoreboard.REQUESTS,
            scoreboard.BUSY_TIME,
        )
        port_at = scoreboard.PEER_PORT
        inet = _has_plain_peers(server)
        timeout = self.options.request_timeout or 0.0
        limit = self._limited()
        count, total, last_host = 0, 0.0, ""
        while True:
            try:
                request, peer = take()
            except OSError as error:
                if self._over(error):
                    return
                continue
            start = monotonic()
            floats[since] = start
            if inet:
                # A client's host seldom changes from one request to the next; its port always does.
                if peer[0] != last_host:
                    last_host = peer[0]
                    self._board.set_peer(peer)
                ints[port_at] = peer[1]
            else:
                self._board.set_peer(peer)
            try:
                if timeout:
                    floats[due] = start + timeout
                if verify(request, peer):
                    process(request, peer)
                else:
                    shutdown(request)
            except Exception:
                self._failed(server, request, peer)
            except BaseException:
                shutdown(request)
                raise
            if timeout:
                floats[due] = 0.0  # from here on no RequestTimeout can come
            end = monotonic()
            count += 1
            total += end - start
            ints[count_at] = count
            floats[spent] = total
            floats[since] = 0.0
            if count >= limit:
                self._look(count, end)

    def _serve_followed(self, server: socketserver.BaseServer, take: Take) -> None:
        """The same accept where requests are followed. A loop of its own, so that the hot one tests no flag for it."""
        while True:
            try:
                request, peer = take()
            except OSError as error:
                if self._over(error):
                    return
                continue
            self._hand_over(server, request, peer)

    def _over(self, error: OSError) -> bool:
        """Whether this error of an accept is the end of the loop. If not, do about it what can be done."""
        if self.draining or self._board.pool_drains:
            if error.errno in _OVER:
                self.draining = True
                return True
        elif error.errno in _BROKEN:
            raise error  # the program closed or shut down the listener under us; asking again would only spin
        if error.errno == errno.EAGAIN:
            # Somebody else made the shared listener non-blocking; wait as an accept would have.
            selector = selectors.DefaultSelector()
            selector.register(self._fds[0], selectors.EVENT_READ)
            selector.select(1.0)
            selector.close()
        elif error.errno in _FULL:
            now = monotonic()
            if now - self._said >= 1.0:
                self._said = now
                log.warning("worker %d cannot accept: %s; it pauses and tries again", self.slot, error.strerror)
            time.sleep(_PAUSE)
        # ECONNABORTED, EPROTO, a failed handshake: that client is gone, the next one is not.
        return False

    def _failed(self, server: socketserver.BaseServer, request: Any, peer: Any) -> None:
        """What socketserver does about an exception in the chain, with a deadline that may pass meanwhile."""
        try:
            server.handle_error(request, peer)
            server.shutdown_request(request)
        except RequestTimeout:
            server.shutdown_request(request)

    # -- threads behind the chain ----------------------------------------------------------------------------------

    def _follow(self, server: Any, secure: bool) -> None:
        """Have requests that the chain hands to another thread say when they are done: when they are shut down.

        With `secure` the handshake comes first; a client that fails in it is dropped, as an accept would have done.
        """
        finish, shutdown = server.finish_request, server.shutdown_request

        def finish_request(request: Any, client_address: Any) -> None:
            self._adopt(id(request))
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
                self._leave(id(request))

        server.finish_request, server.shutdown_request = finish_request, shutdown_request

    def _hand_over(self, server: socketserver.BaseServer, request: Any, peer: Any) -> None:
        """The chain for loops that are not the hottest: accounts through `serving()`'s two halves."""
        ticket = id(request)
        self._enter(ticket, peer)
        here = True  # whether the request is done when the chain returns
        try:
            if server.verify_request(request, peer):
                server.process_request(request, peer)
                here = not _hands_over(server) or _is_closed(request)
            else:
                server.shutdown_request(request)
        except Exception:
            self._failed(server, request, peer)
        except BaseException:
            server.shutdown_request(request)
            raise
        finally:
            if here:
                self._board.floats[scoreboard.DEADLINE] = 0.0  # no RequestTimeout from here on
                self._leave(ticket)

    def serve_single(self, server: socketserver.BaseServer, request: Any, peer: Any) -> None:
        """One request that was accepted elsewhere."""
        if _hands_over(server):
            self._follow(server, False)
        self._hand_over(server, request, peer)
        self._finish()

    # -- several listeners -----------------------------------------------------------------------------------------

    def _serve_several(self, takes: Sequence[Take]) -> None:
        takers = {fd: (server, take) for fd, server, take in zip(self._fds, self.servers, takes, strict=True)}
        poll = self._poller(list(takers))
        while not self.draining:
            for fd in poll(None):
                if fd in takers and not self._take_from(*takers[fd], 1):
                    break
        # A wake-up that the kernel gave to this worker alone must not be lost with it: look once more. When the whole
        # pool stops, take all there is.
        rounds = sys.maxsize if self._board.pool_drains else _LAST_LOOK
        for server, take in takers.values():
            self._take_from(server, take, rounds)

    def _take_from(self, server: socketserver.BaseServer, take: Take, most: int) -> bool:
        """Serve up to `most` requests that are queued. False once told to leave."""
        for _ in range(most):
            try:
                request, peer = take()
            except BlockingIOError:
                break
            except OSError as error:
                if self._over(error):
                    return False
                continue
            self._hand_over(server, request, peer)
        return not self.draining

    def _poller(self, fds: list[int]) -> Callable[[float | None], list[int]]:
        """A wait over all listeners that `drain` can end, whenever its signal comes."""
        receiver, sender = os.pipe()
        os.set_blocking(receiver, False)
        os.set_blocking(sender, False)

        def wake() -> None:
            with contextlib.suppress(BlockingIOError):
                os.write(sender, b"\0")

        self._wakeup = wake
        if self.draining:
            wake()
        if sys.platform == "linux":
            import select

            epoll = select.epoll()
            for fd in fds:
                epoll.register(fd, select.EPOLLIN | select.EPOLLEXCLUSIVE)
            epoll.register(receiver, select.EPOLLIN)
            return lambda timeout: [fd for fd, _ in epoll.poll(timeout)]
        selector = selectors.DefaultSelector()
        for fd in [*fds, receiver]:
            selector.register(fd, selectors.EVENT_READ)
        return lambda timeout: [key.fd for key, _ in selector.select(timeout)]


def _listener(server: Any) -> socket.socket:
    found: socket.socket = server.socket
    return found


def _hands_over(server: Any) -> bool:
    """Whether the chain may end in another thread: a ThreadingMixIn, an executor, what else replaces its middle."""
    kind = type(server)
    return "process_request" in vars(server) or kind.process_request is not socketserver.BaseServer.process_request


def _defer_handshake(server: Any) -> bool:
    """Whether the listener speaks TLS. Its handshakes then wait until the request has begun.

    In the accept a client that says nothing would hold the worker, and no deadline would be running.
    """
    listener = server.socket
    if not (_stock(server) and getattr(listener, "do_handshake_on_connect", False)):
        return False
    listener.do_handshake_on_connect = False
    return True


def _is_closed(request: Any) -> bool:
    return isinstance(request, socket.socket) and request.fileno() < 0


def _stock(server: Any) -> bool:
    """Whether `get_request` is socketserver's own."""
    return "get_request" not in vars(server) and type(server).get_request in (
        socketserver.TCPServer.get_request,
        socketserver.UDPServer.get_request,
    )


def _nothing_to_shut(server: Any) -> bool:
    """Whether all that follows a datagram's `finish_request` does nothing."""
    stock = {
        "process_request": socketserver.BaseServer.process_request,
        "shutdown_request": socketserver.UDPServer.shutdown_request,
        "close_request": socketserver.UDPServer.close_request,
    }
    return all(name not in vars(server) and getattr(type(server), name) is was for name, was in stock.items())


def _has_plain_peers(server: Any) -> bool:
    return _stock(server) and server.socket.family in (socket.AF_INET, socket.AF_INET6)


def _taker(server: Any, board: scoreboard.Slot) -> Take:
    """The cheapest call that does what the server's `get_request()` does."""
    get_request: Take = server.get_request
    listener = server.socket
    if listener.type == socket.SOCK_DGRAM:
        return _datagrams(server, board)
    if not _stock(server) or type(listener) is not socket.socket:
        return get_request  # overridden, or a TLS listener
    if sys.platform == "linux" and socket.getdefaulttimeout() is None:
        # socket.accept() asks for family and type as enums, 0.85 us each, at every call. The new socket is blocking:
        # on Linux it inherits nothing.
        accept, make = listener._accept, socket.socket  # type: ignore[attr-defined]
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


def _datagrams(server: Any, board: scoreboard.Slot) -> Take:
    """Receiving and answering need a descriptor each: leaving replaces the one that is received from, while a handler
    may be about to answer."""
    listener = server.socket
    # Not `listener.dup()`: that sets the timeout anew, and with it undoes the O_NONBLOCK of a stop, for every worker.
    answers = socket.socket(listener.family, listener.type, listener.proto)
    os.dup2(listener.fileno(), answers.fileno(), inheritable=False)
    local = listener.family == socket.AF_UNIX
    if _stock(server):
        server.socket = answers
        receive = listener.recvfrom

        def stock() -> tuple[Any, Any]:
            data, peer = receive(server.max_packet_size)
            if local and not data and not peer and board.pool_drains:
                raise BlockingIOError(errno.EAGAIN, "shut down")  # what SHUT_RD makes of a waiting recvfrom
            return (data, answers), peer

        return stock
    get_request = server.get_request

    def overridden() -> tuple[Any, Any]:
        request, peer = get_request()
        if isinstance(request, tuple) and len(request) == 2 and request[1] is listener:
            request = request[0], answers
        return request, peer

    return overridden

"""Connections whose request is not there yet: they wait here, in one epoll with the listeners, and hold no thread.

The idea is FreeBSD's, whose accept filters (accept_filter(9), accf_data, accf_http) keep a connection from accept()
until its request has come. Here the handler class says when that is: `has_request(data)`, with what has come so far.
That is looked at and left where it is (MSG_PEEK), so handlers know nothing of it. A look is due when more comes, and
not for as long as there is something (EPOLLET): who looks without taking would spin.

Whatever else ends the wait is for the handler too, who cannot be kept by it any more: the end of the stream, a reset, a
request longer than can be looked at. Only time and want of room close a connection that no handler has seen.

One event is taken from the epoll at a time. The kernel keeps the others in their order, and for a listener among them
it has asked a sibling as well, since nobody here waits at that moment.
"""

import contextlib
import math
import select
import socket
import sys
import time
import types
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from time import monotonic
from typing import Any, Protocol

import prefork.kernel.logs as logs
import prefork.kernel.readiness as readiness
from prefork.errors import OptionError
from prefork.workers.intake.acceptor import PAUSE, RESOURCE_ERRORS, Accepted, Acceptor, Taker

log = logs.get("prefork")

NAME = "has_request"
LOOK = 16384  # bytes that are looked at; a request that fills them is left to the handler
# Of a Unix stream less. Its client pays 768 bytes of its send buffer for each write that nobody took: after 70 of them
# a poll does not call it writable any more, and the 279th blocks.
LOOK_LOCAL = 64
_PEEK = socket.MSG_PEEK | getattr(socket, "MSG_DONTWAIT", 0)
_MOMENT = 1.0  # seconds for which nobody is closed to make room: his request may be on its way
_TICK = 0.05  # seconds between two looks of a leaving worker whether there is a hurry


class Host(Taker, Protocol):
    """What the filter asks of the worker it belongs to."""

    quitting: bool

    @property
    def drain_fd(self) -> int: ...


@dataclass(frozen=True, slots=True)
class Check:
    """How to tell whether a request is there: what is asked, and about how many bytes at most."""

    has_request: Callable[[bytes], object]
    most: int


def check_of(server: Any) -> Check | None:
    """What the server's handler class declares. None where it does not, or where there is nothing to look at: datagrams
    come whole, and of TLS only the cipher could be seen.

    Raises
    ------
    OptionError
        What it declares cannot be called without a handler.
    """
    handler = getattr(server, "RequestHandlerClass", None)
    has_request = getattr(handler, NAME, None)
    if has_request is None:
        return None
    if not callable(has_request) or isinstance(_declared(handler), types.FunctionType):
        raise OptionError(
            f"RequestHandlerClass: {getattr(handler, '__name__', handler)}.{NAME} is asked before there is a handler; "
            "make it a static method or a class method that takes bytes"
        )
    sock = server.socket
    if server.socket_type != socket.SOCK_STREAM or hasattr(sock, "do_handshake") or not hasattr(select, "epoll"):
        return None
    if sock.family == socket.AF_UNIX:
        return Check(has_request, LOOK_LOCAL)
    # What the kernel takes before it stops a client is half of the buffer or more, less for a window of small segments.
    return Check(has_request, min(LOOK, sock.getsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF) // 4))


def _declared(handler: Any) -> object:
    """As it stands in the class: what a static method looks like from outside is what a method looks like, too."""
    kinds = handler.__mro__ if isinstance(handler, type) else ()
    return next((vars(kind)[NAME] for kind in kinds if NAME in vars(kind)), None)


@dataclass(slots=True)
class _Waiting:
    taken: Accepted
    check: Check
    since: float


class Filter:
    """The listeners of a worker with threads, and its connections that wait.

    One thread at a time calls `take()`, which gives out what is for a handler. While none does, because all are busy,
    nobody is accepted and no deadline is looked at: nobody could be served anyway.

    Parameters
    ----------
    limit
        How many may wait. For one more the one that has waited longest is closed, which is never a client that is not
        slow: where nobody has waited for more than a moment, further ones stay in the backlog.
    patience
        Seconds from the accept for which one may wait.
    last_word
        The same since the order to leave.
    failed
        Is told the error where the program has closed a listener; the worker is to leave then.
    """

    def __init__(
        self,
        worker: Host,
        acceptor: Acceptor,
        checks: Mapping[Any, Check],
        *,
        limit: int,
        patience: float,
        last_word: float,
        failed: Callable[[OSError], object],
    ) -> None:
        self._worker, self._acceptor, self._checks = worker, acceptor, checks
        self._limit, self._patience, self._last_word, self._failed = limit, patience, last_word, failed
        self._waiting: dict[int, _Waiting] = {}  # by descriptor, in the order of their deadlines
        self._due = 0.0  # when the first of them is to be looked at; it may have been served by then
        self._resume_at = 0.0  # when to accept again, or 0.0
        self._until = math.inf  # all of them, once this worker leaves; not known yet when `draining` is seen first
        self._looks: list[list[int]] | None = None  # which listeners a leaving worker still asks, and how often
        self._listeners: frozenset[int] = frozenset()
        self._epoll = select.epoll()
        if not worker.draining:  # else the listener may be gone
            self._epoll.register(worker.drain_fd, select.EPOLLIN)
            self._accept_again()
            self._listeners = frozenset(acceptor.fds)

    def leave(self) -> None:
        """The worker is told to leave. From a signal handler."""
        self._until = monotonic() + self._last_word

    def take(self) -> Accepted | None:
        """The next connection whose request is there, or what needs no check. None when this worker is to take no more.

        Nobody is left waiting by then.
        """
        while not self._worker.draining:
            if found := self._turn():
                return found
        return self._take_last()

    def _turn(self) -> Accepted | None:
        wait = -1.0
        if self._waiting or self._resume_at:
            now = monotonic()
            if self._waiting:
                if now >= self._due:
                    return self._expire(now)
                wait = self._due - now
            if self._resume_at:
                if now >= self._resume_at:
                    self._accept_again()
                if self._resume_at:
                    wait = PAUSE
        for fd, events in self._epoll.poll(wait, 1):
            if fd in self._waiting:
                return self._hear(fd, events)
            if fd in self._listeners:
                return self._take(fd)
        return None

    def _take(self, fd: int) -> Accepted | None:
        acceptor, found = self._acceptor, None
        try:
            taken = acceptor.try_take(fd)
        except OSError as error:
            if error.errno in RESOURCE_ERRORS:
                acceptor.say_full(error)
                return self._make_room()
            self._end(error)
            return None
        try:
            if taken:
                found = self._welcome(taken)
                acceptor.step_back(self._epoll, fd)
                if found is None and len(self._waiting) > self._limit:
                    return self._make_room()  # not before: for this one nobody else was woken
            elif len(self._listeners) > 1:
                # Who was faster was perhaps woken for another listener, and nobody else will be for that one.
                acceptor.look_again(self._epoll)
        except OSError as error:
            if error.errno in RESOURCE_ERRORS:
                acceptor.say_full(error)
                self._pause()
            else:
                self._end(error)
        return found

    def _end(self, error: OSError) -> None:
        """The program has closed a listener."""
        self._listeners = frozenset()
        self._acceptor.poll_without(self._epoll)
        self._failed(error)

    def _make_room(self) -> Accepted | None:
        if self._first_is_old():
            return self._drop_first()
        self._pause()
        return None

    def _pause(self) -> None:
        self._acceptor.poll_without(self._epoll)
        self._resume_at = monotonic() + PAUSE

    def _accept_again(self) -> None:
        self._resume_at = 0.0
        try:
            self._acceptor.poll_with(self._epoll)
        except OSError as error:
            if error.errno not in RESOURCE_ERRORS:
                raise
            self._acceptor.say_full(error)
            self._resume_at = monotonic() + PAUSE

    # -- connections that wait -------------------------------------------------------------------------------------

    def _welcome(self, taken: Accepted) -> Accepted | None:
        """A new connection: give it out, or have it wait."""
        server, request, _ = taken
        check = self._checks.get(server)
        if check is None or not _can_peek(request) or self._is_there(taken, check):
            return taken
        now = monotonic()
        try:
            self._epoll.register(request.fileno(), select.EPOLLIN | select.EPOLLRDHUP | select.EPOLLET)
        except OSError:  # more than the system lets anybody wait for
            return taken
        if not self._waiting:
            self._due = now + self._patience
        self._waiting[request.fileno()] = _Waiting(taken, check, now)
        return None

    def _hear(self, fd: int, events: int) -> Accepted | None:
        """More has come, or the end."""
        one = self._waiting[fd]
        if events == select.EPOLLIN and not self._is_there(one.taken, one.check):
            return None
        self._remove(fd)
        return one.taken

    def _is_there(self, taken: Accepted, check: Check) -> bool:
        server, request, _ = taken
        try:
            # With a timeout a socket would wait for it, whatever the flags say.
            if request.gettimeout() and not readiness.is_readable(request.fileno()):
                return False
            data = request.recv(check.most, _PEEK)
        except BlockingIOError:
            return False
        except OSError:
            return True
        if not data or len(data) >= check.most:
            return True
        try:
            return bool(check.has_request(data))
        except Exception:
            name = getattr(server.RequestHandlerClass, "__name__", "")
            log.exception("worker %d: %s.%s(); the handler is to see to it", self._worker.slot, name, NAME)
            return True

    def _expire(self, now: float) -> Accepted | None:
        self._due = next(iter(self._waiting.values())).since + self._patience
        return self._drop_first() if self._due <= now else None

    def _first_is_old(self) -> bool:
        first = next(iter(self._waiting.values()), None)
        return first is not None and monotonic() - first.since >= _MOMENT

    def _drop_first(self) -> Accepted | None:
        """Close the one that has waited longest, unless something has come that was not looked at yet."""
        fd, one = next(iter(self._waiting.items()))
        self._remove(fd)
        server, request, peer = one.taken
        if self._is_there(one.taken, one.check) or readiness.has_ended(fd):
            return one.taken
        try:
            server.shutdown_request(request)
        except Exception:
            server.handle_error(request, peer)
        return None

    def _remove(self, fd: int) -> None:
        del self._waiting[fd]
        self._unregister([fd])  # by hand, as it would stay where a forked process has a copy

    # -- the end ---------------------------------------------------------------------------------------------------

    def _take_last(self) -> Accepted | None:
        """What is queued, and who waits: their requests may be on the way."""
        if self._looks is None:
            # Alone, once: a wake-up that the kernel gave to this worker only must not be lost with it.
            self._looks = [[fd, sys.maxsize if self._worker.pool_drains else 1] for fd in self._acceptor.fds]
            self._unregister([*self._listeners, self._worker.drain_fd])
        while self._looks:
            if found := self._look_last(self._looks):
                return found
        while self._waiting:
            left = 0.0 if self._worker.quitting else self._until - monotonic()
            if left <= 0.0:
                if found := self._drop_first():
                    return found
                continue
            for fd, events in self._epoll.poll(min(left, _TICK), 1):
                if fd in self._waiting and (found := self._hear(fd, events)):
                    return found
        return None

    def _look_last(self, looks: list[list[int]]) -> Accepted | None:
        one = looks[-1]
        one[1] -= 1
        taken = None
        try:
            taken = self._acceptor.try_take(one[0]) if one[1] >= 0 else None
        except OSError as error:
            if error.errno in RESOURCE_ERRORS:
                self._acceptor.say_full(error)
                if self._first_is_old():
                    return self._drop_first()
                time.sleep(PAUSE)
                return None
        if taken:
            return self._welcome(taken)
        looks.pop()
        return None

    def _unregister(self, fds: list[int]) -> None:
        for fd in fds:
            with contextlib.suppress(OSError):  # one that is not there, or that the program has closed
                self._epoll.unregister(fd)


def _can_peek(request: Any) -> bool:
    """Whether this is a connection as the kernel made it; what an overridden get_request() returns may be anything."""
    return type(request) is socket.socket or (
        isinstance(request, socket.socket) and not hasattr(request, "do_handshake")
    )

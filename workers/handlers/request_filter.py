"""Connections wait here for their request, in one epoll with the listeners, and occupy no thread.

The idea is FreeBSD's, whose accept filters (accept_filter(9), accf_data, accf_http) keep a connection from accept()
until its request has come. Here the handler class says when that is: `has_request(data)`, with all data so far. The
filter peeks at the data and leaves it where it is (MSG_PEEK), so handlers know nothing of it. It looks when more comes,
not as long as there is data (EPOLLET): a loop that looks without taking would spin.

Whatever else ends the wait is for the handler too, and cannot occupy it for long: the end of the stream, a reset, a
request longer than the filter can see. Only time and want of room close a connection that no handler has seen.

One event is taken from the epoll at a time. The kernel keeps the others in their order, and for a listener among them
it has asked a sibling as well, because nobody here waits at that moment.
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
from prefork.workers.intake.waiting import HEAD, WaitingConnections, WaitPhase

log = logs.get("prefork")

NAME = "has_request"
LOOK = 16384  # bytes at which the filter looks; a request that fills them is left to the handler
# Fewer bytes of a Unix stream. Its client pays 768 bytes of its send buffer for each write that was not taken: after 70
# of them a poll does not call the stream writable any more, and the 279th write blocks.
LOOK_LOCAL = 64
_PEEK = socket.MSG_PEEK | getattr(socket, "MSG_DONTWAIT", 0)
_MOMENT = 1.0  # seconds for which no connection is closed to make room: its request may be on its way
_TICK = 0.05  # seconds after which a leaving worker looks whether it is in a hurry


class FilteringWorker(Taker, Protocol):
    """What the filter uses of its worker."""

    quitting: bool

    @property
    def drain_fd(self) -> int: ...


@dataclass(frozen=True, slots=True)
class Check:
    """How to tell whether a request is there: the handler's query, and how many bytes it is shown at most."""

    has_request: Callable[[bytes], object]
    most: int


def check_of(server: Any) -> Check | None:
    """The check that the server's handler class declares; None where it declares none, or where nothing can be seen.

    Datagrams come whole, and of TLS only the cipher could be seen.

    Raises
    ------
    OptionError
        The declared query cannot be called without a handler.
    """
    handler = getattr(server, "RequestHandlerClass", None)
    has_request = getattr(handler, NAME, None)
    if has_request is None:
        return None
    if not callable(has_request) or isinstance(_declared(handler), types.FunctionType):
        raise OptionError(
            f"RequestHandlerClass: {getattr(handler, '__name__', handler)}.{NAME} is called before there is a handler; "
            "make it a static method or a class method that takes bytes",
            code="PF0106",
        )
    sock = server.socket
    if server.socket_type != socket.SOCK_STREAM or hasattr(sock, "do_handshake") or not hasattr(select, "epoll"):
        return None
    if sock.family == socket.AF_UNIX:
        return Check(has_request, LOOK_LOCAL)
    # Before the kernel stops a client it takes half of the buffer or more, less in a window of small segments.
    return Check(has_request, min(LOOK, sock.getsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF) // 4))


def _declared(handler: Any) -> object:
    """The query as it stands in the class: from outside a static method looks like a method."""
    kinds = handler.__mro__ if isinstance(handler, type) else ()
    return next((vars(kind)[NAME] for kind in kinds if NAME in vars(kind)), None)


@dataclass(slots=True, eq=False)
class _Waiting:
    """A connection in the table; only one thread at a time uses it."""

    taken: Accepted
    check: Check
    fd: int
    phase: WaitPhase = HEAD
    deadline: float = 0.0
    parked: bool = False
    in_service: bool = False


class Filter:
    """The listeners of a worker with threads, and its connections that wait.

    One thread at a time calls `take()`, which returns the next connection for a handler. While all threads are busy
    none calls it: no connection is accepted then and no deadline is looked at, because none could be served anyway.

    Parameters
    ----------
    limit
        How many connections may wait. For one more the one that has waited longest is closed, but only a slow one:
        where none has waited for more than a moment, further clients stay in the backlog.
    patience
        Seconds from the accept for which a connection may wait.
    last_word
        The same since the order to leave.
    failed
        Is called with the error where the program has closed a listener; the worker is to leave then.
    """

    def __init__(
        self,
        worker: FilteringWorker,
        acceptor: Acceptor,
        checks: Mapping[Any, Check],
        *,
        limit: int,
        patience: float,
        last_word: float,
        failed: Callable[[OSError], object],
    ) -> None:
        self._worker, self._acceptor, self._checks = worker, acceptor, checks
        self._last_word, self._failed = last_word, failed
        # All are in one phase, so the first has waited longest.
        self._waiting: WaitingConnections[_Waiting] = WaitingConnections(limit, {HEAD: patience})
        self._due = 0.0  # when to look at the first of them; it may have been served by then
        self._resume_at = 0.0  # when to accept again, or 0.0
        self._until = math.inf  # the deadline of all, once this worker leaves; unknown when `draining` is seen first
        self._looks: list[list[int]] | None = None  # the listeners that a leaving worker still asks, and how often
        self._listeners: frozenset[int] = frozenset()
        self._epoll = select.epoll()
        self._waiting.open(self._epoll, events=select.EPOLLIN | select.EPOLLRDHUP | select.EPOLLET)
        if not worker.draining:  # else the listener may be gone
            self._epoll.register(worker.drain_fd, select.EPOLLIN)
            self._accept_again()
            self._listeners = frozenset(acceptor.fds)

    def leave(self) -> None:
        """The worker is told to leave. From a signal handler."""
        self._until = monotonic() + self._last_word

    def take(self) -> Accepted | None:
        """The next connection whose request is there, or which needs no check.

        None: this worker is to take no more, and no connection waits any more.
        """
        while not self._worker.draining:
            if accepted := self._turn():
                return accepted
        return self._take_last()

    def _turn(self) -> Accepted | None:
        wait = -1.0
        if self._waiting.by_fd or self._resume_at:
            now = monotonic()
            if self._waiting.by_fd:
                if now >= self._due:
                    return self._expire(now)
                wait = self._due - now
            if self._resume_at:
                if now >= self._resume_at:
                    self._accept_again()
                if self._resume_at:
                    wait = PAUSE
        for fd, events in self._epoll.poll(wait, 1):
            if fd in self._waiting.by_fd:
                return self._hear(fd, events)
            if fd in self._listeners:
                return self._take(fd)
        return None

    def _take(self, fd: int) -> Accepted | None:
        acceptor, accepted = self._acceptor, None
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
                accepted = self._welcome(taken)
                acceptor.step_back(self._epoll, fd)
                if accepted is None and len(self._waiting.by_fd) > self._waiting.limit:
                    return self._make_room()  # not before: for this connection no other worker was woken
            elif len(self._listeners) > 1:
                # The faster sibling was perhaps woken for another listener, and no other will be for that listener.
                acceptor.look_again(self._epoll)
        except OSError as error:
            if error.errno in RESOURCE_ERRORS:
                acceptor.say_full(error)
                self._pause()
            else:
                self._end(error)
        return accepted

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
        waiting = _Waiting(taken, check, request.fileno())
        is_first = not self._waiting.by_fd
        try:
            self._waiting.park(waiting, HEAD)
        except OSError:  # more than the system lets anybody wait for
            self._waiting.remove(waiting)
            return taken
        if is_first:
            self._due = waiting.deadline
        return None

    def _hear(self, fd: int, events: int) -> Accepted | None:
        """More has come, or the end."""
        waiting = self._waiting.by_fd[fd]
        if events == select.EPOLLIN and not self._is_there(waiting.taken, waiting.check):
            return None
        self._waiting.remove(waiting)
        return waiting.taken

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
            text = "%s: %s.%s() raised; the handler gets the connection [PF0610]"
            log.exception(text, self._worker.log_name, name, NAME)
            return True

    def _expire(self, now: float) -> Accepted | None:
        self._due = self._waiting.first().deadline
        return self._drop_first() if self._due <= now else None

    def _first_is_old(self) -> bool:
        if not self._waiting.by_fd:
            return False
        return self._waiting.first().deadline - self._waiting.patience[HEAD] + _MOMENT <= monotonic()

    def _drop_first(self) -> Accepted | None:
        """Close the connection that has waited longest, unless data has come at which the filter has not looked yet."""
        first = self._waiting.first()
        self._waiting.remove(first)
        server, request, peer = first.taken
        if self._is_there(first.taken, first.check) or readiness.has_ended(first.fd):
            return first.taken
        try:
            server.shutdown_request(request)
        except Exception:
            server.handle_error(request, peer)
        return None

    # -- the end ---------------------------------------------------------------------------------------------------

    def _take_last(self) -> Accepted | None:
        """Take the queue, and what waits: their requests may be on the way."""
        if self._looks is None:
            # Alone, once: a wake-up that the kernel gave to this worker only must not be lost with it.
            self._looks = [[fd, sys.maxsize if self._worker.pool_drains else 1] for fd in self._acceptor.fds]
            self._unregister([*self._listeners, self._worker.drain_fd])
        while self._looks:
            if accepted := self._look_last(self._looks):
                return accepted
        while self._waiting.by_fd:
            left = 0.0 if self._worker.quitting else self._until - monotonic()
            if left <= 0.0:
                if accepted := self._drop_first():
                    return accepted
                continue
            for fd, events in self._epoll.poll(min(left, _TICK), 1):
                if fd in self._waiting.by_fd and (accepted := self._hear(fd, events)):
                    return accepted
        return None

    def _look_last(self, looks: list[list[int]]) -> Accepted | None:
        last = looks[-1]
        last[1] -= 1
        taken = None
        try:
            taken = self._acceptor.try_take(last[0]) if last[1] >= 0 else None
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
            with contextlib.suppress(OSError):  # it is not there, or the program has closed it
                self._epoll.unregister(fd)


def _can_peek(request: Any) -> bool:
    """Whether this is a connection as the kernel made it: an overridden get_request() may return anything."""
    return type(request) is socket.socket or (
        isinstance(request, socket.socket) and not hasattr(request, "do_handshake")
    )

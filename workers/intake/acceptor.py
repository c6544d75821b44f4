"""Taking connections and datagrams from the listeners of a worker, and ending that without a loss.

One listener: a blocking `accept()` and nothing else between two requests. The kernel wakes one worker, the one that
waits longest: every worker gets the same share (Jain's index 1.00), and idle workers do not wake up at all. A shared
poll wakes the herd; SO_REUSEPORT loses what is queued at a worker that dies.

To leave, the handler of TERM does not raise (that lost 784 requests in 1,803). It puts /dev/null in the place of the
worker's own copy of the listener. An `accept()` that was interrupted is retried (PEP 475) and fails with ENOTSOCK; a
connection that it had already returned is served. When the whole pool stops nothing is replaced: the listener says
EAGAIN once its queue is empty.

Several listeners, or a loop that waits for other things too: the listeners are non-blocking, and each worker has an
epoll of its own with EPOLLEXCLUSIVE, about 1.5 us dearer a request. The kernel asks exclusive waiters in the order in
which they came and stops at the first that waits; a worker that never moved would get everything (Jain's index 0.02).
So a worker that took something goes to the end of that line: it takes the listener out of its epoll and puts it back.

Listeners are taken from in the order in which an epoll reports them. For the first, the kernel has woken this worker
and no other. For the others, which became readable before this worker ran, it has woken another worker as well. In the
opposite order that other worker finds nothing and sleeps again, and the first connection waits for as long as this
worker is busy.
"""

import contextlib
import errno
import os
import selectors
import socketserver
import sys
from collections.abc import Callable, Sequence
from time import monotonic
from typing import Any, Protocol

import prefork.kernel.dev_null as dev_null
import prefork.kernel.logs as logs
import prefork.kernel.readiness as readiness
import prefork.link.scoreboard as scoreboard
from prefork.kernel.unpatched import select, socket, time
from prefork.workers.intake.accept_calls import Take, make_accept

log = logs.get("prefork")

Accepted = tuple[Any, Any, Any]  # server, request, peer

# The system has no room, which may pass: for a descriptor, or (ENOSPC, ENOMEM) for one more that an epoll waits for.
RESOURCE_ERRORS = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM, errno.ENOSPC)
_NO_WATCH = (
    "the user watches as many descriptors as fs.epoll.max_user_watches allows"  # the errno is that of a full disk
)
PAUSE = 0.05  # seconds without accepting while the system is full
_OVER = (errno.EAGAIN, errno.ENOTSOCK, errno.EBADF, errno.EINVAL)
_BROKEN = (errno.ENOTSOCK, errno.EBADF, errno.EINVAL, errno.EOPNOTSUPP)
_LAST_LOOK = 32  # connections that a leaving worker may still take from each listener that it polls
_EXCLUSIVE = getattr(select, "EPOLLEXCLUSIVE", 0)


class Taker(Protocol):
    """What an acceptor asks of its worker."""

    slot: int
    draining: bool

    @property
    def log_name(self) -> str: ...

    @property
    def pool_drains(self) -> bool: ...


class Acceptor:
    """The listeners of one worker.

    For a loop that serves what it takes: `take()`. For a loop that waits for more than listeners: `poll_with()` the
    epoll of that loop, `try_take()` from what is readable, and the same once more at the end (`last_look()`).
    """

    def __init__(self, worker: Taker, servers: Sequence[socketserver.BaseServer], board: scoreboard.Slot) -> None:
        self._worker, self._board = worker, board
        # As they were inherited; an accept function of datagrams puts another socket into its server.
        self.fds: list[int] = [_listener(server).fileno() for server in servers]
        self.takes: list[Take] = [make_accept(server, board) for server in servers]
        self._takers = dict(zip(self.fds, zip(servers, self.takes, strict=True), strict=True))
        self._unix = {fd for fd, server in zip(self.fds, servers, strict=True) if _is_local(server)}
        self._said = 0.0  # when the log was last told that the system is full
        self._first = -1  # of `in_turn()`
        # What takes the place of the only listener. It is made now, for a full table of descriptors has no room for it.
        self._null = -1
        self._replaced = False  # by that
        self._closed = False  # by the program: the number of the descriptor may be somebody else's now
        self._wait: Callable[[], list[int]] | None = None
        self._ready: list[int] = []  # what `_wait()` has found, and nobody has taken from yet
        self._looks: list[tuple[int, int]] | None = None  # listeners to take from at the end, and how often
        self._unwatched: set[int] = set()  # listeners that the epoll of `take()` has no room for
        if len(servers) == 1:
            self._null = dev_null.open_null()
        else:
            self._wait, self._wake = self._waiter()

    def leave(self) -> None:
        """Make `take()` return, whenever it is called. From a signal handler; again and again without harm."""
        if self._wait is not None:
            self._wake()
        elif not (self._worker.pool_drains or self._closed):
            os.dup2(self._null, self.fds[0], inheritable=False)
            self._replaced = True

    def take(self) -> Accepted | None:
        """The next connection or datagram: (server, request, peer). None when this worker is to take no more."""
        return self._take_one() if self._wait is None else self._take_of_several()

    def _take_one(self) -> Accepted | None:
        ((server, take),) = self._takers.values()
        while True:
            try:
                request, peer = take()
            except OSError as error:
                if self.over(error):
                    return None
                continue
            return server, request, peer

    def over(self, error: OSError) -> bool:
        """Whether this error of a blocking take is the end. If not, do about it what can be done."""
        worker = self._worker
        if worker.draining or worker.pool_drains:
            # A listener with a timeout does not say EAGAIN. A handshake that took too long is no end of the queue.
            silent = isinstance(error, TimeoutError) and not readiness.is_readable(self.fds[0])
            # The kernel looks for a descriptor first, and then for a connection: there may be nobody to give it to.
            vain = error.errno in RESOURCE_ERRORS and (self._replaced or not readiness.is_readable(self.fds[0]))
            if silent or vain or error.errno in _OVER:
                worker.draining = True
                return True
        elif error.errno in _BROKEN:
            self._closed = error.errno in (errno.EBADF, errno.ENOTSOCK)
            raise error  # the program closed or shut down the listener under us; asking again would only spin
        if error.errno == errno.EAGAIN:
            # Somebody else made the shared listener non-blocking; wait as an accept would have. A poll asks by number:
            # the /dev/null of a retirement ends it. The end of the whole pool does not, so it looks up now and then.
            poll = select.poll()
            poll.register(self.fds[0], select.POLLIN)
            poll.poll(PAUSE * 1000)
        elif error.errno in RESOURCE_ERRORS:
            self.say_full(error)
            time.sleep(PAUSE)
        # ECONNABORTED, EPROTO, a failed handshake: that client is gone, the next one is not.
        return False

    def say_full(self, error: OSError, cannot: str = "accept a connection", then: str = "it tries again") -> None:
        """Log, at most once a second, that the system has no room for another connection."""
        now = monotonic()
        if now - self._said >= 1.0:
            self._said = now
            why = _NO_WATCH if error.errno == errno.ENOSPC else error.strerror
            log.warning("%s cannot %s: %s; %s [PF0408]", self._worker.log_name, cannot, why, then)

    # -- several listeners -----------------------------------------------------------------------------------------

    def _take_of_several(self) -> Accepted | None:
        assert self._wait is not None
        while not self._worker.draining:
            while self._ready and not self._worker.draining:
                if taken := self._taken_from(self._ready.pop(0)):
                    return taken
                if not self._ready and self._epoll is not None:
                    # The worker that was faster may have been woken for another listener: the kernel wakes nobody else
                    # for that one.
                    for fd in self.fds:
                        self._queue_up(fd)
            if not self._worker.draining:
                self._ready = [fd for fd in self._wait() if fd in self._takers]
        return self._last()

    def _last(self) -> Accepted | None:
        """A wake-up that the kernel gave to this worker alone must not be lost with it: look once more. Not longer: it
        serves one after the other, and a long queue would keep it past `graceful_timeout`."""
        if self._looks is None:
            self._looks = [(fd, sys.maxsize if self._worker.pool_drains else 1) for fd in self.fds]
        while self._looks:
            fd, left = self._looks.pop()
            if left and (taken := self._taken_from(fd)):
                self._looks.append((fd, left - 1))
                return taken
        return None

    def last_look(self) -> int:
        """How many a worker that leaves may still take from a listener: when the whole pool stops, all there are."""
        return sys.maxsize if self._worker.pool_drains else _LAST_LOOK

    def _taken_from(self, fd: int) -> Accepted | None:
        try:
            taken = self.try_take(fd)
        except OSError as error:
            if error.errno not in RESOURCE_ERRORS:
                raise
            self.say_full(error)
            time.sleep(PAUSE)
            return None
        if taken and self._epoll is not None:
            self._queue_up(fd)
            if fd in self._unwatched:
                self._ready.append(fd)
        return taken

    def _queue_up(self, fd: int) -> None:
        """`step_back()` in the epoll of `take()`. A listener that it has no room for is asked without being waited for
        until there is some."""
        assert self._epoll is not None
        try:
            self.step_back(self._epoll, fd)
        except OSError as error:
            if error.errno not in RESOURCE_ERRORS:
                raise
            self.say_full(error, "watch a listener", "it tries again")
            self._unwatched.add(fd)
        else:
            self._unwatched.discard(fd)

    def _wait_exclusively(self) -> list[int]:
        assert self._epoll is not None
        if not self._unwatched:
            return [fd for fd, _ in self._epoll.poll()]
        ready = [fd for fd, _ in self._epoll.poll(PAUSE)]
        unwatched = list(self._unwatched)
        for fd in unwatched:
            self._queue_up(fd)
        return [*ready, *unwatched]

    _epoll: "select.epoll | None" = None

    def _waiter(self) -> tuple[Callable[[], list[int]], Callable[[], None]]:
        """A wait over all listeners, and what ends it, whenever it is called."""
        receiver, sender = os.pipe()
        os.set_blocking(sender, False)

        def wake() -> None:
            readiness.wake_reader(receiver, sender)

        if _EXCLUSIVE:
            self._epoll = select.epoll()
            self._epoll.register(receiver, select.EPOLLIN)
            for fd in self.in_turn():
                os.set_blocking(fd, False)
                self._queue_up(fd)
            return self._wait_exclusively, wake
        selector = selectors.DefaultSelector()
        for fd in [*self.fds, receiver]:
            selector.register(fd, selectors.EVENT_READ)
        return (lambda: [key.fd for key, _ in selector.select()]), wake

    # -- for loops of one's own ------------------------------------------------------------------------------------

    def in_turn(self) -> list[int]:
        """The listeners, beginning with another one each time: what an epoll reports first takes what room there is."""
        self._first = (self._first + 1) % len(self.fds)
        return self.fds[self._first :] + self.fds[: self._first]

    def poll_with(self, epoll: "select.epoll") -> None:
        """Wait for the listeners with an epoll of one's own, so that one connection wakes one worker.

        Take in the order of its report, and at least the first: for that one nobody else was woken.

        Raises
        ------
        OSError
            One of `RESOURCE_ERRORS`: the epoll waits for none of them now; wait `PAUSE` seconds, `say_full()`.
        """
        try:
            for fd in self.in_turn():
                os.set_blocking(fd, False)
                self.join(epoll, fd)
        except OSError:
            self.poll_without(epoll)
            raise

    def take_bare(self, server: Any) -> None:
        """Have `try_take()` give out connections of this server as `socket.SocketType`, 0.3 us cheaper than the class
        that adds makefile() to it; where `get_request()` is the server's own, as before."""
        self._make_by(socket.SocketType, server)

    def take_told(self) -> None:
        """Have `try_take()` give out connections whose family and type are attributes of their class: uvloop asks each
        for them three times, and socket.socket makes an enum at every question, 0.85 us each."""
        for server, _ in list(self._takers.values()):
            listener = _listener(server)
            if listener.type == socket.SOCK_STREAM:
                told = {"__slots__": (), "family": listener.family, "type": listener.type}
                self._make_by(type("socket", (socket.socket,), told), server)

    def _make_by(self, make: Callable[..., Any], server: Any) -> None:
        self._takers[_listener(server).fileno()] = server, make_accept(server, self._board, make)

    def poll_without(self, epoll: "select.epoll") -> None:
        """Wait for them no more."""
        for fd in self.fds:
            with contextlib.suppress(OSError):  # one that is not there, or that the program has closed
                epoll.unregister(fd)

    def step_back(self, epoll: "select.epoll", fd: int) -> None:
        """After a take: let every other worker have its turn first.

        Raises
        ------
        OSError
            One of `RESOURCE_ERRORS`: the epoll may wait for it no more; `poll_without()`, and so on as for
            `poll_with()`.
        """
        try:  # noqa: SIM105  a context manager is dearer than the call; below, too
            epoll.unregister(fd)
        except FileNotFoundError:
            pass  # there was no room for it
        self.join(epoll, fd)

    def join(self, epoll: "select.epoll", fd: int) -> None:
        """To the end of the kernel's line, from outside of it. Raises what `step_back()` does."""
        try:  # noqa: SIM105
            epoll.register(fd, select.EPOLLIN | _EXCLUSIVE)
        except FileExistsError:
            pass  # it could not be taken out

    def look_again(self, epoll: "select.epoll") -> None:
        """After a take that came too late: have the next wait find what is queued at any listener."""
        for fd in self.fds:
            self.step_back(epoll, fd)

    def try_take(self, fd: int) -> Accepted | None:
        """One connection or datagram from a listener that was readable; None where somebody else was faster.

        Raises
        ------
        OSError
            One of `RESOURCE_ERRORS`: wait `PAUSE` seconds, `say_full()`. Others: the program has closed the listener.
        """
        server, take = self._takers[fd]
        try:
            request, peer = take()
        except OSError as error:
            # A Unix listener that was shut down because the whole pool stops says EINVAL, maybe before TERM has come.
            leaving = self._worker.draining or self._worker.pool_drains
            if error.errno in RESOURCE_ERRORS:
                if readiness.is_readable(fd):
                    raise
                return None  # the kernel looks for a descriptor first; there is nobody to give it to
            if error.errno in _BROKEN and not leaving:
                raise
            if fd in self._unix and not leaving and readiness.has_ended(fd):
                # It says EAGAIN, for ever, while an epoll reports it.
                raise OSError(errno.EINVAL, "the listener was shut down") from None
            return None
        return server, request, peer


def _listener(server: Any) -> socket.socket:
    listener: socket.socket = server.socket
    return listener


def _is_local(server: Any) -> bool:
    """Whether it takes Unix streams."""
    listener = _listener(server)
    return listener.family == socket.AF_UNIX and listener.type == socket.SOCK_STREAM

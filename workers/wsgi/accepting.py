"""When the loop of a WSGI worker accepts: not at `max_connections`, not while the system is full, and not out of turn.

It is out of turn where this worker has its share of the kept connections, and a sibling has not: `intake.balance`.
"""

from enum import Enum
from time import monotonic
from typing import Any, Protocol

from prefork.workers.intake.acceptor import PAUSE, RESOURCE_ERRORS, Acceptor
from prefork.workers.intake.balance import ASIDE, Advice, ConnectionBalancer
from prefork.workers.intake.waiting import WaitingConnections
from prefork.workers.wsgi.loop_rules import TRIES, Crowd
from prefork.workers.wsgi.parser import Connection


class AcceptingWorker(Protocol):
    """What is used of the worker."""

    threads: int
    draining: bool
    quitting: bool

    @property
    def acceptor(self) -> Acceptor: ...


class AcceptingLoop(Protocol):
    """What is done with connections."""

    connections: WaitingConnections[Connection]

    def welcome(self, server: Any, sock: Any, peer: Any) -> None:
        """Read from a new connection, and serve it if its request is there."""

    def close_idle(self) -> bool:
        """Close idle connections. Returns whether there is room then."""


class IntakeState(Enum):
    OPEN = "the epoll waits for the listeners"
    YIELDED = "the queue of one listener is left to the siblings"
    PAUSED = "there is no room, here or in the system"
    CLOSED = "the worker leaves, or has not begun"


OPEN, YIELDED, PAUSED, CLOSED = IntakeState  # a name of the module is read faster than an attribute of an enum
_WAITS = {OPEN: 0.0, YIELDED: ASIDE, PAUSED: PAUSE, CLOSED: 0.0}


class Accepting:
    """`wait`: seconds after which the loop has to look again, 0.0 where only an event of a listener matters."""

    def __init__(self, worker: AcceptingWorker, loop: AcceptingLoop, epoll: Any, balancer: ConnectionBalancer) -> None:
        self._worker, self._loop, self._epoll, self._balancer = worker, loop, epoll, balancer
        self._acceptor, self._is_single = worker.acceptor, worker.threads == 1
        self._crowd = Crowd()
        self._yielded = -1  # the listener whose queue is left to siblings, while YIELDED
        self._retry_at = 0.0  # when to accept again, while PAUSED
        self._become(CLOSED)

    def _become(self, state: IntakeState) -> None:
        self._state, self.wait, self.is_yielded = state, _WAITS[state], state is YIELDED

    def start(self) -> None:
        try:
            self._acceptor.poll_with(self._epoll)
        except OSError as error:
            if error.errno not in RESOURCE_ERRORS:
                raise
            self._acceptor.say_full(error)
            self._retry_at = monotonic() + PAUSE
            self._become(PAUSED)
        else:
            self._become(OPEN)

    def _stop(self, why: IntakeState) -> None:
        if self._state is OPEN:
            self._acceptor.poll_without(self._epoll)
        self._become(why)

    def end(self) -> None:
        """The worker leaves: accept what is queued, as far as it is this worker's, and then no more."""
        self._stop(CLOSED)
        if not self._worker.quitting:
            for fd in self._acceptor.fds:
                self._accept_last(fd, self._acceptor.last_look())

    def _accept_last(self, fd: int, number: int) -> None:
        for _ in range(number):
            try:
                accepted = self._acceptor.try_take(fd)
            except OSError:
                return
            if accepted is None:
                return
            self._loop.welcome(*accepted)

    def retry(self, now: float) -> None:
        """Accept again after a pause, if there is room."""
        if self._state is not PAUSED or now < self._retry_at:
            return
        if self._loop.connections.has_room or self._loop.close_idle():
            self.start()

    def take_back(self) -> None:
        """Accept again from a queue that was left to siblings, if they do not take it."""
        if self._state is YIELDED and not self._is_siblings(self._yielded):
            self.start()

    def _is_siblings(self, fd: int) -> bool:
        return self._balancer.advice(fd, len(self._loop.connections.by_fd), single=self._is_single) is Advice.YIELD

    def _pause_if_full(self, error: OSError) -> None:
        if error.errno not in RESOURCE_ERRORS:
            raise error
        self._acceptor.say_full(error)
        self._retry_at = monotonic() + PAUSE
        self._stop(PAUSED)

    def accept(self, fd: int) -> None:
        """Accept what a listener has queued, while the queue is this worker's; `Crowd` has the rules."""
        loop, crowd = self._loop, self._crowd
        connections, limit, try_take = loop.connections.by_fd, loop.connections.limit, self._acceptor.try_take
        for number in range(1, TRIES + 1):
            before = len(connections)
            if before >= limit and not loop.close_idle():
                self._retry_at = 0.0
                self._stop(PAUSED)
                return
            try:
                accepted = try_take(fd)
            except OSError as error:
                self._pause_if_full(error)
                loop.close_idle()
                accepted = None
            if accepted is None:
                crowd.nobody(number)
                break
            loop.welcome(*accepted)
            # A worker that has got a connection to keep lets its siblings have the next one. A connection that is over
            # already leaves nothing to be fair about.
            if not crowd.accepted(number) or len(connections) > before or self._worker.draining:
                break
        if self._state is not OPEN:
            return
        has_more = len(connections) > before
        if has_more and self._is_siblings(fd):
            self._yielded = fd
            self._stop(YIELDED)
        elif has_more or number > 1:
            try:
                self._acceptor.step_back(self._epoll, fd)
            except OSError as error:
                self._pause_if_full(error)

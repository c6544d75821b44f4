"""The table of connections that wait: for a request, for the rest of a request, or for their client's end.

While it waits a connection occupies no thread. It has a phase, and a deadline that follows from the phase. The table
knows nothing of workers and protocols: it says who is late, who idles longest, and whether there is room.

The owner looks for late connections twice a second, and only while there are any. This is cheaper than an order by
deadlines that each request would change, and an idle worker does not wake up.

Where threads serve, a connection may be `in_service`: then it belongs to its thread, although it is in the table, and
mostly in the epoll too. An event of such a connection mutes it: it leaves the epoll until its thread gives it back.
This is rare, so most requests cost no epoll_ctl().
"""

import heapq
import threading
from collections.abc import Callable
from enum import IntEnum
from time import monotonic
from typing import Generic, Protocol, TypeVar

from prefork.kernel.unpatched import select


class WaitPhase(IntEnum):
    """What a connection waits for."""

    IDLE = 0  # the first byte of a request
    HEAD = 1  # the rest of a head
    BODY = 2  # the rest of a body
    LINGER = 3  # the end of the client's stream, after the last answer


IDLE, HEAD, BODY, LINGER = WaitPhase  # a name of the module is read in a third of the time of an attribute of an enum


class Waits(Protocol):
    """A connection. `deadline` is on the monotonic clock; `parked`: the epoll waits for it."""

    fd: int
    phase: WaitPhase
    deadline: float
    parked: bool
    in_service: bool


C = TypeVar("C", bound=Waits)


class WaitingConnections(Generic[C]):
    """The table. `by_fd`: the connections by descriptor, in the order in which they came, for its owner to read.

    Parameters
    ----------
    limit
        The number of connections at which there is no more room.
    patience
        Seconds for which a connection may be in a phase.
    shared
        Threads park and remove connections beside the owner.
    """

    def __init__(self, limit: int, patience: dict[WaitPhase, float], shared: bool = False) -> None:
        self.limit, self.patience, self._shared = limit, patience, shared
        self.by_fd: dict[int, C] = {}  # a plain dict, for which the interpreter has faster instructions
        self._lock = threading.Lock()  # against an owner that looks at a connection which is just given back or closed

    def open(self, epoll: "select.epoll", removed: Callable[[int], object] | None = None, events: int = 0) -> None:
        """Wait by this epoll.

        Parameters
        ----------
        removed
            Is called with the number of connections that are left, after a removal.
        events
            The epoll's flags, by default those of input.
        """
        self._epoll, self._removed, self._events = epoll, removed, events or select.EPOLLIN

    @property
    def has_room(self) -> bool:
        return len(self.by_fd) < self.limit

    def park(self, connection: C, phase: WaitPhase | None = None) -> None:
        """Wait for more from this connection: in a new phase, with the time of that phase, or (None) as before.

        Raises
        ------
        OSError
            The epoll has no room. The caller has the connection still, and is to close it.
        """
        if self._shared:
            self._give_back(connection, phase)
            return
        if phase is not None:
            connection.phase, connection.deadline = phase, monotonic() + self.patience[phase]
        if not connection.parked:
            self._register(connection)

    def _give_back(self, connection: C, phase: WaitPhase | None) -> None:
        """The thread that had the connection gives it to the owner of the table, with the last step of this."""
        deadline = connection.deadline if phase is None else monotonic() + self.patience[phase]
        with self._lock:
            if phase is not None:
                connection.phase = phase
            connection.deadline = deadline
            if not connection.parked:
                self._register(connection)
            connection.in_service = False

    def _register(self, connection: C) -> None:
        connection.parked = True
        self.by_fd[connection.fd] = connection
        self._epoll.register(connection.fd, self._events)

    def mute(self, connection: C) -> None:
        """An event came of a connection that a thread has: the event is reported again after it is given back."""
        with self._lock:
            if connection.in_service:
                self._unpark(connection)

    def remove(self, connection: C) -> None:
        """Forget a connection, before its descriptor is closed or handed out. One that is not there does no harm."""
        if self._shared:
            with self._lock:
                self._remove(connection)
        elif connection.parked:
            self._remove(connection)

    def _remove(self, connection: C) -> None:
        if self.by_fd.pop(connection.fd, None) is not None:
            if self._removed is not None:
                self._removed(len(self.by_fd))
            self._unpark(connection)

    def _unpark(self, connection: C) -> None:
        if connection.parked:
            try:
                # By hand: a descriptor of which a forked process has a copy would stay in the epoll after its close.
                self._epoll.unregister(connection.fd)
                connection.parked = False
            except OSError:
                pass  # it is not there; or it is reported again, or goes with its descriptor

    def shorten(self, patience: dict[WaitPhase, float], shift: Callable[[C], float]) -> None:
        """Change the time of these phases.

        Parameters
        ----------
        shift
            Returns by how many seconds the deadline moves of a connection that is in one of them.
        """
        with self._lock:
            for connection in list(self.by_fd.values()):
                if connection.phase in patience:
                    connection.deadline += shift(connection)
            self.patience |= patience

    # -- queries ---------------------------------------------------------------------------------------------------

    def waiting(self) -> list[C]:
        """The connections that no thread serves."""
        with self._lock:
            return [connection for connection in list(self.by_fd.values()) if not connection.in_service]

    def late(self, now: float) -> list[C]:
        """The waiting connections whose deadline is over."""
        return [connection for connection in self.waiting() if connection.deadline <= now]

    def longest_idle(self) -> list[C]:
        """A sixteenth of the idle connections and at least one, if there is any: those that have idled longest."""
        idle = [connection for connection in self.waiting() if connection.phase is IDLE]
        return heapq.nsmallest(1 + len(idle) // 16, idle, key=lambda connection: connection.deadline)

    def first(self) -> C:
        """The connection that came first, of a table that has any."""
        return next(iter(self.by_fd.values()))

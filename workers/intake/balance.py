"""Sharing out connections that are kept: whose turn it is to take the next one.

A worker that has just taken a connection is awake. It finds the next one before a sibling that the kernel has woken for
it has run. Left to themselves, a burst goes to one worker, which then has all of these clients while the others idle.
So a worker that has its share of what all hold, and of what is queued, leaves a queue alone for a moment.

The check is skipped when the queue is empty after a take, as nearly always: then the kernel's order is fair enough.
"""

import enum
import socket
import sys
from collections.abc import Sequence
from time import monotonic
from typing import Any, Protocol

import prefork.kernel.readiness as readiness
import prefork.link.scoreboard as scoreboard

ASIDE = 0.001  # seconds between two looks at a queue that is left to siblings
YIELD_FOR = 0.01  # seconds for which it is: on a busy machine a worker that was woken waits that long for a processor

_TCP_INFO = socket.TCP_INFO if sys.platform == "linux" else -1
_UNACKED = slice(24, 28)  # tcpi_unacked, which of a listener is the length of its queue


class Advice(enum.Enum):
    """What to do about a queue."""

    EMPTY = "nothing is in it"
    TAKE = "take from it"
    YIELD = "leave it to siblings"


class SlotOwner(Protocol):
    """It knows this worker's slot of the scoreboard. In a process that the program forks it is another slot."""

    board: scoreboard.Slot


class YieldWindow:
    """The time for which one queue is left to siblings: `YIELD_FOR` seconds, and then not again for as long."""

    def __init__(self) -> None:
        self._opened_at = 0.0

    def is_open(self, now: float) -> bool:
        """Whether to leave the queue to siblings now. A new window opens where there is none."""
        if now - self._opened_at >= 2 * YIELD_FOR:
            self._opened_at = now
        return now - self._opened_at < YIELD_FOR

    def end(self) -> None:
        """The next window may open at once."""
        self._opened_at = 0.0


class ConnectionBalancer:
    """What one worker has of what the pool holds.

    Parameters
    ----------
    fds, servers
        The listeners' descriptors, and whose they are.
    """

    def __init__(self, fds: Sequence[int], servers: Sequence[Any], owner: SlotOwner) -> None:
        self._servers, self._owner = dict(zip(fds, servers, strict=True)), owner
        self._counted = {fd for fd, server in self._servers.items() if _length(server) is not None}
        self._windows = {fd: YieldWindow() for fd in fds}

    def hold(self, number: int) -> None:
        """Tell siblings how many connections this worker has."""
        self._owner.board.ints[scoreboard.HELD] = number

    def queued(self, fd: int) -> int:
        """How many connections wait at a listener; where that is not known, which is not TCP, 1 if any does."""
        if fd in self._counted:
            return _length(self._servers[fd]) or 0
        return int(readiness.is_readable(fd))  # a fraction of what a vain accept costs

    def advice(self, fd: int, held: int, single: bool) -> Advice:
        """What to do about the queue of a listener.

        To be asked after a take. The connection that was taken stays, so its worker was quick; a sibling that the
        kernel has woken for the next one may not have run yet. As long as a sibling is free and this worker has its
        share, leave the queue alone and ask again after `ASIDE` seconds. In vain for `YIELD_FOR` seconds, it is `TAKE`
        for as long.

        Parameters
        ----------
        held
            How many connections this worker has.
        single
            No worker of the pool serves several at a time.
        """
        self.hold(held)
        queued = self.queued(fd)
        if not queued or not self._owner.board.has_share(held, queued, single):
            self._windows[fd].end()
            return Advice.TAKE if queued else Advice.EMPTY
        return Advice.YIELD if self._windows[fd].is_open(monotonic()) else Advice.TAKE


def _length(server: Any) -> int | None:
    """The length of the queue of its listener, where the kernel says so: of TCP, on Linux."""
    listener: socket.socket = server.socket  # another object than before where its TLS is the event loop's
    try:
        info = listener.getsockopt(socket.IPPROTO_TCP, _TCP_INFO, _UNACKED.stop)
    except OSError:
        return None
    return int.from_bytes(info[_UNACKED], sys.byteorder)

"""Sharing out connections that are kept: whose turn it is to take the next one.

A worker that has just taken one is awake, and finds the next before a sibling that the kernel has woken for it has run.
Left to themselves, a burst goes to one worker, which then has all of these clients while the others idle. So who has
its share of what all hold, and of what is queued, leaves a queue alone for a moment.

Nobody is asked who has found an empty queue after a take, which is nearly everybody: then the kernel's line is enough.
"""

import socket
import sys
from collections.abc import Sequence
from time import monotonic
from typing import Any, Protocol

import prefork.kernel.readiness as readiness
import prefork.link.scoreboard as scoreboard

ASIDE = 0.001  # seconds between two looks at a queue that is left to siblings
YIELD_FOR = 0.01  # seconds for which it is: on a busy machine a worker that was woken waits that long for a processor

# Whose what is queued is.
EMPTY, TAKE, YIELD = range(3)

_TCP_INFO = socket.TCP_INFO if sys.platform == "linux" else -1
_UNACKED = slice(24, 28)  # tcpi_unacked, which of a listener is the length of its queue


class SlotOwner(Protocol):
    """It knows this worker's slot of the scoreboard. In a process that the program forks that is another one."""

    board: scoreboard.Slot


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
        self._since = dict.fromkeys(fds, 0.0)  # when a queue was left to siblings

    def hold(self, number: int) -> None:
        """Tell siblings how many connections this worker has."""
        self._owner.board.ints[scoreboard.HELD] = number

    def queued(self, fd: int) -> int:
        """How many connections wait at a listener; where that is not known, which is not TCP, 1 if any does."""
        if fd in self._counted:
            return _length(self._servers[fd]) or 0
        return int(readiness.is_readable(fd))  # a fraction of what a vain accept costs

    def whose(self, fd: int, held: int, single: bool) -> int:
        """Whose the queue of a listener is: `EMPTY` (it is empty), `TAKE`, or rather `YIELD`, of the siblings.

        To be asked after a take. The one that was taken stays, so its worker was quick; a sibling that the kernel has
        woken for the next one may not have run yet. As long as one is free and this worker has its share, leave the
        queue alone and ask again after `ASIDE` seconds. In vain for `YIELD_FOR` seconds, it is `TAKE` for as long.

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
            self._since[fd] = 0.0
            return TAKE if queued else EMPTY
        now = monotonic()
        if now - self._since[fd] >= 2 * YIELD_FOR:
            self._since[fd] = now
        return YIELD if now - self._since[fd] < YIELD_FOR else TAKE


def _length(server: Any) -> int | None:
    """Of its listener's queue, where the kernel says so: of TCP, on Linux."""
    listener: socket.socket = server.socket  # another object than before where its TLS is the event loop's
    try:
        info = listener.getsockopt(socket.IPPROTO_TCP, _TCP_INFO, _UNACKED.stop)
    except OSError:
        return None
    return int.from_bytes(info[_UNACKED], sys.byteorder)

"""Listeners in an event loop: one connection wakes one worker, and each worker has its turn.

An event loop watches with an epoll that knows nothing of siblings: a connection would wake all workers for one of them
to get it. So each listener that the loop watches is taken out of the loop's epoll and put back with EPOLLEXCLUSIVE,
behind the loop's back but to the same end: it tells the loop what the loop asked for. (A second epoll with exclusive
listeners, watched by the first, wakes the herd again: the kernel passes exclusiveness on to waiters only.)

Without an epoll that can be reached the herd wakes up, and the kernel's answer to all but one is EAGAIN.
"""

import asyncio
import os
import select
import selectors
import sys
from collections.abc import Callable
from typing import Any

from prefork.workers.accept import Acceptor

AGAIN = 0.001  # seconds until a loop has surely put into its epoll what it was told to watch


class Gate:
    """What stands between the listeners of an acceptor and an event loop.

    Parameters
    ----------
    loop
        asyncio's own, uvloop's, or any that has `add_reader()`.
    found
        Called in the loop with the descriptor of a listener that is readable; once a turn of the loop.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, acceptor: Acceptor, found: Callable[[int], object]) -> None:
        self.is_open = False
        self._loop, self._acceptor, self._found = loop, acceptor, found
        self._epoll = _epoll_of(loop)
        for fd in acceptor.fds:
            os.set_blocking(fd, False)

    def open(self) -> None:
        self.is_open = True
        for fd in self._acceptor.fds:
            self._loop.add_reader(fd, self._ready, fd)
            self._step_back(fd)

    def close(self) -> None:
        self.is_open = False
        for fd in self._acceptor.fds:
            self._loop.remove_reader(fd)

    def discard(self) -> None:
        """Not to be opened again."""
        if self._epoll is not None:
            self._epoll.close()
            self._epoll = None

    def _ready(self, fd: int) -> None:
        self._found(fd)
        self._step_back(fd)

    def _step_back(self, fd: int) -> None:
        """To the end of the kernel's line. This is also what makes a listener exclusive.

        Never before the loop has put it into its epoll, which libuv does only when it next waits: libuv aborts if it
        finds it there. So it is taken out first, which fails where it is not in yet.
        """
        if self.is_open and self._epoll is not None:
            try:
                self._acceptor.step_back(self._epoll, fd)
            except FileNotFoundError:
                self._loop.call_later(AGAIN, self._step_back, fd)


def _epoll_of(loop: Any) -> "select.epoll | None":
    """The epoll that a loop waits with, by a descriptor of our own; None where there is none, or it is out of reach."""
    if sys.platform != "linux" or not hasattr(select, "EPOLLEXCLUSIVE"):
        return None
    selector = getattr(loop, "_selector", None)
    if isinstance(selector, selectors.EpollSelector):
        return select.epoll.fromfd(os.dup(selector.fileno()))
    if hasattr(loop, "_get_backend_id"):  # uvloop's
        return select.epoll.fromfd(os.dup(loop._get_backend_id()))
    return None

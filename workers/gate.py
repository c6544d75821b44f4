"""Listeners in an event loop: one connection wakes one worker, and each worker has its turn.

An event loop watches with an epoll that knows nothing of siblings: a connection would wake all workers for one of them
to get it. So each listener that the loop watches is taken out of the loop's epoll and put back with EPOLLEXCLUSIVE,
behind the loop's back but to the same end: it tells the loop what the loop asked for. (A second epoll with exclusive
listeners, watched by the first, wakes the herd again: the kernel passes exclusiveness on to waiters only.)

Without an epoll that can be reached the herd wakes up, and the kernel's answer to all but one is EAGAIN.
"""

import asyncio
import contextlib
import os
import select
import selectors
import sys
from collections.abc import Callable
from typing import Any

from prefork.workers.accept import Acceptor


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
        self._epoll, self._at_once = _epoll_of(loop)
        for fd in acceptor.fds:
            os.set_blocking(fd, False)

    def open(self) -> None:
        self.is_open = True
        for fd in self._acceptor.fds:
            self._loop.add_reader(fd, self._ready, fd)
            if self._at_once and self._epoll is not None:
                self._acceptor.step_back(self._epoll, fd)

    def close(self) -> None:
        self.is_open = False
        for fd in self._acceptor.fds:
            self._loop.remove_reader(fd)

    def discard(self) -> None:
        """Not to be opened again."""
        if self._epoll is not None:
            self._epoll.close()

    def _ready(self, fd: int) -> None:
        self._found(fd)
        if self.is_open and self._epoll is not None:
            # To the end of the kernel's line. With uvloop it is also where a listener becomes exclusive, never earlier:
            # only its first event proves that libuv has put it into the epoll, and it aborts if it finds it there.
            with contextlib.suppress(FileNotFoundError):  # the loop has taken it out
                self._acceptor.step_back(self._epoll, fd)


def _epoll_of(loop: Any) -> "tuple[select.epoll | None, bool]":
    """The epoll that a loop waits with, by a descriptor of our own, None where there is none or it is out of reach; and
    whether `add_reader()` has put a descriptor into it when it returns."""
    if sys.platform != "linux" or not hasattr(select, "EPOLLEXCLUSIVE"):
        return None, False
    selector = getattr(loop, "_selector", None)
    if isinstance(selector, selectors.EpollSelector):
        return select.epoll.fromfd(os.dup(selector.fileno())), True
    if hasattr(loop, "_get_backend_id"):  # uvloop's
        return select.epoll.fromfd(os.dup(loop._get_backend_id())), False
    return None, False

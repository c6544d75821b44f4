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

from prefork.workers.accept import FULL, PAUSE, Acceptor

AGAIN = 0.001  # seconds until a loop has surely put into its epoll what it was told to watch
BATCH = 8  # taken in one turn of the loop, where so many wait; with 1 a connection under load costs a third more


class Gate:
    """What stands between the listeners of an acceptor and an event loop. It is open while there is room for another;
    where the system has none it pauses.

    Parameters
    ----------
    loop
        asyncio's own, uvloop's, or any that has `add_reader()`.
    take
        Called in the loop with the descriptor of a listener that is readable: take one there, by `try_take()` and with
        its errors. Returns whether there was one.
    has_room
        Whether there is room for another. Where that has changed, and not by `take`: `watch()`.

    To be read: `over`, a future that is done when the gate is closed for good; it has the error if that is because the
    program has closed a listener.
    """

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        acceptor: Acceptor,
        take: Callable[[int], bool],
        has_room: Callable[[], bool],
    ) -> None:
        self.over: asyncio.Future[None] = loop.create_future()
        self._loop, self._acceptor, self._take, self._has_room = loop, acceptor, take, has_room
        self._is_open = self._paused = False
        self._epoll = _epoll_of(loop)
        acceptor.take_told()
        self._more = {fd: select.poll() for fd in acceptor.fds}  # asking costs a tenth of a vain accept
        for fd, poll in self._more.items():
            os.set_blocking(fd, False)
            poll.register(fd, select.POLLIN)

    def watch(self) -> None:
        """Open or close, as there is room or not."""
        wanted = not (self._paused or self.over.done()) and self._has_room()
        if wanted is not self._is_open:
            self._is_open = wanted
            for fd in self._acceptor.fds:
                if wanted:
                    self._loop.add_reader(fd, self._ready, fd)
                    self._step_back(fd)
                else:
                    self._loop.remove_reader(fd)

    def end(self) -> None:
        """Take no more."""
        if not self.over.done():
            self.over.set_result(None)
        self.watch()

    def discard(self) -> None:
        """It is never opened again, however that came."""
        self.over.cancel()
        self.watch()
        if self._epoll is not None:
            self._epoll.close()
            self._epoll = None

    def _ready(self, fd: int) -> None:
        if not self._is_open:  # another listener, in the same turn, has brought the last that there was room for
            return
        try:
            for _ in range(BATCH):
                if not (self._take(fd) and self._has_room() and self._more[fd].poll(0)):
                    break
        except OSError as error:
            if error.errno in FULL:
                self._acceptor.say_full(error)
                self._paused = True
                self._loop.call_later(PAUSE, self._resume)
            elif not self.over.done():
                self.over.set_exception(error)  # the program has closed the listener
        self.watch()
        self._step_back(fd)

    def _resume(self) -> None:
        self._paused = False
        self.watch()

    def _step_back(self, fd: int) -> None:
        """To the end of the kernel's line. This is also what makes a listener exclusive.

        Never before the loop has put it into its epoll, which libuv does only when it next waits: libuv aborts if it
        finds it there. So it is taken out first, which fails where it is not in yet.
        """
        if self._is_open and self._epoll is not None:
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

"""Listeners in an event loop: one connection wakes one worker, and each worker has its turn.

The epoll of an event loop knows nothing of siblings: a connection would wake all workers, and one of them would get it.
So the gate takes each listener that the loop watches out of the loop's epoll and puts it back with EPOLLEXCLUSIVE. The
loop does not notice: the epoll tells it what it asked for. (A second epoll with exclusive listeners, watched by the
first, wakes all workers again: the kernel passes exclusiveness on to waiters only.)

A worker that has taken something leaves the line while that goes through the loop, and then joins it at its end. So
others have their turn, the kernel wakes nobody for what a busy worker would take, and connections that came meanwhile
are taken together (`intake.batch`).

Where no epoll can be reached all workers wake up, and the kernel's answer to all but one is EAGAIN.
"""

import asyncio
import contextlib
import os
import select
import selectors
import sys
from collections.abc import Callable
from time import monotonic
from typing import Any

from prefork.workers.intake.acceptor import PAUSE, RESOURCE_ERRORS, Acceptor
from prefork.workers.intake.balance import ASIDE, Advice, ConnectionBalancer
from prefork.workers.intake.connection_batch import SIZE, Batch

AGAIN = 0.001  # seconds until a loop has surely put into its epoll what it was told to watch


class ListenerGate:
    """It stands between the listeners of an acceptor and an event loop. It is open while there is room for another
    connection. Where the system has no room it pauses.

    Parameters
    ----------
    loop
        asyncio's own, uvloop's, or any that has `add_reader()`.
    take
        Called in the loop with the descriptor of a listener that is readable: take a connection, by `try_take()` and
        with its errors. Returns whether there was a connection.
    held
        How many connections this worker has. Where they have become fewer: `freed()`.
    limit
        With so many there is no room for another.

    To be read: `over`, a future that is done when the gate is closed for good; it has the error if that is because the
    program has closed a listener.
    """

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        acceptor: Acceptor,
        balancer: ConnectionBalancer,
        take: Callable[[int], bool],
        held: Callable[[], int],
        limit: int,
    ) -> None:
        self.over: asyncio.Future[None] = loop.create_future()
        self._loop, self._acceptor, self._balancer = loop, acceptor, balancer
        self._take, self._held, self._limit = take, held, limit
        self._is_open = self._paused = False
        self._epoll = _epoll_of(loop)
        acceptor.take_told()
        self._batch = Batch()
        self._out_of_line: set[int] = set()  # listeners whose line it has left
        self._next_looks: dict[int, asyncio.TimerHandle] = {}  # at those of them whose queue is left to siblings
        for fd in acceptor.fds:
            os.set_blocking(fd, False)

    def has_room(self) -> bool:
        return self._held() < self._limit

    def freed(self) -> None:
        """There may be fewer connections, and room again."""
        held = self._held()
        self._balancer.hold(held)
        if not self._is_open:
            self.watch()
        if held <= self._batch.held:  # a look at each end would take one by one what is cheaper together
            for fd in list(self._next_looks):
                self._look(fd)

    def watch(self) -> None:
        """Open or close, as there is room or not."""
        wanted = not (self._paused or self.over.done()) and self.has_room()
        if wanted is not self._is_open:
            self._is_open = wanted
            for fd in self._acceptor.in_turn() if wanted else self._acceptor.fds:
                if wanted:
                    self._take_out(fd)  # where it could not be taken out before
                    try:
                        self._loop.add_reader(fd, self._ready, fd)
                    except OSError as error:
                        self._close_after(error)
                        return
                    self._step_back(fd)
                else:
                    self._out_of_line.discard(fd)
                    self._stop_looking(fd)
                    self._loop.remove_reader(fd)

    def _take_out(self, fd: int) -> None:
        if self._epoll is not None:
            with contextlib.suppress(OSError):  # it is not in it, as usual
                self._epoll.unregister(fd)

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
        advice, batch = Advice.TAKE, self._batch
        batch.begin(monotonic(), self._held())
        try:
            while advice is Advice.TAKE and batch.taken < SIZE and self._take(fd):
                batch.taken += 1
                held = self._held()
                if batch.ends_soon or held >= self._limit:
                    self._balancer.hold(held)
                else:
                    advice = self._balancer.advice(fd, held, single=False)
                if held >= self._limit:
                    self.watch()
                    return
        except OSError as error:
            self._close_after(error)
        if batch.taken:
            self._step_out(fd, advice is Advice.YIELD)

    def _close_after(self, error: OSError) -> None:
        """For a moment, where the system has no room; else for good: the program has closed a listener."""
        if error.errno in RESOURCE_ERRORS:
            self._acceptor.say_full(error)
            if not self._paused:
                self._paused = True
                self._loop.call_later(PAUSE, self._resume)
        elif not self.over.done():
            self.over.set_exception(error)
        self.watch()

    def _resume(self) -> None:
        self._paused = False
        self.watch()

    def _step_out(self, fd: int, aside: bool) -> None:
        """Out of the kernel's line for three turns of the loop: a connection is made, read from, and served."""
        if self._is_open and self._epoll is not None:
            try:
                self._epoll.unregister(fd)
            except FileNotFoundError:
                pass
            except OSError as error:
                self._close_after(error)
                return
            self._out_of_line.add(fd)
            if aside:
                self._next_looks[fd] = self._loop.call_later(ASIDE, self._look, fd)
            else:
                self._rejoin_soon(fd)

    def _rejoin_soon(self, fd: int) -> None:
        soon = self._loop.call_soon
        soon(soon, soon, self._rejoin, fd)

    def _look(self, fd: int) -> None:
        """Look again at a queue that was left to siblings: they may have taken from it, or have their share by now."""
        self._stop_looking(fd)
        if fd in self._out_of_line and self._balancer.advice(fd, self._held(), single=False) is Advice.YIELD:
            self._next_looks[fd] = self._loop.call_later(ASIDE, self._look, fd)
        else:
            self._rejoin_soon(fd)

    def _stop_looking(self, fd: int) -> None:
        timer = self._next_looks.pop(fd, None)
        if timer is not None:
            timer.cancel()

    def _rejoin(self, fd: int) -> None:
        """To the end of the line; unless the loop does not watch it any more, or does so anew."""
        if fd in self._out_of_line and self._epoll is not None:
            self._out_of_line.discard(fd)
            try:
                self._acceptor.join(self._epoll, fd)
            except OSError as error:
                self._close_after(error)

    def _step_back(self, fd: int) -> None:
        """To the end of the kernel's line, which makes a listener exclusive that the loop has begun to watch.

        Never before the loop has put it into its epoll: libuv does so only when it next waits, and aborts if it finds
        the listener there. So take it out first, which fails where it is not in yet.
        """
        if self._is_open and self._epoll is not None:
            try:
                self._epoll.unregister(fd)
                self._acceptor.join(self._epoll, fd)
            except FileNotFoundError:
                self._loop.call_later(AGAIN, self._step_back, fd)
            except OSError as error:
                self._close_after(error)


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

"""The threads of a polling worker: they take turns at its epoll, and nothing is handed to another thread that must not.

The turn
    Is a lock. Who has it, and nobody else, reads the epoll, takes from listeners, reads from connections that wait and
    looks at their deadlines. It is put down before a request is served, and taken up again afterwards, by the same
    thread unless another one has it by then.
A connection
    Waits (its deadline is a time), and belongs to who has the turn. Or a request of it is there (its deadline is
    NEVER): it is `due`, and then belongs to the thread that serves it, until that gives it back or closes it. What the
    epoll reports of such a one takes it out of the epoll, and it comes back when it is given back. That is rare, so
    mostly a request costs no epoll_ctl().
A thread
    Is free, and waits to be called; or serves what is due, or has the turn; it is free again when there is neither.
The main thread
    Is free for signals. It serves nothing, and sees to it that the turn does not lie about.

Somebody must take the turn while its owner is serving. Usually he calls a free thread before he begins: that costs two
switches, and nobody waits for him. Where nearly all requests are short he does not: he is back at once, and a request
costs hardly more than in a worker of one thread. Meanwhile the main thread looks every `PATIENCE` seconds: if no
request has begun since its last look, one is long, and it calls a thread; so others wait for twice as long at most.
(Threads that all wait in the epoll are woken by the kernel for each request that comes while another one is served, and
then fight for the interpreter.) Where there is none to call, the worker accepts and reads nothing, and the kernel asks
its siblings; the main thread sees to deadlines then.

When the worker leaves, the main thread takes the turn for good, and calls threads for what is due.

What fails: an exception in serving is logged, and its thread goes on; what the turn raises (the program has closed the
listener) ends the main thread's `run()`. A child that the application forks ends with the call that it was made in.
"""

import os
import threading
from collections import deque
from queue import Empty, SimpleQueue
from time import monotonic
from typing import Protocol

import prefork.kernel.logs as logs
import prefork.kernel.standard_streams as standard_streams
from prefork.workers.lifecycle import exit_code
from prefork.workers.wsgi.parser import Connection

log = logs.get("prefork")

NEVER = float("inf")


class Host(Protocol):
    """What is asked of the worker."""

    slot: int
    threads: int
    draining: bool

    @property
    def disowned(self) -> bool: ...

    @property
    def pause(self) -> float:
        """Seconds between two looks at deadlines."""

    def serve(self, connection: Connection) -> None: ...

    def turn(self) -> None:
        """Wait for whatever comes, look at deadlines, and `hand_over()` each connection that has a request."""

    def look(self) -> None:
        """Look at deadlines alone."""


class LeaderFollowers:
    """Serves what its host's turns bring in `host.threads` threads."""

    PATIENCE = 0.002  # seconds; a request is short if it takes less
    # A long one, found while the turn was kept, costs others as much time as is saved at so many short ones.
    WEIGHT = 300
    IDLE = 5  # looks without a request, after which the main thread sleeps: it costs less than what it saves until then

    def __init__(self, host: Host) -> None:
        self._host = host
        self._turn = threading.Lock()
        self._due: deque[Connection] = deque()
        self._free: list[threading.Lock] = []  # what each waits for; who was the last to become free is called first
        self._main_leads = False
        self._begun = 0  # connections that a thread began to serve, roughly
        self._credit = 0  # short requests, less WEIGHT for each long one
        self._keeps = False  # whether a thread keeps the turn to itself; the main thread looks every PATIENCE seconds
        self._stalled = False  # whether all are busy; it looks at deadlines
        # For the main thread: None, there is something to look at; or an exception to leave with.
        self._news: SimpleQueue[BaseException | None] = SimpleQueue()
        self._unbegun: set[Connection] = set()  # of those with a request, which are not in hand yet

    # -- the main thread -------------------------------------------------------------------------------------------

    def run(self) -> None:
        """Returns when the worker is to leave, with the turn in the hands of the main thread."""
        for number in range(self._host.threads):
            threading.Thread(target=self._live, name=f"wsgi-{number}", daemon=True).start()
        while not self._host.draining:
            if self._keeps:
                self._watch()
            elif not self.wait(self._host.pause if self._stalled else None):
                self._look()
        self._turn.acquire()
        self._main_leads = True

    def _watch(self) -> None:
        """The thread that keeps the turn, until it is in a long request, or idles."""
        idle = 0
        while self._keeps and not self._host.draining:
            begun = self._begun
            self.wait(self.PATIENCE)
            if number := self._begun - begun:
                idle = 0
                self._count(number)
            elif not self._turn.locked():
                self._keeps = False
                self._count(-self.WEIGHT)
                self._stalled = not self._call()
            elif (idle := idle + 1) == self.IDLE:
                self._keeps = False
                self._credit = min(self._credit, 2 * self.WEIGHT - 20)

    def _look(self) -> None:
        """In the place of the threads, which were all busy."""
        self._stalled = False  # first: who finds nobody to call from here on says so
        if self._turn.acquire(blocking=False):
            try:
                self._host.look()
            finally:
                self._turn.release()
            self._stalled = not self._call()

    def wait(self, seconds: float | None = None) -> bool:
        """For news, which there are too when a thread has become free in a worker that leaves. Whether there were."""
        try:
            error = self._news.get(timeout=seconds)
        except Empty:
            return False
        if error is not None:
            raise error
        return True

    def wake(self) -> None:
        """From a signal handler, too."""
        self._news.put(None)

    def wait_begun(self) -> None:
        """Until all that were handed over are in hand."""
        while self._unbegun:
            self.wait()

    def wait_free(self, seconds: float) -> None:
        end = monotonic() + seconds
        while self.busy and (rest := end - monotonic()) > 0.0:
            self.wait(rest)

    # -- who has the turn ------------------------------------------------------------------------------------------

    @property
    def room(self) -> int:
        """How many requests the free threads have room for, with the one that has the turn."""
        return len(self._free) + (not self._main_leads)

    @property
    def busy(self) -> bool:
        """Whether any thread may give a connection back."""
        return self.room < self._host.threads or bool(self._due)

    def hand_over(self, connection: Connection) -> None:
        """A request of it is there."""
        connection.deadline = NEVER
        self._unbegun.add(connection)
        self._due.append(connection)
        if self._host.draining:
            self._call()

    # -- any thread ------------------------------------------------------------------------------------------------

    def begin(self, connection: Connection) -> None:
        """It is in hand: `finish()` knows of it."""
        self._unbegun.discard(connection)
        if self._host.draining:
            self.wake()

    def _call(self) -> bool:
        """Whether there was a free one."""
        try:
            self._free.pop().release()
        except IndexError:
            return False
        return True

    def _live(self) -> None:
        """A thread's life."""
        called = threading.Lock()
        called.acquire()
        try:
            while True:
                self._free.append(called)
                # Somebody may have looked for a free one just before.
                if self._due or not (self._turn.locked() or self._host.draining):
                    self._call()
                if self._host.draining:
                    self.wake()
                called.acquire()
                self._work()
        except BaseException as error:
            self._news.put(error)

    def _work(self) -> None:
        """As long as something is due, or the turn is to be had."""
        host, due, turn = self._host, self._due, self._turn
        while True:
            if not due:
                if host.draining or not turn.acquire(False):
                    return
                try:
                    if not host.draining:  # since the lock was asked for: then nothing would end the wait
                        host.turn()
                finally:
                    turn.release()
            try:
                connection = due.popleft()
            except IndexError:
                continue
            self._begun += 1
            if self._keeps:
                self._serve(connection)
                continue
            if (due or not turn.locked()) and not self._call() and not self._stalled:
                self._stalled = True
                self.wake()
            start = monotonic()
            self._serve(connection)
            self._count(1 if monotonic() - start < self.PATIENCE else -self.WEIGHT)

    def _count(self, requests: int) -> None:
        """So many short ones, or that a long one weighs."""
        self._credit = min(max(0, self._credit + requests), 10 * self.WEIGHT)
        if self._credit >= 2 * self.WEIGHT and not self._keeps and requests > 0:
            self._keeps = True
            self.wake()

    def _serve(self, connection: Connection) -> None:
        try:
            self._host.serve(connection)
        except BaseException as error:
            if self._host.disowned:  # the end of a process that the application has forked: it has no other thread
                standard_streams.flush()
                os._exit(exit_code(error) if isinstance(error, SystemExit) else 1)
            log.exception("worker %d: in a thread", self._host.slot)
            self._unbegun.discard(connection)

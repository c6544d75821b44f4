"""The threads of a WSGI worker, after the pattern Leader/Followers: no connection changes threads without need.

The leader
    Is the thread that holds `leader_lock`. It alone waits in the epoll, accepts, reads from connections that wait and
    looks at their deadlines. It gives up the lead before it serves a request. Afterwards it takes the lead again, if no
    other thread has it by then.
A connection
    Waits, and belongs to the leader. Or it is `in_service`: a request of it is ready, and it belongs to the thread that
    serves it, until that thread gives it back or closes it.
A follower
    Is a thread without a request, and waits to be promoted. The follower that became free last is promoted first.
The main thread
    Is free for signals. It serves nothing, and makes sure that there is a leader.

Some thread must lead while the leader serves. Usually it promotes a follower before it begins: this costs two switches,
and no client waits for it. Where nearly all requests are short it keeps the lead instead, so that a request costs
hardly more than in a worker of one thread; `policy.Lead` has the rules. Then the main thread looks every 2 ms: if no
request has begun since its last look, a request is long, and it promotes a follower. So other clients wait for twice as
long at most. (If all threads waited in the epoll, the kernel would wake them for each request that comes while another
one is served, and they would fight for the interpreter.) Where there is no follower the worker accepts and reads
nothing, and the kernel asks its siblings; the main thread looks at deadlines then.

When the worker leaves, the main thread leads until the end, and promotes followers for requests that are ready.

An exception in serving is logged, and its thread goes on. An exception of the leader (the program has closed the
listener) ends the main thread's `run()`. A child that the application forks ends with the call in which it was made.
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
from prefork.workers.wsgi.loop_rules import SHORT, Lead
from prefork.workers.wsgi.parser import Connection

log = logs.get("prefork")


class ThreadsWorker(Protocol):
    """What the threads read of their worker."""

    threads: int
    draining: bool

    @property
    def log_name(self) -> str: ...

    @property
    def disowned(self) -> bool: ...


class ThreadsLoop(Protocol):
    """What the threads run."""

    @property
    def pause(self) -> float:
        """Seconds between two looks at deadlines."""

    def serve(self, connection: Connection) -> None: ...

    def turn(self) -> None:
        """Wait for events, look at deadlines, and `hand_over()` each connection that has a request."""

    def look(self) -> None:
        """Look at deadlines only."""


class LeaderFollowers:
    """Runs a loop, and serves the connections that it hands over, in `threads` threads."""

    def __init__(self, worker: ThreadsWorker, loop: ThreadsLoop) -> None:
        self._worker, self._loop = worker, loop
        self._leader_lock = threading.Lock()
        self._ready: deque[Connection] = deque()  # connections with a request, for which no thread is there yet
        self._followers: list[threading.Lock] = []  # the lock for which each of them waits
        self._lead = Lead()
        self._main_leads = False
        self._all_busy = False  # there is no follower to promote: the main thread looks at deadlines
        # For the main thread: None, there is something to look at; or an exception to leave with.
        self._news: SimpleQueue[BaseException | None] = SimpleQueue()
        self._unbegun: set[Connection] = set()  # connections that were handed over, whose request is not accounted yet

    # -- the main thread -------------------------------------------------------------------------------------------

    def run(self) -> None:
        """Returns when the worker is to leave. The main thread leads then."""
        for number in range(self._worker.threads):
            threading.Thread(target=self._live, name=f"wsgi-{number}", daemon=True).start()
        while not self._worker.draining:
            if self._lead.is_kept:
                self._watch()
            elif not self.wait(self._loop.pause if self._all_busy else None):
                self._look_for_all()
        self._leader_lock.acquire()
        self._main_leads = True

    def _watch(self) -> None:
        """While the leader keeps the lead: until it is in a long request, or no requests come."""
        lead = self._lead
        lead.watch()
        while lead.is_kept and not self._worker.draining:
            self.wait(SHORT)
            if lead.look(not self._leader_lock.locked()):
                self._all_busy = not self._promote()

    def _look_for_all(self) -> None:
        """Look at deadlines, when all threads were busy."""
        self._all_busy = False  # first: a leader that finds no follower from here on says so
        if self._leader_lock.acquire(blocking=False):
            try:
                self._loop.look()
            finally:
                self._leader_lock.release()
            self._all_busy = not self._promote()

    def wait(self, seconds: float | None = None) -> bool:
        """Wait for news, which in a worker that leaves include a thread that has become free. Returns whether there
        were any."""
        try:
            error = self._news.get(timeout=seconds)
        except Empty:
            return False
        if error is not None:
            raise error
        return True

    def wake(self) -> None:
        """End the main thread's wait. A signal handler may call this."""
        self._news.put(None)

    def wait_begun(self) -> None:
        """Wait until the requests of all connections that were handed over are accounted."""
        while self._unbegun:
            self.wait()

    def wait_free(self, seconds: float) -> None:
        end = monotonic() + seconds
        while self.busy and (rest := end - monotonic()) > 0.0:
            self.wait(rest)

    # -- the leader ------------------------------------------------------------------------------------------------

    @property
    def room(self) -> int:
        """The number of requests that the leader and the followers can serve."""
        return len(self._followers) + (not self._main_leads)

    @property
    def busy(self) -> bool:
        """Whether any thread may give a connection back."""
        return self.room < self._worker.threads or bool(self._ready)

    def hand_over(self, connection: Connection) -> None:
        """A request of this connection is ready."""
        connection.in_service = True
        self._unbegun.add(connection)
        self._ready.append(connection)
        if self._worker.draining:
            self._promote()

    # -- any thread ------------------------------------------------------------------------------------------------

    def begun(self, connection: Connection) -> None:
        """The request of this connection is accounted: `finish()` of the worker knows of it."""
        self._unbegun.discard(connection)
        if self._worker.draining:
            self.wake()

    def _promote(self) -> bool:
        """Wake a follower. Returns whether there was a follower."""
        try:
            self._followers.pop().release()
        except IndexError:
            return False
        return True

    def _live(self) -> None:
        """A thread's life."""
        promoted = threading.Lock()
        promoted.acquire()
        try:
            while True:
                self._followers.append(promoted)
                # Another thread may have looked for a follower just before.
                if self._ready or not (self._leader_lock.locked() or self._worker.draining):
                    self._promote()
                if self._worker.draining:
                    self.wake()
                promoted.acquire()
                self._work()
        except BaseException as error:
            self._news.put(error)

    def _work(self) -> None:
        """Lead and serve, until no connection is ready and another thread leads."""
        worker, ready, leader_lock, lead = self._worker, self._ready, self._leader_lock, self._lead
        while True:
            if not ready:
                if worker.draining or not leader_lock.acquire(False):
                    return
                try:
                    if not worker.draining:  # once more, now with the lock: nothing would end the wait
                        self._loop.turn()
                finally:
                    leader_lock.release()
            try:
                connection = ready.popleft()
            except IndexError:
                continue
            lead.begun += 1
            if lead.is_kept:
                self._serve(connection)
                continue
            if (ready or not leader_lock.locked()) and not self._promote() and not self._all_busy:
                self._all_busy = True
                self.wake()
            start = monotonic()
            self._serve(connection)
            if lead.served(monotonic() - start):
                self.wake()

    def _serve(self, connection: Connection) -> None:
        try:
            self._loop.serve(connection)
        except BaseException as error:
            if self._worker.disowned:  # the end of a process that the application has forked: it has no other thread
                standard_streams.flush()
                os._exit(exit_code(error) if isinstance(error, SystemExit) else 1)
            log.exception("%s: a thread that serves requests ended [PF0611]", self._worker.log_name)
            self._unbegun.discard(connection)

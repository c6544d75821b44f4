"""A worker: the child's life from the fork to its last `os._exit`, and the surface that worker classes build on.

    starting -> ready (idle <-> busy) -> draining -> gone

Only the worker writes its slot of the scoreboard. Nothing in it waits on the lifeline: when the master dies the kernel
kills the worker. It never raises into a handler because of a signal, but for the one request that is past its deadline.
"""

import contextlib
import contextvars
import faulthandler
import gc
import logging
import os
import random
import signal
import socket
import socketserver
import sys
import threading
import traceback
import types
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from threading import get_ident
from time import monotonic
from typing import Any

import prefork.lifeline as lifeline
import prefork.policy as policy
import prefork.scoreboard as scoreboard
import prefork.stderr as stderr
import prefork.workers.chain as chain
from prefork.errors import RequestTimeout
from prefork.options import Options
from prefork.states import Phase
from prefork.workers.accept import Acceptor, Taken

# The master's order to interrupt a request. Portable (real-time signals are not), and harmless where a CPU limit sends
# it: the handler looks at the deadline itself.
INTERRUPT = signal.SIGXCPU

UNKNOWN_THREADS = 16  # of a server that makes them itself

_OWN = frozenset({signal.SIGTERM, signal.SIGQUIT, signal.SIGUSR1, INTERRUPT})  # what a worker has handlers for


@dataclass(frozen=True, slots=True)
class Seat:
    """What the master gives to a new worker: all of it is inherited by the fork."""

    slot: int
    generation: int
    options: Options
    board: scoreboard.Slot
    lifeline_read: int
    uplink_write: int
    title: str
    seed: int


class Request:
    """A request in hand, between the two ends of `with worker.serving(peer) as request:`.

    Where it begins in one place and ends in another: `begin()` and `end()`. `deadline` is in seconds on the monotonic
    clock, 0.0 where there is none.
    """

    __slots__ = ("_worker", "deadline", "late", "peer", "start", "thread", "timeout")

    def __init__(self, worker: "Worker", peer: object, timeout: float) -> None:
        self._worker, self.peer, self.timeout, self.deadline = worker, peer, timeout, 0.0
        self.thread = 0  # in no thread's hands
        self.late = False  # nobody waits for it any more

    def begin(self) -> "Request":
        """It is in hand from here on, and its deadline runs."""
        worker = self._worker
        self.start = start = monotonic()
        _current.set(self)
        worker._lock.acquire()  # with try and finally, 37 ns less than `with`
        try:
            worker._open[self] = None
            if timeout := self.timeout:
                self.deadline = deadline = start + timeout
                (worker._due if timeout == worker._timeout else worker._odd)[self] = None
                floats = worker._board.floats
                if not 0.0 < floats[scoreboard.DEADLINE] <= deadline:
                    floats[scoreboard.DEADLINE] = deadline
            if worker._shown is None:
                worker._shown = self
                board = worker._board
                board.floats[scoreboard.BUSY_SINCE] = start
                board.set_peer(self.peer)
        finally:
            worker._lock.release()
        self.thread = get_ident()  # last: before this nothing is raised for it
        return self

    __enter__ = begin

    def adopt(self) -> None:
        """The calling thread goes on with it."""
        self.thread = get_ident()
        _current.set(self)

    def end(self, kind: object = None, error: object = None, trace: object = None) -> None:
        """It is over; more than once is harmless."""
        # Before anything is called, in which a signal could be looked at: no RequestTimeout is raised for it any more.
        self.thread = 0
        end = monotonic()
        worker = self._worker
        worker._lock.acquire()
        try:
            open = worker._open
            if self not in open:
                return
            ints, floats = worker._board.ints, worker._board.floats
            if deadline := self.deadline:
                if len(open) == 1:
                    # First: while there is a deadline and nothing in hand, that deadline is the hot loop's.
                    floats[scoreboard.DEADLINE] = 0.0
                (worker._due if self.timeout == worker._timeout else worker._odd).pop(self, None)
            del open[self]
            if open and deadline and deadline == floats[scoreboard.DEADLINE]:
                floats[scoreboard.DEADLINE] = worker._earliest()
            worker._count = count = worker._count + 1
            worker._spent = spent = worker._spent + end - self.start
            ints[scoreboard.REQUESTS] = count
            floats[scoreboard.BUSY_TIME] = spent
            if worker._shown is self:
                if open:
                    worker._show(next(iter(open)))
                else:
                    worker._shown = None
                    floats[scoreboard.BUSY_SINCE] = 0.0
            if worker._finishing:
                worker._changed.notify_all()
        finally:
            worker._lock.release()
        if count >= worker._limit:
            worker._look(count, end)

    __exit__ = end

    def extend_deadline(self, seconds: float) -> None:
        """Give it `seconds` from now. Where it has no deadline there is nothing to extend."""
        if self.deadline:
            self._worker._move(self, monotonic() + seconds)


# The request that the running thread, or the running task of an event loop, has in hand.
_current: contextvars.ContextVar[Request | None] = contextvars.ContextVar("prefork_request", default=None)


class Worker:
    """One process of the pool. Subclass it, name the subclass in `worker_class`, override few of these.

    May be overridden
    -----------------
    check(server), application
        Class-level, in the master, before anything is forked: whether this class can serve what it is given.
    threads
        How many threads serve requests, if it is not the main one alone; to be known after `setup()`.
    setup()
        After the fork, before ready: open what each process must own. An exception is a boot failure.
    run()
        Serve until told to leave, and return when drained.
    drain()
        Told to leave. Called once, from a signal handler between two bytecodes of the main thread: set, close or wake
        something. The default ends `accept()`.
    expired()
        The request in hand is past its deadline. Called from a signal handler, too.
    slack
        Class-level, seconds: by how much the deadlines that the master knows are later than `request_timeout`. For a
        class that interrupts its requests itself, so that the master finds only those where that did not help.
    teardown()
        After `run()` has returned.

    To be called
    ------------
    accept(), serve_request(server, request, peer), serving(peer), finish(), leave(), extend_deadline(seconds),
    recycle(reason)

    To be read
    ----------
    servers, server (the first of them), slot (a stable small number, unique among live workers), generation, options,
    draining, quitting (draining, and in a hurry), pool_drains, drain_fd (for any wait), acceptor (for a loop that waits
    for more than listeners)

    Inherited by the fork: everything the master held before it, apart from its threads and its own descriptors. A
    connection to a database that was opened before the fork is shared with the siblings, and breaks: open it in
    `setup()`.
    """

    # What a server's RequestHandlerClass is to this class, and what NAME is to the command: a handler, or (True) an
    # application.
    application = False
    threads = 1  # that serve requests, if there are more than the main one
    slack = 0.0

    def __init__(self, servers: Sequence[socketserver.BaseServer], seat: Seat) -> None:
        self.servers = tuple(servers)
        self.server = self.servers[0]
        self.slot, self.generation, self.options = seat.slot, seat.generation, seat.options
        self.draining = self.quitting = False
        self._seat = seat
        self._forking = threading.local()  # the signal mask of a thread that forks
        self._disowned = False  # in a child that the program forked from this worker
        self._board = seat.board
        self._uplink = lifeline.Uplink(seat.uplink_write)
        self._worn = False
        self._ready = False
        self._acceptor: Acceptor | None = None
        self._drain_ends: tuple[int, int] | None = None
        # Re-entrant: the handler of an interrupt takes it on top of whatever the main thread is doing.
        self._lock = threading.RLock()
        self._changed = threading.Condition(self._lock)
        # What is in hand beside the hottest loop, oldest first; of those, which have a deadline in the order in which
        # they came, and which have one out of it; and which one the scoreboard shows.
        self._open: dict[Request, None] = {}
        self._due: dict[Request, None] = {}
        self._odd: dict[Request, None] = {}
        self._shown: Request | None = None
        self._count, self._spent = 0, 0.0  # requests, and seconds in them
        self._handed: dict[int, Request] | None = None  # what the chain may give to another thread, by id
        self._stuck = False
        self._finishing = False
        self._memory_at = 0.0
        rng = random.Random(seat.seed)
        self._recycle_after = policy.recycle_after(self.options.max_requests, self.options.requests_jitter, rng)
        # After which request to call `_look()`: the hot path compares one number.
        self._limit = 1 if self.options.max_memory else self._recycle_after or 1 << 62
        limit = self.options.request_timeout
        self._timeout = limit + self.slack if limit else 0.0

    # -- may be overridden -----------------------------------------------------------------------------------------

    @classmethod
    def check(cls, server: Any) -> None:
        """Raise OptionError, with the mend, if this class cannot serve `server`. Runs before anything is forked."""
        handler = getattr(server, "RequestHandlerClass", None)
        chain.check_handler(handler, server.socket_type)
        chain.refuse_async(handler, cls.__name__)

    def setup(self) -> None:
        """Open what this process must own. Called before the worker is ready."""

    def run(self) -> None:
        """Serve until told to leave, return when nothing is in hand any more."""
        raise NotImplementedError

    def drain(self) -> None:
        """The order to leave has come. Must not raise, block or do much: it runs in a signal handler."""
        if self._acceptor is not None:
            self._acceptor.leave()

    def expired(self) -> None:
        """A request is past its deadline. It runs in a signal handler of the main thread, and may raise.

        The default raises `RequestTimeout` in the handler if that is what the main thread does. Where it is in another
        thread, or one of several, nothing can be raised in it alone: the stacks of all threads go into the report of
        this worker's death, it leaves and is replaced. Its other requests have their own deadlines, and
        `graceful_timeout`; it ends when only those are left that are late.
        """
        open = list(self._open)
        if not open or (len(open) == 1 and open[0].thread == get_ident()):
            self._board.floats[scoreboard.INTERRUPTED] = self._board.floats[scoreboard.DEADLINE]
            raise RequestTimeout(f"the request took longer than {self.options.request_timeout:g} s")
        if len(open) == 1 and not open[0].thread:
            return  # it begins or ends at this moment
        now = monotonic()
        with self._lock:
            for one in open:
                if 0.0 < one.deadline <= now:
                    one.late = True
                    self._due.pop(one, None)
                    self._odd.pop(one, None)
            first = not self._stuck and any(one.late for one in open)
            self._stuck = self._stuck or first
            self._board.floats[scoreboard.DEADLINE] = self._earliest()
            self._changed.notify_all()
        if first:
            faulthandler.dump_traceback(self._uplink.fd, all_threads=True)
            self._uplink.say(lifeline.STUCK)
            self._on_term(signal.SIGTERM, None)

    def teardown(self) -> None:
        """Close what `setup()` opened. Called after `run()` has returned."""

    # -- to be called ----------------------------------------------------------------------------------------------

    @property
    def acceptor(self) -> Acceptor:
        """The listeners, for a loop that waits for more than those. Begins to take: call it in `run()`."""
        if self._acceptor is None:
            acceptor = Acceptor(self, self.servers, self._board)
            for server in self.servers:
                chain.follow(self, server)
            if any(map(chain.hands_over, self.servers)):
                self._say_threads(UNKNOWN_THREADS)
            self._acceptor = acceptor
            if self.draining:  # told to leave between ready and here
                acceptor.leave()
        return self._acceptor

    @property
    def pool_drains(self) -> bool:
        """Whether it is the whole pool that stops: then the queue is to be emptied before leaving."""
        return self._board.pool_drains

    @property
    def drain_fd(self) -> int:
        """A descriptor that is readable from the moment this worker is told to leave, and stays so.

        For a poll beside what a handler waits for, in any thread: a signal alone ends no wait (PEP 475). Never read it.
        """
        with self._lock:
            if self._drain_ends is None:
                self._drain_ends = os.pipe()
                if self.draining:  # the handler of TERM came before there was anything to write to
                    self._show_drain()
            return self._drain_ends[0]

    def accept(self) -> Taken | None:
        """Wait for the next connection or datagram of any server: (server, request, peer). None: leave now.

        Raises
        ------
        OSError
            The program has closed the listener.
        """
        return self.acceptor.take()

    def serve_request(
        self, server: socketserver.BaseServer, request: Any, peer: Any, begun: Request | None = None
    ) -> None:
        """Serve one request through the whole chain of the server's methods, with its deadline; any thread may.

        Parameters
        ----------
        begun
            From `serving(peer).begin()`, by whoever took it, so that a loop that hands requests to threads knows of
            each before it is told that there are no more. It is ended here.
        """
        chain.serve(self, server, request, peer, begun)

    def leave(self) -> None:
        """Take nothing new, finish what is in hand, be replaced at once; as after TERM. For the main thread."""
        self._uplink.say(lifeline.EXITS)
        self._on_term(signal.SIGTERM, None)

    def serving(self, peer: object = "", timeout: float | None = None) -> Request:
        """Around one request, `with self.serving(peer):`: busy, deadline, counts, idle. Any thread or task may use it.

        Parameters
        ----------
        timeout
            Seconds; by default `request_timeout`. 0: this request has no deadline. A shorter one than `request_timeout`
            may be noticed as late as that, and without `request_timeout` nobody looks.
        """
        return Request(self, peer, self._timeout if timeout is None else timeout)

    def finish(self) -> None:
        """Wait for what other threads have in hand. The master sees to it that this ends."""
        with self._changed:
            self._finishing = True
            while not all(one.late for one in self._open):
                self._changed.wait()

    def extend_deadline(self, seconds: float) -> None:
        """Give the request in hand `seconds` from now. Where it has no deadline there is nothing to extend."""
        one = _current.get()
        if one in self._open:
            one.extend_deadline(seconds)
        elif not self._open and self._board.floats[scoreboard.DEADLINE]:
            self._board.floats[scoreboard.DEADLINE] = monotonic() + seconds

    def recycle(self, reason: str = "") -> None:
        """Ask to be replaced. The worker serves on until its replacement is ready."""
        if not self._worn:
            self._worn = True
            self._uplink.say(lifeline.WORN)

    # -- what is in hand -------------------------------------------------------------------------------------------

    def _move(self, one: Request, deadline: float) -> None:
        with self._lock:
            if one in self._open and not one.late:
                self._due.pop(one, None)
                self._odd[one] = None
                one.timeout, one.deadline = -1.0, deadline
                self._board.floats[scoreboard.DEADLINE] = self._earliest()

    def _earliest(self) -> float:
        """The earliest deadline of what is in hand and not late. Those of equal timeouts are in their order already."""
        first = next(iter(self._due), None)
        least = first.deadline if first is not None else 0.0
        for one in self._odd:
            if not least or one.deadline < least:
                least = one.deadline
        return least

    def _show(self, one: Request) -> None:
        """Of what is in hand the scoreboard shows the oldest."""
        self._shown = one
        self._board.floats[scoreboard.BUSY_SINCE] = one.start
        self._board.set_peer(one.peer)

    def _look(self, count: int, now: float) -> None:
        """After a request: ask to be recycled where a limit is reached."""
        if self._worn:
            return
        if self._recycle_after and count >= self._recycle_after:
            self.recycle("max_requests")
        if self.options.max_memory and now >= self._memory_at:
            # Memory grows only while requests are served: it is looked at then, at most twice a second, and never when
            # idle.
            self._memory_at = now + 0.5
            if own_memory() > self.options.max_memory:
                self.recycle("max_memory")

    def _say_threads(self, number: int) -> None:
        """So many may keep the main thread from the interpreter when a signal comes: the master waits longer for it."""
        self._board.ints[scoreboard.THREADS] = max(number, self._board.ints[scoreboard.THREADS])

    # -- signals ---------------------------------------------------------------------------------------------------

    def _on_term(self, signum: int, frame: types.FrameType | None) -> None:
        self._board.set_phase(Phase.DRAINING)  # also where an empty queue told it first that the pool stops
        if not self.draining:
            self.draining = True
            self._uplink.say(lifeline.LEAVES)
            if not self._ready:
                os._exit(0)  # nobody was served yet; `setup()` may hang for as long as it likes
            try:
                self.drain()
            except Exception:
                traceback.print_exc()
            self._show_drain()

    def _show_drain(self) -> None:
        if self._drain_ends is not None:
            os.write(self._drain_ends[1], b"\0")  # twice at most

    def _on_quit(self, signum: int, frame: types.FrameType | None) -> None:
        self._board.set_phase(Phase.LEAVING)
        if not self._ready or self._board.floats[scoreboard.BUSY_SINCE]:
            self._uplink.say(lifeline.LEAVES)
            os._exit(0)
        self.quitting = True
        self._on_term(signum, frame)
        self._board.set_phase(Phase.LEAVING)

    def _on_interrupt(self, signum: int, frame: types.FrameType | None) -> None:
        """Once a request, and only if it is late: the order may have been meant for the one before."""
        floats = self._board.floats
        deadline = floats[scoreboard.DEADLINE]
        while frame is not None:
            if frame.f_code in _UNDIVIDED:
                return
            frame = frame.f_back
        if deadline and monotonic() >= deadline and floats[scoreboard.INTERRUPTED] != deadline:
            self.expired()

    def _hold_signals(self) -> None:
        """Before the program forks: what is sent to the child at its birth must find the child's own handlers."""
        self._forking.mask = signal.pthread_sigmask(signal.SIG_BLOCK, _OWN)

    def _free_signals(self) -> None:
        signal.pthread_sigmask(signal.SIG_SETMASK, self._forking.mask)

    def _disown(self) -> None:
        """In a child that the program forks from a worker: it is no worker, and must not speak, write or accept as one.

        A listener that it kept would hold the port for as long as it lives, after the pool has stopped. The one of
        datagrams stays: the answers go through it.
        """
        if self._disowned:  # a child of such a child: handlers and descriptors are its own by now
            self._free_signals()
            return
        self._disowned = True
        for one in _OWN:
            signal.signal(one, signal.SIG_DFL)
        self._free_signals()
        # Another thread, which is not here, may have held it.
        self._lock = threading.RLock()
        self._changed = threading.Condition(self._lock)
        self._board = scoreboard.Slot.detached()
        servers: Sequence[Any] = self.servers
        streams = [one.socket.fileno() for one in servers if one.socket_type == socket.SOCK_STREAM]
        with contextlib.suppress(OSError):
            null = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
            for fd in [self._uplink.fd, *streams]:
                if fd >= 0:  # a listener that the program has closed
                    os.dup2(null, fd, inheritable=False)
            os.close(null)

    def _on_reopen(self, signum: int, frame: types.FrameType | None) -> None:
        reopen_logs()

    # -- life ------------------------------------------------------------------------------------------------------

    def live(self) -> int:
        """From ready to the last line. Returns the exit code."""
        os.register_at_fork(before=self._hold_signals, after_in_parent=self._free_signals, after_in_child=self._disown)
        self.setup()
        if self.draining:
            return 0
        self._ready = True
        self._say_threads(self.threads)
        self._board.set_phase(Phase.SERVING)
        self._uplink.say(lifeline.READY)
        set_title(f"{self._seat.title} ready")
        code = 0
        try:
            self.run()
        except SystemExit as left:
            code = exit_code(left)
        finally:
            if self.draining:
                set_title(f"{self._seat.title} leaving")
            self.teardown()
        return code


# In these no exception of ours is raised: at its first instruction `end()` would keep its request in hand for ever, and
# half an order to leave is none.
_UNDIVIDED = {one.__code__ for one in (Request.end, Worker._on_interrupt, Worker._on_term, Worker._on_quit)}


def main(seat: Seat, build: Callable[[Seat], Worker], unblock: Callable[[], None]) -> int:
    """The child's whole life, given to `processes.fork`. Returns its exit code."""
    uplink = lifeline.Uplink(seat.uplink_write)

    def leave(signum: int, frame: types.FrameType | None) -> None:
        uplink.say(lifeline.LEAVES)
        os._exit(0)

    lifeline.arm(seat.lifeline_read)
    stderr.replace()
    # The stacks of a hang (ABRT) or a crash (SIGSEGV and its like) go into the report of this worker's death.
    faulthandler.enable(file=seat.uplink_write, all_threads=True)
    for one in (signal.SIGINT, signal.SIGHUP, signal.SIGTTIN, signal.SIGTTOU, signal.SIGWINCH, INTERRUPT):
        # Not a handler that does nothing: handlers run on the small stack that faulthandler made for this thread, one
        # on top of the other, and six pending signals overflow it.
        signal.signal(one, signal.SIG_IGN)
    for one in (signal.SIGTERM, signal.SIGQUIT):
        signal.signal(one, leave)  # until there is a worker to ask
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    set_title(f"{seat.title} starting")
    unblock()
    try:
        worker = build(seat)
        signal.signal(signal.SIGTERM, worker._on_term)
        signal.signal(signal.SIGQUIT, worker._on_quit)
        signal.signal(signal.SIGUSR1, worker._on_reopen)
        signal.signal(INTERRUPT, worker._on_interrupt)
        return worker.live()
    except SystemExit as left:
        return exit_code(left)
    except BaseException:
        uplink.tell(traceback.format_exc())  # the master puts it into the report, and the log
        return 1


def exit_code(left: SystemExit) -> int:
    """What the interpreter makes of a SystemExit."""
    if left.code is None:
        return 0
    if isinstance(left.code, int):
        return left.code & 0xFF
    print(left.code, file=sys.stderr)
    return 1


def own_memory() -> int:
    """Bytes that would be freed if this process ended (USS), or its resident set where that is not known."""
    import psutil

    process = psutil.Process()
    try:
        info: Any = process.memory_full_info()
        return int(getattr(info, "uss", info.rss))
    except psutil.Error:
        return int(process.memory_info().rss)


def prepare(*, memory: bool) -> None:
    """In the master, before the first fork: import what every worker would import, and leave no garbage to copy."""
    gc.collect()
    if sys.platform != "darwin":
        import setproctitle  # noqa: F401
    if memory:
        import psutil  # noqa: F401


def set_title(title: str) -> None:
    """Show up in ps and top. Off on macOS, where setproctitle after a fork crashes the child."""
    if sys.platform != "darwin":
        import setproctitle

        setproctitle.setproctitle(title)


def reopen_logs() -> None:
    """Have every logging handler that holds a file open it again by name, as after a rotation."""
    for name in ["", *logging.root.manager.loggerDict]:
        for handler in logging.getLogger(name).handlers:
            if isinstance(handler, logging.FileHandler) and handler.stream is not None:
                # dup2 under the stream, not close and open: this may run between two halves of a write.
                with contextlib.suppress(OSError, ValueError):
                    fd = os.open(handler.baseFilename, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o666)
                    os.dup2(fd, handler.stream.fileno(), inheritable=False)
                    os.close(fd)

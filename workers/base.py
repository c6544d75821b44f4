"""A worker: the child's life from the fork to its last `os._exit`, and the surface that worker classes build on.

    starting -> ready (idle <-> busy) -> draining -> gone

Only the worker writes its slot of the scoreboard. Nothing in it waits on the lifeline: when the master dies the kernel
kills the worker. It never raises into a handler because of a signal, but for the one request that is past its deadline.
"""

import contextlib
import faulthandler
import gc
import logging
import os
import random
import signal
import socketserver
import sys
import threading
import traceback
import types
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from time import monotonic
from typing import Any

import prefork.lifeline as lifeline
import prefork.policy as policy
import prefork.scoreboard as scoreboard
import prefork.stderr as stderr
from prefork.errors import RequestTimeout
from prefork.options import Options
from prefork.states import Phase

# The master's order to interrupt a request. Portable (real-time signals are not), and harmless where a CPU limit sends
# it: the handler looks at the deadline itself.
INTERRUPT = signal.SIGXCPU

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


@dataclass(slots=True)
class _Request:
    start: float
    deadline: float
    peer: object
    thread: int


class Worker:
    """One process of the pool. Subclass it, name the subclass in `worker_class`, override few of these.

    May be overridden
    -----------------
    setup()
        After the fork, before ready: open what each process must own. An exception is a boot failure.
    run()
        Serve until `draining` and return when drained.
    drain()
        Told to leave. Called once, from a signal handler between two bytecodes of the main thread: set, close or wake
        something.
    teardown()
        After `run()` has returned.

    To be called
    ------------
    serving(peer), extend_deadline(seconds), recycle(reason)

    To be read
    ----------
    servers, server (the first of them), slot (a stable small number, unique among live workers), generation, options,
    draining

    Inherited by the fork: everything the master held before it, apart from its threads and its own descriptors. A
    connection to a database that was opened before the fork is shared with the siblings, and breaks: open it in
    `setup()`.
    """

    def __init__(self, servers: Sequence[socketserver.BaseServer], seat: Seat) -> None:
        self.servers = tuple(servers)
        self.server = self.servers[0]
        self.slot, self.generation, self.options = seat.slot, seat.generation, seat.options
        self.draining = False
        self._seat = seat
        self._forking = threading.local()  # the signal mask of a thread that forks
        self._board = seat.board
        self._uplink = lifeline.Uplink(seat.uplink_write)
        self._worn = False
        self._ready = False
        self._wakeup: Callable[[], None] | None = None
        self._lock = threading.Lock()
        self._changed = threading.Condition(self._lock)
        self._open: dict[object, _Request] = {}  # what is in hand through `serving()`, oldest first
        self._memory_at = 0.0
        rng = random.Random(seat.seed)
        self._recycle_after = policy.recycle_after(self.options.max_requests, self.options.requests_jitter, rng)

    # -- may be overridden -----------------------------------------------------------------------------------------

    def setup(self) -> None:
        """Open what this process must own. Called before the worker is ready."""

    def run(self) -> None:
        """Serve until `draining`, return when nothing is in hand any more."""
        raise NotImplementedError

    def drain(self) -> None:
        """The order to leave has come. Must not raise, block or do much: it runs in a signal handler."""

    def teardown(self) -> None:
        """Close what `setup()` opened. Called after `run()` has returned."""

    # -- to be called ----------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def serving(self, peer: object = "") -> Iterator[None]:
        """Around one request: busy, deadline, counts, idle. For a loop of one's own; any thread may use it."""
        ticket = object()
        self._enter(ticket, peer)
        try:
            yield
        finally:
            # No RequestTimeout from here on; `_leave` publishes again what other threads have in hand.
            self._board.floats[scoreboard.DEADLINE] = 0.0
            self._leave(ticket)

    def extend_deadline(self, seconds: float) -> None:
        """Give the request in hand `seconds` from now. Without a `request_timeout` there is nothing to extend."""
        if not self.options.request_timeout:
            return
        deadline, me = monotonic() + seconds, threading.get_ident()
        with self._lock:
            for one in self._open.values():
                if one.thread == me:
                    one.deadline = deadline
            if self._open:
                self._publish()
            elif self._board.floats[scoreboard.DEADLINE]:
                self._board.floats[scoreboard.DEADLINE] = deadline

    def recycle(self, reason: str = "") -> None:
        """Ask to be replaced. The worker serves on until its replacement is ready."""
        if not self._worn:
            self._worn = True
            self._uplink.say(lifeline.WORN)

    # -- what loops need -------------------------------------------------------------------------------------------

    def _enter(self, ticket: object, peer: object) -> None:
        """A request begins, of several that this worker may have in hand."""
        start = monotonic()
        timeout = self.options.request_timeout
        with self._lock:
            self._open[ticket] = _Request(start, start + timeout if timeout else 0.0, peer, threading.get_ident())
            self._publish()

    def _adopt(self, ticket: object) -> None:
        """The calling thread is the one that serves this request."""
        with self._lock:
            if one := self._open.get(ticket):
                one.thread = threading.get_ident()

    def _leave(self, ticket: object) -> None:
        end = monotonic()
        with self._changed:
            one = self._open.pop(ticket, None)
            if one is None:
                self._publish()
                return
            ints, floats = self._board.ints, self._board.floats
            count = ints[scoreboard.REQUESTS] = ints[scoreboard.REQUESTS] + 1
            floats[scoreboard.BUSY_TIME] += end - one.start
            self._publish()
            self._changed.notify_all()
        self._look(count, end)

    def _publish(self) -> None:
        """Show the oldest request in hand on the scoreboard, and the earliest deadline."""
        floats = self._board.floats
        oldest = next(iter(self._open.values()), None)
        if oldest is None:
            floats[scoreboard.BUSY_SINCE] = floats[scoreboard.DEADLINE] = 0.0
            return
        floats[scoreboard.DEADLINE] = min((r.deadline for r in self._open.values() if r.deadline), default=0.0)
        if floats[scoreboard.BUSY_SINCE] != oldest.start:
            floats[scoreboard.BUSY_SINCE] = oldest.start
            self._board.set_peer(oldest.peer)

    def _finish(self) -> None:
        """Wait for what other threads have in hand. The master sees to it that this ends."""
        with self._changed:
            while self._open:
                self._changed.wait()

    def _limited(self) -> int:
        """After which request to call `_look()`: the hot path compares one number."""
        if self.options.max_memory:
            return 1
        return self._recycle_after or 1 << 62

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

    # -- signals ---------------------------------------------------------------------------------------------------

    def _on_term(self, signum: int, frame: types.FrameType | None) -> None:
        if not self.draining:
            self.draining = True
            self._board.set_phase(Phase.DRAINING)
            self._uplink.say(lifeline.LEAVES)
            if not self._ready:
                os._exit(0)  # nobody was served yet; `setup()` may hang for as long as it likes
            try:
                self.drain()
            except Exception:
                traceback.print_exc()
        if self._wakeup is not None:
            self._wakeup()

    def _on_quit(self, signum: int, frame: types.FrameType | None) -> None:
        self._board.set_phase(Phase.LEAVING)
        if not self._ready or self._board.floats[scoreboard.BUSY_SINCE]:
            self._uplink.say(lifeline.LEAVES)
            os._exit(0)
        self._on_term(signum, frame)
        self._board.set_phase(Phase.LEAVING)

    def _on_interrupt(self, signum: int, frame: types.FrameType | None) -> None:
        """Raise in the handler of the main thread, once a request, and only if that very request is late."""
        floats = self._board.floats
        deadline = floats[scoreboard.DEADLINE]
        if not deadline or monotonic() < deadline or floats[scoreboard.INTERRUPTED] == deadline:
            return
        if self._open:
            # Of several requests, or one in another thread, none can be interrupted without harming another.
            (only, *others) = self._open.values()
            if others or only.thread != threading.get_ident():
                return
        floats[scoreboard.INTERRUPTED] = deadline
        raise RequestTimeout(f"the request took longer than {self.options.request_timeout:g} s")

    def _hold_signals(self) -> None:
        """Before the program forks: what is sent to the child at its birth must find the child's own handlers."""
        self._forking.mask = signal.pthread_sigmask(signal.SIG_BLOCK, _OWN)

    def _free_signals(self) -> None:
        signal.pthread_sigmask(signal.SIG_SETMASK, self._forking.mask)

    def _disown(self) -> None:
        """In a child that the program forks from a worker: it is no worker, and must not speak or write as one."""
        for one in _OWN:
            signal.signal(one, signal.SIG_DFL)
        self._free_signals()
        self._board = scoreboard.Slot.detached()
        with contextlib.suppress(OSError):
            null = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
            os.dup2(null, self._uplink.fd, inheritable=False)
            os.close(null)

    def _on_reopen(self, signum: int, frame: types.FrameType | None) -> None:
        reopen_logs()

    # -- life ------------------------------------------------------------------------------------------------------

    def live(self) -> int:
        """From ready to the last line. Returns the exit code."""
        self.setup()
        if self.draining:
            return 0
        os.register_at_fork(before=self._hold_signals, after_in_parent=self._free_signals, after_in_child=self._disown)
        self._ready = True
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

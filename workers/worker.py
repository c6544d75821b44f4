"""A worker: what it does between its birth and its end, and the surface that worker classes build on.

    starting -> ready (idle <-> busy) -> draining -> gone

Only the worker writes its slot of the scoreboard. It never raises into a handler because of a signal, but for the one
request that is past its deadline.
"""

import contextlib
import faulthandler
import os
import signal
import socket
import socketserver
import threading
import traceback
import types
from collections.abc import Sequence
from time import monotonic
from typing import Any

import prefork.kernel.dev_null as dev_null
import prefork.kernel.log_rotation as log_rotation
import prefork.kernel.logs as logs
import prefork.link.scoreboard as scoreboard
import prefork.link.uplink as uplink
import prefork.workers.intake.dispatch as dispatch
from prefork.errors import RequestTimeout
from prefork.kernel.own_process import set_title
from prefork.link.worker_context import INTERRUPT, WorkerContext
from prefork.rules.states import Phase
from prefork.rules.worker_exit import worker_name
from prefork.workers.active_requests import ActiveRequest, ActiveRequests
from prefork.workers.intake.acceptor import Accepted, Acceptor
from prefork.workers.lifecycle import ToldToLeave, exit_code
from prefork.workers.recycling import Recycling

log = logs.get("prefork")

UNKNOWN_THREADS = 16  # of a server that makes them itself

_OWN_SIGNALS = frozenset({signal.SIGTERM, signal.SIGQUIT, signal.SIGUSR1, INTERRUPT})  # what a worker has handlers for


class Worker:
    """One process of the pool. Subclass it, name the subclass in `worker_class`, override few of these.

    May be overridden
    -----------------
    check(server), application
        Class-level, in the master, before anything is forked: whether this class can serve what it is given.
    threads
        How many threads serve requests, if it is not the main thread alone; to be known after `setup()`.
    setup()
        After the fork, before ready: open what each process must own. An exception is a boot failure.
    prepare_to_accept()
        After `setup()`, before ready: make what is needed to accept. An exception is a boot failure.
    run()
        Serve until told to leave, and return when drained.
    drain()
        Told to leave. Called once, from a signal handler between two bytecodes of the main thread: set, close or wake
        something. The default ends `accept()`.
    expired()
        The request in progress is past its deadline. Called from a signal handler, too.
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
    for more than listeners), log_name (for texts of the log)

    Inherited by the fork: everything the master held before it, apart from its threads and its own descriptors. A
    connection to a database that was opened before the fork is shared with the siblings, and breaks: open it in
    `setup()`.
    """

    # What a server's RequestHandlerClass is to this class, and what NAME is to the command: a handler, or (True) an
    # application.
    application = False
    threads = 1  # that serve requests, if there are more than the main thread
    slack = 0.0

    def __init__(self, servers: Sequence[socketserver.BaseServer], context: WorkerContext) -> None:
        self.servers = tuple(servers)
        self.server = self.servers[0]
        self.slot, self.generation, self.options = context.slot, context.generation, context.options
        self.draining = self.quitting = False
        self._context = context
        self._forking = threading.local()  # the signal mask of a thread that forks
        self._disowned = False  # in a child that the program forked from this worker
        self._board = context.board
        self._uplink = uplink.UplinkWriter(context.uplink_write, context.token)
        self._ready = False
        self._acceptor: Acceptor | None = None
        self._drain_ends: tuple[int, int] | None = None
        self._handed: dict[int, ActiveRequest] | None = None  # what the chain may give to another thread, by id
        self._stuck = False
        self._recycling = Recycling(context, self._uplink.say)
        self._first_check = self._recycling.first_check
        limit = self.options.request_timeout
        self._timeout = limit + self.slack if limit else 0.0
        self._requests = ActiveRequests(self._board, self._timeout, self._recycling, self._judge)

    # -- may be overridden -----------------------------------------------------------------------------------------

    @classmethod
    def check(cls, server: Any) -> None:
        """Raise OptionError, with the mend, if this class cannot serve `server`. Runs before anything is forked."""
        handler = getattr(server, "RequestHandlerClass", None)
        dispatch.check_handler(handler, server.socket_type)
        dispatch.refuse_async(handler, cls.__name__)

    def setup(self) -> None:
        """Open what this process must own. Called before the worker is ready."""

    def prepare_to_accept(self) -> None:
        """Make what is needed to accept: only a worker that can accept is ready."""
        _ = self.acceptor

    def run(self) -> None:
        """Serve until told to leave, return when nothing is in progress any more."""
        raise NotImplementedError

    def drain(self) -> None:
        """The order to leave has come. Must not raise, block or do much: it runs in a signal handler."""
        if self._acceptor is not None:
            self._acceptor.leave()

    def expired(self) -> None:
        """A request is past its deadline. It runs in a signal handler of the main thread, and may raise.

        The default raises `RequestTimeout` if the main thread works on that request, or on a request within it. In a
        request of another thread or task alone nothing can be raised. Then the stacks of all threads go into the report
        of this worker's death, and the worker leaves and is replaced. Its other requests have their own deadlines, and
        `graceful_timeout`; the worker ends when only late requests are left.
        """
        requests = self._requests
        late = requests.overdue()
        if requests.fast_path_cells is not None or (late and set(late).issubset(requests.mine())):
            self._board.floats[scoreboard.INTERRUPTED] = self._board.floats[scoreboard.DEADLINE]
            raise RequestTimeout(f"the request took longer than {self.options.request_timeout:g} s")
        requests.give_up(late)
        if late and not self._stuck:
            self._stuck = True
            faulthandler.dump_traceback(self._uplink.fd, all_threads=True)
            self._uplink.say(uplink.STUCK)
            self._on_term(signal.SIGTERM, None)

    def teardown(self) -> None:
        """Close what `setup()` opened. Called after `run()` has returned."""

    # -- to be called ----------------------------------------------------------------------------------------------

    @property
    def log_name(self) -> str:
        """This worker as the log names it, such as `worker 1234 (slot 0, generation 1)`."""
        return worker_name(os.getpid(), self.slot, self.generation)

    @property
    def acceptor(self) -> Acceptor:
        """The listeners, for a loop that waits for more than those. Made by `prepare_to_accept()`."""
        if self._acceptor is None:
            acceptor = Acceptor(self, self.servers, self._board)
            for server in self.servers:
                dispatch.follow(self, server)
            if any(map(dispatch.hands_over, self.servers)):
                self._say_threads(UNKNOWN_THREADS)
            self._acceptor = acceptor
            if self.draining:  # told to leave between ready and here
                acceptor.leave()
        return self._acceptor

    @property
    def pool_drains(self) -> bool:
        """Whether the whole pool stops. The worker then empties the queue before it leaves."""
        return self._board.pool_drains

    @property
    def drain_fd(self) -> int:
        """A descriptor that is readable from the moment this worker is told to leave, and stays so.

        For a poll beside what a handler waits for, in any thread: a signal alone ends no wait (PEP 475). Never read it.
        """
        with self._requests.lock:
            if self._drain_ends is None:
                self._drain_ends = os.pipe()
                if self.draining:  # the handler of TERM came before there was anything to write to
                    self._show_drain()
            return self._drain_ends[0]

    def accept(self) -> Accepted | None:
        """Wait for the next connection or datagram of any server: (server, request, peer). None: leave now.

        Raises
        ------
        OSError
            The program has closed the listener.
        """
        return self.acceptor.take()

    def serve_request(
        self, server: socketserver.BaseServer, request: Any, peer: Any, begun: ActiveRequest | None = None
    ) -> None:
        """Serve one request through the whole chain of the server's methods, with its deadline; any thread may.

        Parameters
        ----------
        begun
            From `serving(peer).begin()` in the thread that took the request: a loop that hands requests to threads
            knows of each before it is told that there are no more. It is ended here.
        """
        dispatch.run_chain(self, server, request, peer, begun)

    def leave(self) -> None:
        """Take nothing new, finish what is in progress, be replaced at once; as after TERM. For the main thread."""
        self._uplink.say(uplink.EXITS)
        self._on_term(signal.SIGTERM, None)

    def serving(self, peer: object = "", timeout: float | None = None) -> ActiveRequest:
        """Around one request, `with self.serving(peer):`: busy, deadline, counts, idle. Any thread or task may use it.

        Parameters
        ----------
        timeout
            Seconds; by default `request_timeout`. 0: this request has no deadline. A shorter time than
            `request_timeout` may be noticed as late as that, and without `request_timeout` nobody looks.
        """
        return ActiveRequest(self._requests, peer, self._timeout if timeout is None else timeout)

    def finish(self) -> None:
        """Wait for what other threads have in progress. The master sees to it that this ends."""
        self._requests.wait()

    def extend_deadline(self, seconds: float) -> None:
        """Give the request in progress `seconds` from now. Where it has no deadline there is nothing to extend."""
        self._requests.extend(seconds)

    def recycle(self, reason: str = "") -> None:
        """Ask to be replaced. The worker serves on until its replacement is ready."""
        self._recycling.request(reason)

    def _ask_to_stop(self) -> None:
        """Ask the master to stop the whole pool gracefully. Returns at once."""
        self._uplink.say(uplink.STOP)

    def _say_threads(self, number: int) -> None:
        """These threads may keep the main thread from the interpreter: the master waits longer for a signal."""
        self._board.ints[scoreboard.THREADS] = max(number, self._board.ints[scoreboard.THREADS])

    # -- signals ---------------------------------------------------------------------------------------------------

    def _on_term(self, signum: int, frame: types.FrameType | None) -> None:
        self._board.set_phase(Phase.DRAINING)  # also where an empty queue told it first that the pool stops
        if not self.draining:
            self.draining = True
            self._uplink.say(uplink.LEAVES)
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
        if self._board.floats[scoreboard.BUSY_SINCE]:
            self._uplink.say(uplink.LEAVES)
            os._exit(0)
        self.quitting = True
        self._on_term(signum, frame)
        self._board.set_phase(Phase.LEAVING)

    def _on_interrupt(self, signum: int, frame: types.FrameType | None) -> None:
        while frame is not None:
            if frame.f_code in _UNINTERRUPTIBLE:
                self._requests.missed = True
                return
            frame = frame.f_back
        self._judge()

    def _judge(self) -> None:
        """Interrupt a request once, and only if it is late: the order may have been meant for the request before."""
        floats = self._board.floats
        deadline = floats[scoreboard.DEADLINE]
        if deadline and monotonic() >= deadline and floats[scoreboard.INTERRUPTED] != deadline:
            self.expired()

    def _hold_signals(self) -> None:
        """Before the program forks: a signal that the child is sent at its birth must find the child's own handlers."""
        self._forking.mask = signal.pthread_sigmask(signal.SIG_BLOCK, _OWN_SIGNALS)

    def _free_signals(self) -> None:
        signal.pthread_sigmask(signal.SIG_SETMASK, self._forking.mask)

    def _disown(self) -> None:
        """In a child that the program forks from a worker: it is no worker, and must not speak, write or accept as one.

        A listener that the child kept would hold the port after the pool has stopped, for as long as the child lives. A
        listener of datagrams stays: the answers go through it.
        """
        if self._disowned:  # a child of such a child: handlers and descriptors are its own by now
            self._free_signals()
            return
        self._disowned = True
        for number in _OWN_SIGNALS:
            signal.signal(number, signal.SIG_DFL)
        self._free_signals()
        self._board = scoreboard.Slot.detached()
        self._requests.disown(self._board)
        servers: Sequence[Any] = self.servers
        streams = [server.socket.fileno() for server in servers if server.socket_type == socket.SOCK_STREAM]
        with contextlib.suppress(OSError):
            null = dev_null.open_null()
            for fd in [self._uplink.fd, *streams]:
                if fd >= 0:  # a listener that the program has closed
                    os.dup2(null, fd, inheritable=False)
            os.close(null)

    def _on_reopen(self, signum: int, frame: types.FrameType | None) -> None:
        log_rotation.reopen()

    # -- life ------------------------------------------------------------------------------------------------------

    def live(self) -> int:
        """From ready to the last line. Returns the exit code."""
        signal.signal(signal.SIGUSR1, self._on_reopen)
        signal.signal(INTERRUPT, self._on_interrupt)
        os.register_at_fork(before=self._hold_signals, after_in_parent=self._free_signals, after_in_child=self._disown)
        self.setup()
        self.prepare_to_accept()
        if self.draining:
            raise ToldToLeave  # once more: something in it was deaf to that
        self._ready = True
        signal.signal(signal.SIGTERM, self._on_term)
        signal.signal(signal.SIGQUIT, self._on_quit)
        self._say_threads(self.threads)
        self._board.set_phase(Phase.SERVING)
        self._uplink.say(uplink.READY)
        set_title(f"{self._context.title} ready")
        code = 0
        try:
            self.run()
        except SystemExit as left:
            code = exit_code(left)
        finally:
            if self.draining:
                set_title(f"{self._context.title} leaving")
            self.teardown()
        return code


# In these an interrupt raises nothing: half a `begin()`, or an `end()` that stops at its first instruction, would keep
# its request in progress for ever, and half an order to leave is none.
_UNINTERRUPTIBLE = {
    function.__code__
    for function in (
        ActiveRequest.__enter__,
        ActiveRequest.begin,
        ActiveRequest.end,
        Worker._on_interrupt,
        Worker._on_term,
        Worker._on_quit,
    )
}

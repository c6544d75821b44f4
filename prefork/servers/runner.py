"""Runs a pool: `run_pool()` for scripts and for the command, `serve()` and `ServerPool` for the servers of a script.

A `ServerPool` belongs to one server, or to several that `serve()` joins. It keeps socketserver's rules about
`shutdown()`, and sees a drain through that outlives `serve_forever()`.
"""

import functools
import os
import socketserver
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, Protocol, Unpack

import prefork.kernel.logs as logs
import prefork.kernel.program_directory as program_directory
import prefork.kernel.standard_streams as standard_streams
import prefork.master.loop as loop
import prefork.servers.server_checks as server_checks
import prefork.servers.worker_class as worker_class
import prefork.workers.lifecycle as lifecycle
from prefork.errors import PreforkError
from prefork.kernel.listener import Listener, describe
from prefork.link.worker_context import WorkerContext
from prefork.master.worker_handle import Start
from prefork.rules.stop_sequence import Stage
from prefork.rules.worker_exit import WorkerExit
from prefork.servers.single_request import SingleWorkers
from prefork.settings.settings import Options

log = logs.get("prefork")


class Control(loop.Control, Protocol):
    """A control socket (`prefork.operations.control`), which is imported only where there is one."""

    def join(self, master: loop.Master, about: dict[str, Any]) -> None: ...

    def close(self) -> None: ...


def run_pool(
    listeners: Sequence[Listener],
    options: Options,
    start: Start,
    hooks: loop.Hooks,
    *,
    control: Control | None = None,
    about: Mapping[str, object] = MappingProxyType({}),
    poll_interval: float | None = None,
    began: Callable[[loop.Master], None] = lambda master: None,
    ends: Callable[[loop.Master], None] = lambda master: None,
    drains: Callable[[loop.Master, Callable[[], None]], None] = lambda master, finish: finish(),
    **of_master: Unpack[loop.MasterOptions],
) -> None:
    """Run a pool over listeners until it is stopped.

    States
    ------
    The listeners are opened and named in the log, the master is made, and `began(master)` may give it to others for
    orders. It serves on this thread until it is stopped. When no worker is left, `ends(master)` takes it back, and it
    is closed. A stop with `detach` may leave workers: `drains(master, finish)` sees to it that somebody, on whatever
    thread, calls `finish()`, which waits for them and does the same.

    Who owns what
    -------------
    The caller owns the sockets and the claims to their paths, and closes them. The `Listener`s are closed with the
    master, and tell afterwards what the stop has done (`spent`, `held`). Master and workers belong to this call, or to
    `finish()`. So does the control socket: it is served by the master's loop, and closed after its last turn.

    Failures
    --------
    A listener cannot be opened: its OSError, and nothing was forked. No worker of the first generation became ready:
    BootError, and none is left. What fails in the loop, hooks included, is logged there, and the loop goes on. What is
    no `Exception`, such as KeyboardInterrupt, and what `began()` raises: the workers are killed and collected, and it
    is raised again.

    `of_master` is passed to `Master`: how a reload tries the program or reads the settings, and what other children
    it has.
    """
    names = [describe(listener.socket) for listener in listeners]
    try:
        for listener, name in zip(listeners, names, strict=True):
            # accept() itself waits on a listener that is alone; one of several must never block the others.
            listener.open(blocking=len(listeners) == 1)
            log.info("listening on %s", name)
        master = loop.Master(listeners, options, start, hooks, title=" ".join(names), **of_master)
    except BaseException:
        if control is not None:
            control.close()
        raise

    def finish() -> None:
        if master.pids:
            master.run()
        if control is not None:
            control.close()
        ends(master)
        master.close()

    try:
        if control is not None:
            control.join(master, {"listeners": names, **about})
        began(master)
        master.run(poll_interval)
    except BaseException:
        if master.pids:
            master.stop(Stage.KILL)
            master.run()
        raise
    finally:
        if master.pids:
            drains(master, finish)
        else:
            finish()


class ServerHooks:
    """What the master calls in its own process: methods of the servers."""

    def __init__(self, servers: Sequence[Any]) -> None:
        self._servers = servers
        self.ticks = any(
            type(s).service_actions is not socketserver.BaseServer.service_actions or "service_actions" in vars(s)
            for s in servers
        )

    def service_actions(self) -> None:
        for server in self._servers:
            server.service_actions()

    def worker_exited(self, report: WorkerExit) -> None:
        for server in self._servers:
            if hook := getattr(server, "worker_exited", None):
                hook(report)


def serve(*servers: socketserver.BaseServer, poll_interval: float = 0.5) -> None:
    """Serve several servers from one pool: each worker accepts from all of them. Settings are those of the first.

    Raises
    ------
    OptionError, BootError
        as `serve_forever()` does.
    """
    standard_streams.fill()
    try:
        options = server_checks.prepare(
            servers, mend="patch in the setup() of a worker class, or let the command serve it"
        )
    except BaseException:
        for server in servers:
            pool_of(server).stopped.set()  # a shutdown() that waits for this loop waits for nothing
        raise
    own = [vars(server).get("_pool") for server in servers]
    stop_at_once = any(pool is not None and pool.take_stop_request() for pool in own)
    pool = ServerPool() if len(servers) > 1 else pool_of(servers[0])
    for server in servers:
        server._pool = pool  # type: ignore[attr-defined]
    pool.serve(servers, options, poll_interval, stop_at_once=stop_at_once)


def pool_of(server: Any) -> "ServerPool":
    """The server's pool, made on first use: a mix-in cannot count on its `__init__` being called."""
    if getattr(server, "worker", None) is not None:
        raise PreforkError(
            "only the master can do this; a worker can only ask the pool to stop, by shutdown()", code="PF0112"
        )
    pool: ServerPool = vars(server).setdefault("_pool", ServerPool())
    return pool


class ServerPool:
    """Joins servers with a master, while a master runs, and keeps socketserver's rules about `shutdown()`."""

    def __init__(self) -> None:
        self.stopped = threading.Event()
        self.singles = SingleWorkers()
        self._stop_requested = False
        self._master: loop.Master | None = None
        self._detached: loop.Master | None = None  # its drain is seen through by a thread of its own
        self._drains = False  # after `serve()`, in that thread
        self._thread = 0
        self._lock = threading.Lock()

    @property
    def pids(self) -> set[int]:
        master = self._master
        return (master.pids if master else set()) | self.singles.pids

    def order(self, give: Callable[[loop.Master], None]) -> None:
        """Give an order to the master, if a master runs."""
        with self._lock:
            if self._master is not None:
                give(self._master)

    def stop(self, *, detach: bool = False) -> None:
        with self._lock:
            self._stop_requested = True
            if self._master is not None:
                self._master.stop(detach=detach and self._master is not self._detached)

    def take_stop_request(self) -> bool:
        """Whether a shutdown was asked for before the loop began."""
        requested, self._stop_requested = self._stop_requested, False
        return requested

    def serve(self, servers: Sequence[Any], options: Options, poll_interval: float, *, stop_at_once: bool) -> None:
        self.stopped.clear()
        self._thread = threading.get_ident()
        self._drains = False
        logs.begin()
        try:
            if not stop_at_once:
                self._serve(servers, options, poll_interval)
        finally:
            if self._drains:
                logs.wait()
            else:
                logs.end()
            self._stop_requested = False
            self.stopped.set()

    def _serve(self, servers: Sequence[Any], options: Options, poll_interval: float) -> None:
        def start(context: WorkerContext, unblock: Callable[[], None]) -> int:
            def make(context: WorkerContext) -> Any:
                return worker_class.make_worker(worker_class.resolve(context.options.worker_class), servers, context)

            return lifecycle.main(context, make, unblock)

        listeners = [server_checks.listener_of(server) for server in servers]
        hooks = ServerHooks(servers)
        control = None
        if options.control not in ("", "none"):
            import prefork.operations.place as place  # what a program does not use is not imported

            control = place.make(options.control)
        # The program may leave its directory later.
        absolute = functools.partial(os.path.join, program_directory.here())
        try:
            run_pool(
                listeners,
                options,
                start,
                hooks,
                control=control,
                about={"program": os.path.basename(sys.argv[0]) or "python", "ends_process": False},
                poll_interval=poll_interval if hooks.ticks else None,
                began=self._began,
                ends=self._ends,
                drains=self._drain,
                settings=lambda: server_checks.checked_options(servers, absolute=absolute),
            )
        finally:
            for server, listener in zip(servers, listeners, strict=True):
                server._spent, server._held = listener.spent, listener.held

    def _began(self, master: loop.Master) -> None:
        with self._lock:
            self._master = master
            if self._stop_requested:
                master.stop()

    def _ends(self, master: loop.Master) -> None:
        with self._lock:
            if self._master is master:
                self._master = None
        log.info("stopped")

    def _drain(self, master: loop.Master, finish: Callable[[], None]) -> None:
        with self._lock:
            self._detached = master
            master.stop()  # takes back an order to return early that came after the first

        def see_through() -> None:
            try:
                finish()
            finally:
                logs.end()

        # It is no daemon: the interpreter ends after it.
        threading.Thread(target=see_through, name="prefork-drain").start()
        self._drains = True

    def close(self, block: bool) -> None:
        """See to it that no worker is left, or will be."""
        self.stop(detach=not block)
        if block and self._master is not None and self._thread != threading.get_ident():
            self.stopped.wait()
        if self.singles and block:
            self.singles.drain()
        elif self.singles:
            threading.Thread(target=self.singles.drain, name="prefork-drain").start()

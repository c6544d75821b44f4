"""What stands behind a server's face: checks before anything is forked, and the master while there is one.

A `Service` belongs to one server, or to several that `serve()` joins. It keeps socketserver's rules about `shutdown()`,
sees drains through, and has single workers serve single requests for `handle_request()`.
"""

import contextlib
import functools
import importlib
import os
import select
import signal
import socket
import socketserver
import sys
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import prefork.kernel.import_path as import_path
import prefork.kernel.listener as listener
import prefork.kernel.logs as logs
import prefork.link.scoreboard as scoreboard
import prefork.master.loop as loop
import prefork.master.worker_handle as worker_handle
import prefork.workers.intake.dispatch as dispatch
import prefork.workers.lifecycle as lifecycle
from prefork.errors import OptionError, PreforkError
from prefork.link.worker_context import WorkerContext
from prefork.rules.states import Stop
from prefork.rules.worker_exit import Reason, WorkerExit
from prefork.settings.settings import Options
from prefork.workers.base import Worker
from prefork.workers.handlers.sync import SyncWorker

log = logs.get("prefork")

_FORKING = socketserver.ForkingMixIn  # programs, and tests, put PreforkMixIn in its place
CLASSES = {
    "sync": "prefork.workers.handlers.sync:SyncWorker",
    "thread": "prefork.workers.handlers.threaded:ThreadWorker",
    "asyncio": "prefork.workers.eventloop.asyncio_worker:AsyncioWorker",
    "wsgi": "prefork.workers.wsgi.worker:WSGIWorker",
    "asgi": "prefork.workers.asgi.worker:ASGIWorker",
}
ENTRY_POINTS = "prefork.workers"  # the group in which other distributions register classes under short names


def check(
    servers: Sequence[Any], kind: type[Worker] | None = None, absolute: Callable[[str], str] = os.path.abspath
) -> Options:
    """Check settings and handlers before anything is forked. With `kind`, for that class of workers."""
    if not servers:
        raise OptionError("serve() needs at least one server")
    for server in servers:
        if isinstance(server, _FORKING):
            raise OptionError(f"{type(server).__name__} has ForkingMixIn, which would reap the workers; leave it out")
        if server.fileno() < 0:
            raise OptionError("the server is closed; make a new one")
        if server.socket_type == socket.SOCK_STREAM and not _listens(server):
            raise OptionError("the server does not listen yet; call server_bind() and server_activate()")
    options = Options.of(servers[0], absolute)
    kind = kind or worker_class(options.worker_class)
    for server in servers:
        kind.check(server)
    return options


def _here() -> str:
    try:
        return os.getcwd()
    except FileNotFoundError:
        return ""


def _listens(server: Any) -> bool:
    if getattr(server, "_spent", False):
        return True  # it will be bound anew
    try:
        return bool(server.socket.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN))
    except (AttributeError, OSError):
        return True  # a system that does not tell


def worker_class(wanted: object) -> type[Worker]:
    """Resolve the setting `worker_class`: a class, a short name, an entry point's name, or `MODULE:NAME`."""
    found = wanted
    if isinstance(wanted, str):
        module, colon, name = reference(wanted).partition(":")
        if not (colon and module and name) or module.startswith("."):
            known = ", ".join(CLASSES)
            raise OptionError(
                f"worker_class: there is no {wanted!r}; use {known}, MODULE:NAME, or a name that an installed package "
                f"registers in the entry points {ENTRY_POINTS}"
            )
        try:
            own = module.startswith("prefork.") and module not in sys.modules
            with import_path.Own() if own else contextlib.nullcontext():
                found = importlib.import_module(module)
            for part in name.split("."):
                found = getattr(found, part)
        except OptionError:
            raise  # a class that says by itself what it needs
        except (ImportError, AttributeError) as error:
            raise OptionError(f"worker_class: {wanted!r} cannot be imported: {error}") from error
        except Exception as error:  # whatever a stranger's module does when it is imported; in one line
            why = " ".join(f"{type(error).__name__}: {error}".split())
            raise OptionError(f"worker_class: {wanted!r} cannot be imported: {why}") from error
    if not (isinstance(found, type) and issubclass(found, Worker)):
        raise OptionError(f"worker_class: {wanted!r} is no subclass of prefork.Worker")
    return found


def reference(name: str) -> str:
    """The `MODULE:NAME` that a short name stands for, be it ours or an entry point's; or what it was given."""
    if ":" in name or name in CLASSES:
        return CLASSES.get(name, name)
    with import_path.Own():
        from importlib.metadata import entry_points  # 20 ms, which only a foreign short name costs

    return next((one.value for one in entry_points(group=ENTRY_POINTS, name=name)), name)


# -- the pool behind one server, or several --------------------------------------------------------


def service_of(server: Any) -> "Service":
    """The server's pool, made on first use: a mix-in cannot count on its `__init__` being called."""
    if getattr(server, "worker", None) is not None:
        raise PreforkError("this is for the master; a worker can only ask to stop, by shutdown()")
    pool: Service = vars(server).setdefault("_pool", Service())
    return pool


class Hooks:
    """What the master calls in the program: the first server's methods."""

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


class Service:
    """Joins servers with a master, while there is one, and keeps socketserver's rules about `shutdown()`."""

    def __init__(self) -> None:
        self.stopped = threading.Event()
        self._stop_requested = False
        self._master: loop.Master | None = None
        self._detached: loop.Master | None = None  # whose drain is seen through by a thread of its own
        self._drains = False  # after `serve()`, in that thread
        self._thread = 0
        self._singles: list[worker_handle.WorkerHandle] = []
        self._patience = 0.0  # of the last one, in seconds
        self._board: scoreboard.Scoreboard | None = None
        self._lock = threading.Lock()

    @property
    def pids(self) -> set[int]:
        running = self._master
        return (running.pids if running else set()) | {handle.child.pid for handle in self._singles}

    def ask(self, what: Callable[[loop.Master], None]) -> None:
        """Order something of the master, if there is one."""
        with self._lock:
            if self._master is not None:
                what(self._master)

    def stop(self, *, detach: bool = False) -> None:
        with self._lock:
            self._stop_requested = True
            if self._master is not None:
                self._master.stop(detach=detach and self._master is not self._detached)

    def take_request(self) -> bool:
        """Whether a shutdown was asked for before the loop began."""
        asked, self._stop_requested = self._stop_requested, False
        return asked

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
        fresh = [renewed(server) for server in servers]
        sockets = []
        for server, sock in zip(servers, fresh, strict=True):
            one = listener.Listener(sock, held=getattr(server, "_held", False), claim=getattr(server, "_claim", None))
            # Alone, a listener is waited on by accept() itself; one of several must never block the others.
            one.open(blocking=len(servers) == 1)
            sockets.append(one)
            log.info("listening on %s", listener.describe(server.socket))

        def start(context: WorkerContext, unblock: Callable[[], None]) -> int:
            return lifecycle.main(
                context,
                lambda context: make_worker(worker_class(context.options.worker_class), servers, context),
                unblock,
            )

        hooks = Hooks(servers)
        title = " ".join(listener.describe(server.socket) for server in servers)
        absolute = functools.partial(os.path.join, _here())  # the program may change its directory while it serves
        running = loop.Master(
            sockets, options, start, hooks, title=title, settings=lambda: check(servers, absolute=absolute)
        )
        with self._lock:
            self._master = running
            if self._stop_requested:
                running.stop()
        try:
            running.run(poll_interval if hooks.ticks else None)
        except BaseException:
            # Not ours to handle, but nobody may be left behind by it.
            if running.pids:
                running.stop(Stop.KILL)
                running.run()
            raise
        finally:
            for server, one in zip(servers, sockets, strict=True):
                server._spent, server._held = one.spent, one.held
            if running.pids:
                with self._lock:
                    self._detached = running
                    running.stop()  # takes back an order to return early that came after the first
                # A thread sees the drain through. It is no daemon: the interpreter ends after it.
                threading.Thread(target=self._finish_drain, args=(running,), name="prefork-drain").start()
                self._drains = True
            else:
                self._finish(running)

    def _finish_drain(self, running: loop.Master) -> None:
        try:
            self._finish(running)
        finally:
            logs.end()

    def _finish(self, running: loop.Master) -> None:
        if running.pids:
            running.run()
        with self._lock:
            if self._master is running:
                self._master = None
        running.close()
        log.info("stopped")

    def close(self, block: bool) -> None:
        """See to it that no worker is left, or will be."""
        self.stop(detach=not block)
        if block and self._master is not None and self._thread != threading.get_ident():
            self.stopped.wait()
        if self._singles and block:
            self._drain_singles()
        elif self._singles:
            threading.Thread(target=self._drain_singles, name="prefork-drain").start()

    # -- one worker for one request --------------------------------------------------------------------------------

    def serve_single(self, server: Any, options: Options, request: Any, peer: Any) -> None:
        if self._board is None:
            self._board = scoreboard.Scoreboard()
        self._patience = options.graceful_timeout
        while len(self._singles) >= options.workers:
            _wait(self._singles, None)
            self.reap_singles()
        used = {handle.slot for handle in self._singles}
        slot = next(n for n in range(options.workers) if n not in used)

        def start(context: WorkerContext, unblock: Callable[[], None]) -> int:
            return lifecycle.main(context, lambda context: _single(server, context, request, peer), unblock)

        try:
            handle = worker_handle.launch(self._board, slot, 0, options, listener.describe(server.socket), start)
        except OSError as error:
            log.error("cannot start a worker: %s", error.strerror or error)
            server.handle_error(request, peer)
        else:
            self._singles.append(handle)
        finally:
            server.close_request(request)

    def _drain_singles(self) -> None:
        """Wait for those that still serve; whoever does at the end of `graceful_timeout` is killed."""
        end: float | None = time.monotonic() + self._patience
        while self._singles:
            _wait(self._singles, None if end is None else max(0.0, end - time.monotonic()))
            if end is not None and time.monotonic() >= end:
                end = None
                for handle in self._singles:
                    handle.child.send(signal.SIGKILL)
            self.reap_singles()

    def reap_singles(self) -> None:
        for handle in list(self._singles):
            ended = handle.child.reap()
            if ended is None or self._board is None:
                continue
            handle.link.read()
            status, memory = ended
            reason = Reason.STOPPED if status == 0 else Reason.EXITED
            now = time.monotonic()
            report = handle.report(self._board.read(handle.slot, now), reason, status, memory, now)
            if status:
                worker_handle.log_exit(report)
            self._singles.remove(handle)
            handle.release()


def _wait(handles: Sequence[worker_handle.WorkerHandle], timeout: float | None) -> None:
    """Until one of the workers has closed its uplink, as each does at the latest when it ends."""
    if handles:
        poll = select.poll()
        for handle in handles:
            if handle.child.pidfd is not None:
                poll.register(handle.child.pidfd, select.POLLIN)
            else:
                poll.register(handle.link.fd, 0)  # its end only; what it said is not read here
        poll.poll(None if timeout is None else timeout * 1000)


def renewed(server: Any) -> socket.socket:
    """The server's listener. A Unix socket that a former stop has shut down for good is bound anew on the same path."""
    if getattr(server, "_spent", False):
        server._spent = False
        server.socket.close()
        server._unclaim()
        server.socket = socket.socket(server.address_family, server.socket_type)
        server.server_bind()
        server.server_activate()
    found: socket.socket = server.socket
    return found


def make_worker(kind: type[Worker], servers: Sequence[Any], context: WorkerContext) -> Worker:
    """In the child: a worker around its own copy of the servers."""
    logs.enter_child()  # again: a program may have closed some when it was imported
    worker = kind(servers, context)
    for server in servers:
        server.worker, server._pool = worker, None
    return worker


class _Single(SyncWorker):
    """Serves the one request that it was forked with."""

    request: tuple[Any, Any]

    def run(self) -> None:
        server: Any = self.server
        if server.socket_type == socket.SOCK_STREAM:
            server.socket.close()
        dispatch.follow(self, server)
        self.serve_request(server, *self.request)
        self.finish()

    def drain(self) -> None:
        """It leaves when the request is done, as it would have anyway."""


def _single(server: Any, context: WorkerContext, request: Any, peer: Any) -> Worker:
    worker = make_worker(_Single, [server], context)
    assert isinstance(worker, _Single)
    worker.request = request, peer
    return worker

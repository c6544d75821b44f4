"""The face: `PreforkMixIn`, four servers, `serve()`.

The mix-in keeps socketserver's contract. What it changes is who serves: `serve_forever()` runs the master, and the chain of
`get_request`, `verify_request`, `process_request`, `finish_request`, `shutdown_request`, `handle_error` runs in the workers, on their own
copy of the server.
"""

import importlib
import logging
import os
import select
import selectors
import socket
import socketserver
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import prefork.lifeline as lifeline
import prefork.listeners as listeners
import prefork.master as master
import prefork.scoreboard as scoreboard
import prefork.stderr as stderr
import prefork.workers.base as base
from prefork.errors import OptionError
from prefork.options import Options, Settings
from prefork.reports import Reason, WorkerExit
from prefork.states import Stop
from prefork.workers.base import Seat, Worker
from prefork.workers.sync import SyncWorker

log = logging.getLogger("prefork")

CLASSES = {"sync": "prefork.workers.sync:SyncWorker"}


class PreforkMixIn(Settings):
    """Put it in front of any `socketserver` server: `class S(PreforkMixIn, TCPServer)`. Settings are class attributes.

    For the caller
    --------------
    serve_forever(), shutdown(), handle_request(), server_close(), fileno(), reload(), scale(n), active_children

    May be overridden, and runs in the master
    -----------------------------------------
    server_bind(), server_activate(), service_actions(), handle_timeout(), worker_exited(report)

    May be overridden, and runs in the worker
    -----------------------------------------
    get_request(), verify_request(), process_request(), finish_request(), shutdown_request(), close_request(), handle_error()

    Two defaults are not socketserver's own, whose backlog of 5 makes 200 simultaneous clients wait for up to 7.65 s, and whose
    servers cannot bind again for a minute after a crash.
    """

    request_queue_size = 1024
    allow_reuse_address = True

    # Of socketserver's BaseServer, for the type checker.
    address_family: int
    socket_type: int
    socket: socket.socket
    server_address: Any
    RequestHandlerClass: Callable[..., Any]
    timeout: float | None
    get_request: Callable[[], tuple[Any, Any]]

    _pool: "_Pool | None" = None
    _claim: listeners.Claim | None = None
    _worker: Worker | None = None

    # -- construction -----------------------------------------------------------------------------------------------------

    def server_bind(self) -> None:
        """Bind as the server's class says. A Unix path is claimed first, and its file made with `unix_mode`.

        Raises
        ------
        OSError
            EADDRINUSE, also where another server lives on the Unix path; EACCES, ...
        """
        path = self.server_address
        if self.address_family != socket.AF_UNIX or not path or path[:1] in ("\0", b"\0"):
            super().server_bind()  # type: ignore[misc]
            return
        self._claim = listeners.Claim(os.fsdecode(path), self.socket_type)
        try:
            with listeners.permissions(Options.of(self).unix_mode):
                super().server_bind()  # type: ignore[misc]
            self._claim.bound()
        except BaseException:
            self._unclaim()
            raise

    def _unclaim(self) -> None:
        if self._claim is not None:
            self._claim.release()
            self._claim = None

    # -- for the caller -----------------------------------------------------------------------------------------------------

    def serve_forever(self, poll_interval: float = 0.5) -> None:
        """Serve from a pool of workers until `shutdown()` or a signal ends it. Workers are forked here, not earlier.

        On the main thread the signals of `docs/signals.md` are taken over for the time of the call. `poll_interval` is the
        seconds between two calls of `service_actions()`; where that is not overridden, nothing wakes up for it.

        Raises
        ------
        OptionError
            A setting or the handler does not fit.
        BootError
            No worker of the first generation became ready.
        """
        serve(self, poll_interval=poll_interval)  # type: ignore[arg-type]

    def shutdown(self) -> None:
        """Stop gracefully and wait until `serve_forever()` has returned. For another thread, also before the loop starts.

        In a worker it asks the master to stop the pool, and returns at once.
        """
        if self._worker is not None:
            self._worker._uplink.say(lifeline.STOP)
            return
        pool = _pool_of(self)
        pool.stop(detach=not self.block_on_close)
        pool.stopped.wait()

    def reload(self) -> None:
        """Replace every worker by one of a new generation; from any thread. Returns at once."""
        _pool_of(self).ask(lambda m: m.reload())

    def scale(self, workers: int) -> None:
        """Change the number of workers; from any thread. Returns at once.

        Raises
        ------
        OptionError
            as for the setting `workers`.
        """
        size = Options({"workers": workers}).workers
        _pool_of(self).ask(lambda m: m.scale(size))

    @property
    def active_children(self) -> set[int]:
        """Pids of the worker processes."""
        return set() if self._pool is None else self._pool.pids

    def server_close(self) -> None:
        """Close the listener. Workers that are still there are drained: with `block_on_close` until they are gone (at most
        `graceful_timeout`, then they are killed), else in the background."""
        if self._worker is None and self._pool is not None:
            self._pool.close(self.block_on_close)
        if self._claim is not None and self._worker is None:
            self._unclaim()
        super().server_close()  # type: ignore[misc]

    def handle_request(self) -> None:
        """Wait at most `timeout` seconds for one request and have one new worker serve it; at most `workers` at once.

        If none comes, `handle_timeout()` is called.
        """
        pool = _pool_of(self)
        options = check([self])
        pool.reap_singles()
        timeout = self.socket.gettimeout()
        if timeout is None:
            timeout = self.timeout
        elif self.timeout is not None:
            timeout = min(timeout, self.timeout)
        deadline = None if timeout is None else time.monotonic() + timeout
        with selectors.DefaultSelector() as selector:
            selector.register(self.socket, selectors.EVENT_READ)
            while True:
                left = None if deadline is None else max(0.0, deadline - time.monotonic())
                if selector.select(left):
                    break
                if deadline is not None and time.monotonic() >= deadline:
                    self.handle_timeout()
                    return
        try:
            request, peer = self.get_request()
        except OSError:
            return
        pool.serve_single(self, options, request, peer)

    def handle_timeout(self) -> None:
        """No request came: collect the workers that are done."""
        _pool_of(self).reap_singles()

    def worker_exited(self, report: WorkerExit) -> None:
        """A worker was reaped. Runs in the master; what it raises is logged."""


class PreforkTCPServer(PreforkMixIn, socketserver.TCPServer):
    """TCP. For IPv6 set `address_family = socket.AF_INET6`."""


class PreforkUDPServer(PreforkMixIn, socketserver.UDPServer):
    """UDP: each datagram is a request."""


class PreforkUnixStreamServer(PreforkMixIn, socketserver.UnixStreamServer):
    """Unix stream sockets; the file belongs to the server for as long as it exists."""


class PreforkUnixDatagramServer(PreforkMixIn, socketserver.UnixDatagramServer):
    """Unix datagram sockets."""


def serve(*servers: socketserver.BaseServer, poll_interval: float = 0.5) -> None:
    """Serve several servers from one pool: each worker accepts from all of them. Settings are those of the first.

    Raises
    ------
    OptionError, BootError
        as `serve_forever()` does.
    """
    options = check(servers)
    pool = _Pool() if len(servers) > 1 else _pool_of(servers[0])
    former = [vars(server).get("_pool") for server in servers]
    asked = any(one is not None and one.take_request() for one in former)
    for server in servers:
        server._pool = pool  # type: ignore[attr-defined]
    pool.serve(servers, options, poll_interval, stop_at_once=asked)


def check(servers: Sequence[Any]) -> Options:
    """Check settings and handlers before anything is forked."""
    if not servers:
        raise OptionError("serve() needs at least one server")
    for server in servers:
        handler = getattr(server, "RequestHandlerClass", None)
        check_handler(handler, server.socket_type)
        if server.fileno() < 0:
            raise OptionError("the server is closed; make a new one")
    options = Options.of(servers[0])
    worker_class(options.worker_class)
    return options


def check_handler(handler: object, socket_type: int) -> None:
    """Raises OptionError for a handler that is none, or not for this kind of socket."""
    if not callable(handler):
        raise OptionError(
            f"RequestHandlerClass: {handler!r} is no handler; pass a subclass of socketserver.BaseRequestHandler"
        )
    if isinstance(handler, type):
        stream = issubclass(handler, socketserver.StreamRequestHandler)
        datagram = issubclass(handler, socketserver.DatagramRequestHandler)
        if stream and socket_type == socket.SOCK_DGRAM:
            raise OptionError(
                f"RequestHandlerClass: {handler.__name__} handles streams, the server takes datagrams; "
                "use DatagramRequestHandler or bind a stream address"
            )
        if datagram and socket_type == socket.SOCK_STREAM:
            raise OptionError(
                f"RequestHandlerClass: {handler.__name__} handles datagrams, the server takes streams; "
                "use StreamRequestHandler or bind a datagram address"
            )


def worker_class(wanted: object) -> type[Worker]:
    """Resolve the setting `worker_class`: a class, a short name, or `MODULE:NAME`."""
    found = wanted
    if isinstance(wanted, str):
        module, colon, name = CLASSES.get(wanted, wanted).partition(":")
        if not colon:
            known = ", ".join(sorted(CLASSES))
            raise OptionError(f"worker_class: there is no {wanted!r}; use {known}, or MODULE:NAME")
        try:
            found = getattr(importlib.import_module(module), name)
        except (ImportError, AttributeError) as error:
            raise OptionError(f"worker_class: {wanted!r} cannot be imported: {error}") from error
    if not (isinstance(found, type) and issubclass(found, Worker)):
        raise OptionError(f"worker_class: {wanted!r} is no subclass of prefork.Worker")
    return found


# -- the pool behind one server, or several ---------------------------------------------------------------------------------


def _pool_of(server: Any) -> "_Pool":
    """The server's pool, made on first use: a mix-in cannot count on its `__init__` being called."""
    pool: _Pool = vars(server).setdefault("_pool", _Pool())
    return pool


class _Hooks:
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


class _Pool:
    """Joins servers with a master, while there is one, and keeps socketserver's rules about `shutdown()`."""

    def __init__(self) -> None:
        self.stopped = threading.Event()
        self._stop_requested = False
        self._master: master.Master | None = None
        self._thread = 0
        self._singles: list[master.Hand] = []
        self._board: scoreboard.Scoreboard | None = None
        self._lock = threading.Lock()

    @property
    def pids(self) -> set[int]:
        running = self._master
        return (running.pids if running else set()) | {hand.child.pid for hand in self._singles}

    def ask(self, what: Callable[[master.Master], None]) -> None:
        """Order something of the master, if there is one."""
        with self._lock:
            if self._master is not None:
                what(self._master)

    def stop(self, *, detach: bool = False) -> None:
        with self._lock:
            self._stop_requested = True
            if self._master is not None:
                self._master.stop(detach=detach)

    def take_request(self) -> bool:
        """Whether a shutdown was asked for before the loop began."""
        asked, self._stop_requested = self._stop_requested, False
        return asked

    def serve(self, servers: Sequence[Any], options: Options, poll_interval: float, *, stop_at_once: bool) -> None:
        self.stopped.clear()
        self._thread = threading.get_ident()
        handler: stderr.Handler | None = None
        try:
            if stop_at_once:
                return
            if not log.hasHandlers():
                # logging's own last resort writes to stderr and may block for ever there.
                handler = stderr.Handler(stderr.Writer())
                handler.setLevel(logging.WARNING)
                log.addHandler(handler)
            self._serve(servers, options, poll_interval)
        finally:
            if handler is not None:
                log.removeHandler(handler)
                handler.writer.close()
            self._stop_requested = False
            self.stopped.set()

    def _serve(self, servers: Sequence[Any], options: Options, poll_interval: float) -> None:
        kind = worker_class(options.worker_class)
        sockets = []
        for server in servers:
            one = listeners.Listener(_renewed(server))
            # Alone, a listener is waited on by accept() itself; one of several must never block the others.
            one.open(blocking=len(servers) == 1)
            sockets.append(one)
            log.info("listening on %s", listeners.describe(server.socket))

        def start(seat: Seat, unblock: Callable[[], None]) -> int:
            return base.main(seat, lambda seat: seated(kind, servers, seat), unblock)

        hooks = _Hooks(servers)
        title = " ".join(listeners.describe(server.socket) for server in servers)
        running = master.Master(sockets, options, start, hooks, title=title)
        with self._lock:
            self._master = running
            if self._stop_requested:
                running.stop()
        try:
            running.run(poll_interval if hooks.ticks else None)
        except BaseException:
            # Not ours to handle, but nobody may be left behind by it.
            running.stop(Stop.KILL)
            running.run()
            raise
        finally:
            for server, one in zip(servers, sockets, strict=True):
                server._spent = one.spent
            if running.pids:
                # A thread sees the drain through. It is no daemon: the interpreter ends after it.
                threading.Thread(target=self._finish, args=(running,), name="prefork-drain").start()
            else:
                self._finish(running)

    def _finish(self, running: master.Master) -> None:
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
        while self._singles and block:
            self.reap_singles()
            _wait(self._singles, None)

    # -- one worker for one request ---------------------------------------------------------------------------------------------

    def serve_single(self, server: Any, options: Options, request: Any, peer: Any) -> None:
        if self._board is None:
            self._board = scoreboard.Scoreboard()
        while len(self._singles) >= options.workers:
            _wait(self._singles, None)
            self.reap_singles()
        used = {hand.slot for hand in self._singles}
        slot = next(n for n in range(options.workers) if n not in used)

        def start(seat: Seat, unblock: Callable[[], None]) -> int:
            return base.main(seat, lambda seat: _single(server, seat, request, peer), unblock)

        try:
            hand = master.launch(self._board, slot, 0, options, listeners.describe(server.socket), start)
        except OSError as error:
            log.error("cannot start a worker: %s", error.strerror or error)
            server.handle_error(request, peer)
        else:
            self._singles.append(hand)
        finally:
            server.close_request(request)

    def reap_singles(self) -> None:
        for hand in list(self._singles):
            ended = hand.child.reap()
            if ended is None or self._board is None:
                continue
            hand.link.read()
            status, memory = ended
            reason = Reason.STOPPED if status == 0 else Reason.EXITED
            report = master.report_of(hand, self._board, reason, status, memory)
            if status:
                master.log_exit(report)
            self._singles.remove(hand)
            hand.release()


def _wait(hands: Sequence[master.Hand], timeout: float | None) -> None:
    """Until one of the workers has closed its uplink, as each does at the latest when it ends."""
    if hands:
        poll = select.poll()
        for hand in hands:
            poll.register(hand.child.pidfd if hand.child.pidfd is not None else hand.link.fd, select.POLLIN)
        poll.poll(None if timeout is None else timeout * 1000)


def _renewed(server: Any) -> socket.socket:
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


def seated(kind: type[Worker], servers: Sequence[Any], seat: Seat) -> Worker:
    """In the child: a worker around its own copy of the servers."""
    worker = kind(servers, seat)
    for server in servers:
        server._worker, server._pool = worker, None
    return worker


class _Single(SyncWorker):
    """Serves the one request that it was forked with."""

    request: tuple[Any, Any]

    def run(self) -> None:
        server: Any = self.server
        if server.socket_type == socket.SOCK_STREAM:
            server.socket.close()
        self.serve_single(server, *self.request)

    def drain(self) -> None:
        """It leaves when the request is done, as it would have anyway."""


def _single(server: Any, seat: Seat, request: Any, peer: Any) -> Worker:
    worker = seated(_Single, [server], seat)
    assert isinstance(worker, _Single)
    worker.request = request, peer
    return worker

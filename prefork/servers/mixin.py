"""`PreforkMixIn`, and the four servers of `socketserver` with it.

The mix-in keeps socketserver's contract, and gives the serving to others: `serve_forever()` runs the master, and the
chain of `get_request`, `verify_request`, `process_request`, `finish_request`, `shutdown_request`, `handle_error` runs
in the workers, on their own copy of the server.
"""

import contextlib
import os
import socket
import socketserver
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import prefork.kernel.logs as logs
import prefork.kernel.standard_streams as standard_streams
import prefork.kernel.unix_path as unix_path
import prefork.workers.client_errors as client_errors
from prefork.rules.worker_exit import WorkerExit
from prefork.servers.runner import ServerPool, pool_of, serve
from prefork.settings.settings import Options, Settings
from prefork.workers.worker import Worker

log = logs.get("prefork")

_SHOWS = socketserver.BaseServer.handle_error  # a traceback between two lines


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
    get_request(), verify_request(), process_request(), finish_request(), shutdown_request(), close_request(),
    handle_error()

    Two defaults are not socketserver's own, whose backlog of 5 makes 200 simultaneous clients wait for up to 7.65 s,
    and whose servers cannot bind again for a minute after a crash.
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

    _pool: ServerPool | None = None
    _claim: unix_path.Claim | None = None
    worker: Worker | None = None  # in a worker: itself, for `self.server.worker.extend_deadline()` in a handler
    _spent = False  # the listener was shut down for good by a stop (Unix), and is to be bound anew
    _held = False  # it still has a stop's filter

    # -- construction ----------------------------------------------------------------------------------------------

    def server_bind(self) -> None:
        """Bind as the server's class says. A Unix path is claimed first, and its file made with `unix_mode`, for
        `unix_group`.

        Raises
        ------
        OSError
            EADDRINUSE, also where another server lives on the Unix path; EACCES, ...
        OptionError
            There is no such group.
        """
        if self.socket_type == socket.SOCK_DGRAM and _declares(type(self), "allow_reuse_address") is PreforkMixIn:
            # To datagrams the option means something else: a second server may take the address, and the traffic.
            self.allow_reuse_address = False
        path = self.server_address
        if self.address_family != socket.AF_UNIX or not path or path[:1] in ("\0", b"\0"):
            super().server_bind()  # type: ignore[misc]
            return
        options = Options.of(self)
        group = unix_path.group_id(options.unix_group)
        mode = options.unix_mode
        if mode is None:
            mode = 0o600 if group is None else 0o660
        self._claim = unix_path.Claim(os.fsdecode(path), self.socket_type)
        try:
            with unix_path.permissions(mode if group is None else mode & 0o700):  # the rest is for that group
                super().server_bind()  # type: ignore[misc]
            self._claim.bound()
            if group is not None:
                self._claim.give(group, mode)
        except BaseException:
            with contextlib.suppress(OSError):
                if self.socket.getsockname():  # what failed came after the bind
                    self._claim.bound()
            self._unclaim()
            raise

    def _unclaim(self) -> None:
        if self._claim is not None:
            self._claim.release()
            self._claim = None

    # -- in a worker -----------------------------------------------------------------------------------------------

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Serving a request has raised: its traceback goes to standard error, as in socketserver.

        Where the reason is that the client has left, there is a line of the log (debug) instead, or errors would drown
        in these. A `handle_error()` of the program's own, in a subclass or a class behind the mix-in, is called in both
        cases.
        """
        show = super().handle_error  # type: ignore[misc]
        error = sys.exception()
        if getattr(show, "__func__", None) is _SHOWS and client_errors.is_clients(request, error):
            log.debug("client %s disconnected during its request: %s [PF0612]", client_address or "(unnamed)", error)
        else:
            show(request, client_address)

    # -- for the caller --------------------------------------------------------------------------------------------

    def serve_forever(self, poll_interval: float = 0.5) -> None:
        """Serve from a pool of workers until `shutdown()` or a signal ends it. Workers are forked here, not earlier.

        On the main thread the signals of `docs/reference/signals.md` are taken over for the time of the call.
        `poll_interval` is the seconds between two calls of `service_actions()`; where that is not overridden,
        nothing wakes up for it.

        Raises
        ------
        OptionError
            A setting or the handler does not fit.
        BootError
            No worker of the first generation became ready.
        """
        serve(self, poll_interval=poll_interval)  # type: ignore[arg-type]

    def shutdown(self) -> None:
        """Stop gracefully and wait until `serve_forever()` has returned. For another thread, also before the loop
        starts.

        In a worker it asks the master to stop the pool, and returns at once.
        """
        if self.worker is not None:
            self.worker._ask_to_stop()
            return
        pool = pool_of(self)
        pool.stop(detach=not self.block_on_close)
        pool.stopped.wait()

    def reload(self) -> None:
        """Replace every worker by one of a new generation; from any thread. Returns at once."""
        pool_of(self).order(lambda master: master.reload())

    def scale(self, workers: int) -> None:
        """Change the number of workers; from any thread. Returns at once.

        Raises
        ------
        OptionError
            as for the setting `workers`.
        """
        size = Options({"workers": workers}).workers
        pool_of(self).order(lambda master: master.scale(size))

    @property
    def active_children(self) -> set[int]:
        """Pids of the worker processes."""
        return set() if self._pool is None else self._pool.pids

    def server_close(self) -> None:
        """Close the listener. Workers that are still there are drained: with `block_on_close` until they are gone (at
        most `graceful_timeout`, then they are killed), else in the background."""
        if self.worker is None and self._pool is not None:
            self._pool.close(self.block_on_close)
        if self._claim is not None and self.worker is None:
            self._unclaim()
        with contextlib.suppress(OSError):  # of close(2): the descriptor is gone whatever it says
            self.socket.close()
        super().server_close()  # type: ignore[misc]

    def handle_request(self) -> None:
        """Wait at most `timeout` seconds for one request and have one new worker serve it; at most `workers` at once.

        If none comes, `handle_timeout()` is called.
        """
        standard_streams.fill()
        pool_of(self).singles.handle_request(self)

    def handle_timeout(self) -> None:
        """No request came: collect the workers that are done."""
        pool_of(self).singles.reap()

    def worker_exited(self, report: WorkerExit) -> None:
        """A worker was reaped. Runs in the master; what it raises is logged."""


def _declares(kind: type, name: str) -> type | None:
    """The class from which `kind` has an attribute."""
    return next((base for base in kind.__mro__ if name in vars(base)), None)


if TYPE_CHECKING:

    class _PreforkServer(PreforkMixIn):
        """What may stand in the place of a handler depends on the class of workers."""

        def __init__(
            self, server_address: Any, RequestHandlerClass: Callable[..., Any], bind_and_activate: bool = True
        ) -> None: ...
else:
    _PreforkServer = PreforkMixIn


class PreforkTCPServer(_PreforkServer, socketserver.TCPServer):
    """TCP. For IPv6 set `address_family = socket.AF_INET6`."""


class PreforkUDPServer(_PreforkServer, socketserver.UDPServer):
    """UDP: each datagram is a request."""


class PreforkUnixStreamServer(_PreforkServer, socketserver.UnixStreamServer):
    """Unix stream sockets; the file belongs to the server for as long as it exists."""


class PreforkUnixDatagramServer(_PreforkServer, socketserver.UnixDatagramServer):
    """Unix datagram sockets."""

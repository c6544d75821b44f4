"""`handle_request()`: one new worker for one request, without a master.

The caller's process waits for a request and accepts it, and forks a worker that serves it. It reaps these workers when
it is called again, when no request comes in time, and when the server is closed.
"""

import select
import selectors
import signal
import socket
import time
from collections.abc import Callable
from typing import Any

import prefork.kernel.logs as logs
import prefork.link.scoreboard as scoreboard
import prefork.master.reaper as reaper
import prefork.master.worker_handle as worker_handle
import prefork.servers.server_checks as server_checks
import prefork.servers.worker_class as worker_class
import prefork.workers.intake.dispatch as dispatch
import prefork.workers.lifecycle as lifecycle
from prefork.errors import OptionError
from prefork.kernel.listener import describe
from prefork.link.worker_context import WorkerContext
from prefork.rules.worker_exit import Reason
from prefork.settings.settings import Options
from prefork.workers.handlers.sync import SyncWorker
from prefork.workers.worker import Worker

log = logs.get("prefork")


class SingleWorkers:
    """The workers of one server that serve one request each."""

    def __init__(self) -> None:
        self._handles: list[worker_handle.WorkerHandle] = []
        self._graceful_timeout = 0.0  # of the last worker, in seconds
        self._board: scoreboard.Scoreboard | None = None

    def __bool__(self) -> bool:
        return bool(self._handles)

    @property
    def pids(self) -> set[int]:
        return {handle.child.pid for handle in self._handles}

    def handle_request(self, server: Any) -> None:
        """Wait at most `timeout` seconds for one request, and fork a worker that serves it."""
        if worker_class.resolve(server.worker_class).application:
            raise OptionError(
                "handle_request() serves handlers; an application is served by serve_forever()", code="PF0106"
            )
        # SyncWorker serves single requests, whatever the pool's worker_class is.
        options = server_checks.prepare([server], SyncWorker, mend="patch in the worker")
        self.reap()
        if server._spent or server._held:
            listener = server_checks.listener_of(server)
            listener.open(blocking=True)
            listener.close()
            server._held = False
        if not _wait_for_request(server):
            server.handle_timeout()
            return
        # The handshake is the worker's: a client that is silent in it must not hold the caller.
        deferred = dispatch.defer_handshake(server)
        try:
            request, peer = server.get_request()
        except OSError:
            return
        finally:
            if deferred:
                server.socket.do_handshake_on_connect = True
        self._serve(server, options, request, peer)

    def _serve(self, server: Any, options: Options, request: Any, peer: Any) -> None:
        if self._board is None:
            self._board = scoreboard.Scoreboard()
        self._graceful_timeout = options.graceful_timeout
        while len(self._handles) >= options.workers:
            self._wait_for_exit(None)
            self.reap()
        used = {handle.slot for handle in self._handles}
        slot = next(number for number in range(options.workers) if number not in used)

        def make(context: WorkerContext) -> Worker:
            worker = worker_class.make_worker(_SingleWorker, [server], context)
            worker.request = request, peer
            return worker

        def start(context: WorkerContext, unblock: Callable[[], None]) -> int:
            return lifecycle.main(context, make, unblock)

        try:
            handle = worker_handle.launch(self._board, slot, 0, options, describe(server.socket), start)
        except OSError as error:
            log.error("no worker can be started: %s; this request is not served [PF0407]", error.strerror or error)
            server.handle_error(request, peer)
        else:
            self._handles.append(handle)
        finally:
            server.close_request(request)

    def drain(self) -> None:
        """Wait for those that still serve. At the end of `graceful_timeout` they are killed."""
        end: float | None = time.monotonic() + self._graceful_timeout
        while self._handles:
            self._wait_for_exit(None if end is None else max(0.0, end - time.monotonic()))
            if end is not None and time.monotonic() >= end:
                end = None
                for handle in self._handles:
                    handle.child.send(signal.SIGKILL)
            self.reap()

    def reap(self) -> None:
        """Collect those that have ended."""
        for handle in list(self._handles):
            ended = handle.child.reap()
            if ended is None or self._board is None:
                continue
            handle.link.read()
            status, memory = ended
            reason = Reason.STOPPED if status == 0 else Reason.EXITED
            now = time.monotonic()
            report = reaper.report_of(handle, self._board.read(handle.slot, now), reason, status, memory, now)
            if status:
                reaper.log_exit(report)
            self._handles.remove(handle)
            handle.release()

    def _wait_for_exit(self, timeout: float | None) -> None:
        """Until a worker has ended, or closed its uplink where the kernel has no pidfd."""
        poll = select.poll()
        for handle in self._handles:
            if handle.child.pidfd is not None:
                poll.register(handle.child.pidfd, select.POLLIN)
            else:
                poll.register(handle.link.fd, 0)  # its end only; what it said is not read here
        poll.poll(None if timeout is None else timeout * 1000)


def _wait_for_request(server: Any) -> bool:
    """Whether a request comes within the server's timeout, or that of its socket."""
    limits = [limit for limit in (server.socket.gettimeout(), server.timeout) if limit is not None]
    deadline = time.monotonic() + min(limits) if limits else None
    with selectors.DefaultSelector() as selector:
        selector.register(server.socket, selectors.EVENT_READ)
        while True:
            if selector.select(None if deadline is None else max(0.0, deadline - time.monotonic())):
                return True
            if deadline is not None and time.monotonic() >= deadline:
                return False


class _SingleWorker(SyncWorker):
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

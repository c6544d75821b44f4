"""What the classes with an event loop have in common: the loop, and requests that it ends by itself.

As long as the loop turns, a timer of the loop cancels a request past its deadline. The master acts only where the loop
does not turn any more.
"""

import asyncio
import concurrent.futures.thread  # noqa: F401  # asyncio imports it when a first call goes to a thread
import functools
import socket
import ssl
from collections.abc import Callable
from time import monotonic
from typing import Any

import prefork.kernel.logs as logs
from prefork.errors import RequestTimeout
from prefork.kernel.unpatched import refuse_patched
from prefork.rules.worker_exit import REQUEST_GOES_ON
from prefork.workers.active_requests import ActiveRequest, UntimedRequest
from prefork.workers.intake.acceptor import RESOURCE_ERRORS
from prefork.workers.intake.balance import ConnectionBalancer
from prefork.workers.worker import Worker

try:
    import uvloop
except ImportError:
    uvloop = None  # type: ignore[assignment]

log = logs.get("prefork")
logs.get("asyncio")  # on which a loop reports what its callbacks raise

TURN = 0.02  # seconds between two looks of a worker that leaves
CLEANUP = 2.0  # seconds that a request has for its `finally` blocks once it was interrupted
HANDSHAKE = 10.0  # seconds that a client has for the beginning of TLS
SHUTDOWN = 5.0  # seconds that it has for the end of TLS: without an answer it delays its connection's end, and a stop
_EARLY = 0.002  # seconds by which a timer may ring before it is due: uvloop counts in milliseconds


class TaskRequest(ActiveRequest):
    """A request that a task has in progress. Past its deadline the task is cancelled, and the `with` block makes a
    RequestTimeout of that.

    An extension does not set the timer anew: when the timer rings it looks whether the request is due. The deadline on
    the scoreboard is always `slack` later than that of the timer.
    """

    __slots__ = ("_due", "_loop", "_seconds", "_set_for", "_task", "_timer", "_worker", "interrupted")

    def __init__(self, worker: "LoopWorker", peer: object, seconds: float) -> None:
        super().__init__(worker._requests, peer, seconds + worker.slack)
        self._worker, self._loop, self._seconds = worker, worker.loop, seconds
        self._task: asyncio.Task[Any] | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._due = self._set_for = 0.0
        self.interrupted = 0  # how often

    def __enter__(self) -> "TaskRequest":
        super().__enter__()
        self._task = asyncio.current_task()
        self._due = self._set_for = self.start + self._seconds
        self._timer = self._loop.call_later(self._seconds, self._ring)
        return self

    def __exit__(self, *error: Any) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        super().__exit__(*error)
        if self.interrupted and self._task is not None:
            for _ in range(self.interrupted):
                left = self._task.uncancel()
            if not left and isinstance(error[1], asyncio.CancelledError):
                # The traceback of the cancellation shows where the request stood.
                raise RequestTimeout(f"the request took longer than {self._seconds:g} s") from error[1]

    def extend_deadline(self, seconds: float) -> None:
        """Give it `seconds` from now; from any thread. Where it has no deadline there is nothing to extend."""
        if self._timer is not None:
            self._due = monotonic() + seconds
            if self._due < self._set_for:
                self._loop.call_soon_threadsafe(self._set)

    def _set(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            seconds = max(0.0, self._due - monotonic())
            self._set_for = self._due
            self._timer = self._loop.call_later(seconds, self._ring)
            super().extend_deadline(seconds + self._worker.slack)

    def _ring(self) -> None:
        if self._due - monotonic() < _EARLY:
            if self.interrupted == 1:
                self._worker.stubborn(self)
            self.interrupted += 1
            assert self._task is not None
            self._task.cancel()
            self._due = monotonic() + CLEANUP
        self._set()


class LoopWorker(Worker):
    """A worker whose requests are tasks of one event loop.

    May be overridden, beside what `Worker` says
    --------------------------------------------
    new_loop()
        The event loop, made when it is first asked for, which is after the fork.
    stubborn(request)
        A request goes on though it was interrupted.
    """

    slack = 1.0  # a loop that has not turned for so long when a request is due is hung

    @classmethod
    def check(cls, server: Any) -> None:
        refuse_patched(("select", "threading"), "asyncio", "leave the patch out, or take worker_class sync or wsgi")

    def new_loop(self) -> asyncio.AbstractEventLoop:
        """Make the event loop: uvloop's, or asyncio's own where that is not installed."""
        return asyncio.SelectorEventLoop() if uvloop is None else uvloop.new_event_loop()

    @functools.cached_property
    def _runner(self) -> asyncio.Runner:
        return asyncio.Runner(loop_factory=self.new_loop)

    @functools.cached_property
    def loop(self) -> asyncio.AbstractEventLoop:
        loop = self._runner.get_loop()
        if loop.get_exception_handler() is None:
            loop.set_exception_handler(self._on_fault)
        return loop

    def _on_fault(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        """A callback of the loop has raised. In asyncio's own loop its epoll may have no room for one more connection:
        nobody would ever hear of that connection again. (uvloop leaves all of it to libuv.)"""
        error, callback = context.get("exception"), getattr(context.get("handle"), "_callback", None)
        transport, acceptor = getattr(callback, "__self__", None), self._acceptor
        is_full = isinstance(error, OSError) and error.errno in RESOURCE_ERRORS
        if acceptor is not None and isinstance(transport, asyncio.Transport) and is_full:
            acceptor.say_full(context["exception"], "watch another connection", "it closes that connection")
            transport.abort()
        else:
            loop.default_exception_handler(context)

    @functools.cached_property
    def balancer(self) -> ConnectionBalancer:
        """What this worker has of what the pool holds."""
        return ConnectionBalancer(self.acceptor.fds, self.servers, self._requests)

    def expired(self) -> None:
        """The loop has not turned for `slack` seconds after a request was due. An exception from here might hit another
        request, or the loop itself: the master kills this worker, and its report shows where it stands."""

    def stubborn(self, request: TaskRequest) -> None:
        """A request goes on though it was interrupted `CLEANUP` seconds ago: it waits for a thread, or ignores the
        interrupt. It is interrupted again and again, and the worker is replaced: otherwise the memory of the request
        and its place among `max_connections` would not come back."""
        log.warning(
            "%s: a request from %s goes on after its RequestTimeout; the worker is replaced [PF0602]",
            self.log_name,
            request.peer,
        )
        self.recycle(REQUEST_GOES_ON)

    def serving(self, peer: object = "", timeout: float | None = None) -> ActiveRequest:
        """Around one request of the running task, so in the loop's thread. RequestTimeout is what comes out of the
        `with` block."""
        seconds = (self.options.request_timeout or 0.0) if timeout is None else timeout
        return TaskRequest(self, peer, seconds) if seconds else self._untimed(peer)

    @functools.cached_property
    def _untimed(self) -> Callable[[object], UntimedRequest]:
        """What `serving(peer, 0.0)` calls."""
        return self._requests.untimed


def bared(server: Any) -> dict[str, Any]:
    """What transports of a TLS listener need; it then accepts as a plain one, for the loop does the handshake."""
    listener = server.socket
    if not isinstance(listener, ssl.SSLSocket):
        return {}
    context = listener.context
    server.socket = socket.socket(listener.family, listener.type, listener.proto, listener.detach())
    return {"ssl": context, "ssl_handshake_timeout": HANDSHAKE, "ssl_shutdown_timeout": SHUTDOWN}

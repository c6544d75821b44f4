"""The shipped worker for ASGI applications: uvicorn's protocols in an event loop of the worker's own.

A lifespan starts before the worker is ready. So a lifespan that fails is a boot failure, and the old generation serves
on. It ends when no request is in progress any more.

A worker that leaves closes no connection on which a request may be on its way. Replies say that they are the last, and
an idle connection is closed when it has been silent for `linger` seconds and nothing has arrived.
"""

import asyncio
import contextlib
import functools
import inspect
import select
import socket
import socketserver
from collections.abc import Iterable, Mapping
from time import monotonic
from typing import Any

import prefork.kernel.access_file as access_file
import prefork.kernel.logs as logs
from prefork.errors import OptionError
from prefork.workers.eventloop.listener_gate import ListenerGate
from prefork.workers.eventloop.loop_worker import TURN, LoopWorker, bared
from prefork.workers.intake.acceptor import RESOURCE_ERRORS

try:
    import prefork.workers.asgi.connections as connections
    from prefork.workers.asgi.application import ASGIApplication
except ModuleNotFoundError as error:
    if not (error.name or "").startswith("uvicorn"):
        raise
    raise OptionError("worker_class: asgi needs uvicorn; pip install 'prefork[asgi]'", code="PF0107") from None

log = logs.get("prefork")


class ASGIWorker(LoopWorker):
    """Serves an ASGI application (2 or 3): HTTP and WebSockets, on uvloop and httptools where those are installed.

    A server's RequestHandlerClass is the application.

    May be overridden, beside what `LoopWorker` says
    ------------------------------------------------
    uvicorn_options
        Class-level: what `uvicorn.Config` is to be told besides, such as `{"root_path": "/api"}`. Not what the pool
        decides: addresses, processes, signals, reloading.
    linger
        Class-level, seconds: how long a worker that leaves keeps a connection after its last reply, or its accept.
    """

    application = True
    linger = 1.0
    farewell = 1.0  # seconds before the end of `graceful_timeout`, at most a tenth of it: what runs is cancelled
    uvicorn_options: Mapping[str, Any] = {}

    @classmethod
    def check(cls, server: Any) -> None:
        super().check(server)
        if server.socket_type != socket.SOCK_STREAM:
            raise OptionError(
                "worker_class: asgi serves streams, the server takes datagrams; bind tcp:// or unix:", code="PF0106"
            )
        check_application(getattr(server, "RequestHandlerClass", None))

    # -- the life of the loop --------------------------------------------------------------------------------------

    _turning = False
    _left_at = 0.0

    def setup(self) -> None:
        self._accesses = access_file.AccessFile(self.options.access_log) if self.options.access_log else None
        self._runner.run(self._start())

    async def _start(self) -> None:
        self._connections = connections.Connections(self.loop, lambda: self._gate.freed())
        self._tasks: set[asyncio.Task[None]] = set()
        self._applications: dict[int, ASGIApplication] = {}
        for server in self.servers:
            app = server.RequestHandlerClass
            if id(app) not in self._applications:
                made = ASGIApplication(app, self, self.uvicorn_options, self._accesses)
                made.state.connections, made.state.tasks = self._connections, self._tasks
                await made.lifespan.start()
                self._applications[id(app)] = made

    def prepare_to_accept(self) -> None:
        self._opening = 0  # sockets that were accepted, and are not among the connections yet
        self._handshakes: set[asyncio.Task[Any]] = set()  # the tasks of those that speak TLS
        self._openings = {
            id(server): (self._applications[id(server.RequestHandlerClass)].protocol, bared(server))
            for server in self.servers
        }
        self._gate = ListenerGate(
            self.loop, self.acceptor, self.balancer, self._take, self._held, self.options.max_connections
        )

    def run(self) -> None:
        self._turning = True
        if self.draining:  # told before there was a loop to wake
            self._gate.end()
        self._runner.run(self._serve())

    def drain(self) -> None:
        self._left_at = monotonic()
        if self._turning:
            self.loop.call_soon_threadsafe(self._gate.end)

    def teardown(self) -> None:
        self._runner.run(self._stop())
        self._runner.close()

    async def _stop(self) -> None:
        for application in self._applications.values():
            await application.lifespan.stop()

    async def _serve(self) -> None:
        try:
            self._gate.watch()
            await self._gate.over
            await self._empty()
        finally:
            self._gate.discard()
            self._turning = False

    # -- taking ----------------------------------------------------------------------------------------------------

    def _held(self) -> int:
        return len(self._connections) + self._opening

    def _take(self, fd: int) -> bool:
        """Take a connection from a listener. Returns whether there was a connection."""
        taken = self.acceptor.try_take(fd)
        if taken is None:
            return False
        server, request, peer = taken
        try:
            if not server.verify_request(request, peer):
                server.shutdown_request(request)
                return True
        except Exception:
            server.handle_error(request, peer)
            server.shutdown_request(request)
            return True
        protocol, tls = self._openings[id(server)]
        opening: Any = self.loop.connect_accepted_socket(protocol, request, **tls)
        self._opening += 1
        if tls:  # in a task, so that a handshake can be cancelled
            task = self.loop.create_task(opening)
            self._handshakes.add(task)
            task.add_done_callback(functools.partial(self._shaken, request))
        else:
            self._go_on(request, opening)
        return True

    def _go_on(self, request: socket.socket, opening: Any, waited: object = None) -> None:
        """Run a coroutine that nobody cancels like a task for a third of the CPU and a turn of the loop earlier."""
        try:
            future = opening.send(None)
        except StopIteration:
            pass
        except (Exception, asyncio.CancelledError):  # it is gone already
            request.close()
        else:
            go_on = functools.partial(self._go_on, request, opening)
            if future is None:
                self.loop.call_soon(go_on)
            else:
                future.add_done_callback(go_on)
            return
        self._opening -= 1
        self._gate.freed()  # in any case: the connection has counted twice since it became one, which was before this

    def _shaken(self, request: socket.socket, task: "asyncio.Task[Any]") -> None:
        self._handshakes.discard(task)
        if task.cancelled() or task.exception():
            request.close()
        self._opening -= 1
        self._gate.freed()

    # -- leaving ---------------------------------------------------------------------------------------------------

    async def _empty(self) -> None:
        """Take what is to be taken, and have every connection end, none with a request on its way.

        In a hurry all connections end at once, whatever is on its way.
        """
        for application in self._applications.values():
            application.closing = True
        patience = self.options.graceful_timeout
        end = self._left_at + patience - min(self.farewell, patience / 10)
        told: set[Any] = set()
        first = True
        while not self.quitting:
            left = self._look_again() if first or self.pool_drains else False
            first = False
            self._dismiss(told)
            if not (left or self._tasks or self._opening or self._connections):
                return
            if monotonic() >= end:
                await self._give_up()
                return
            await asyncio.sleep(TURN)
        for connection in list(self._connections):
            connection.transport.abort()  # a close would wait for a client that is slow to take its last answer

    def _look_again(self) -> bool:
        """Take from the queues once more. Returns whether connections are left that must be taken.

        A wake-up that the kernel gave to this worker alone must not be lost, and when the whole pool stops the queue is
        to be emptied.
        """
        for fd in self.acceptor.fds:
            for _ in range(self.acceptor.last_look()):
                if not self._gate.has_room():
                    return self.pool_drains
                try:
                    if not self._take(fd):
                        break
                except OSError as error:
                    if error.errno not in RESOURCE_ERRORS:
                        raise
                    self.acceptor.say_full(error)
                    return self.pool_drains
        return False

    def _dismiss(self, told: set[Any]) -> None:
        """End the connections that can end."""
        now, quiet = self.loop.time(), {}
        for connection in list(self._connections):
            if connections.is_websocket(connection):
                if connection not in told and connections.is_open_websocket(connection):
                    told.add(connection)
                    connection.shutdown()  # 1012: the service restarts
            elif not connections.is_between(connection):
                connection.shutdown()  # when it has replied
            elif connections.has_begun(connection):
                if monotonic() - self._left_at > max(self.linger, self.options.keepalive_timeout):
                    connection.shutdown()
            elif (
                connections.silent_for(connection, now) >= self.linger
                and (fd := connections.descriptor(connection)) >= 0
            ):
                quiet[fd] = connection
        for fd in readable(quiet):  # bytes have arrived, which the loop will find
            del quiet[fd]
        for connection in quiet.values():
            connection.shutdown()

    async def _give_up(self) -> None:
        """`graceful_timeout` is nearly over: cancel the requests, so that `finally` and the lifespan still run."""
        text = "%s: graceful_timeout is over; requests that are cancelled: %d [PF0603]"
        log.warning(text, self.log_name, len(self._tasks))
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=self.farewell)


def readable(fds: Iterable[int]) -> set[int]:
    """The descriptors that have bytes, or an end, to be read."""
    poll = select.poll()
    for fd in fds:
        poll.register(fd, select.POLLIN)
    return {fd for fd, _ in poll.poll(0)}


def check_application(app: Any) -> None:
    """Raises OptionError for an object that is not an ASGI application."""
    if isinstance(app, type) and issubclass(app, socketserver.BaseRequestHandler):
        raise OptionError(
            f"RequestHandlerClass: {app.__name__} is a handler of socketserver, not an ASGI application; "
            "choose another worker_class",
            code="PF0106",
        )
    if not callable(app):
        raise OptionError(
            f"RequestHandlerClass: {app!r} is not an ASGI application: it cannot be called", code="PF0106"
        )
    try:
        signature = inspect.signature(app)
    except (TypeError, ValueError):
        return  # a builtin tells nothing about its parameters
    for arguments in ((None, None, None), (None,), ()):  # ASGI 3, ASGI 2, a factory
        with contextlib.suppress(TypeError):
            signature.bind(*arguments)
            return
    raise OptionError(
        f"RequestHandlerClass: {app!r} is not an ASGI application: it cannot be called with (scope, receive, send); "
        "a WSGI application takes worker_class wsgi",
        code="PF0106",
    )

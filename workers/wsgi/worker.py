"""The worker class `wsgi`: a WSGI application behind HTTP/1.1, as PEP 3333 has it.

The worker has a loop (`polling`), which has the table of waiting connections and feeds each connection's parser
(`parser`). The worker answers the requests that are ready: `response` runs the application, and the worker's accounts
are around it.
"""

import contextlib
import socket
import struct
import sys
from collections.abc import Callable, Sequence
from io import BufferedReader, BytesIO
from time import monotonic
from typing import Any

import prefork.kernel.host_port as host_port
import prefork.kernel.logs as logs
import prefork.workers.intake.dispatch as dispatch
from prefork.errors import OptionError, RequestTimeout
from prefork.kernel.unpatched import refuse_patched, select
from prefork.link.scoreboard import BUSY_SINCE, BUSY_TIME, DEADLINE, PEER_PORT, REQUESTS
from prefork.link.worker_context import WorkerContext
from prefork.workers.intake.waiting import BODY, HEAD, IDLE, LINGER, WaitPhase
from prefork.workers.worker import Worker

try:
    from prefork.workers.wsgi.access_log import AccessLog
    from prefork.workers.wsgi.body import Body
    from prefork.workers.wsgi.file_wrapper import FileWrapper
    from prefork.workers.wsgi.header_lines import Clock, refusal
    from prefork.workers.wsgi.limits import DONTWAIT, READ, Limits, ListenerContext, server_name
    from prefork.workers.wsgi.parser import Connection
    from prefork.workers.wsgi.polling import PollingLoop
    from prefork.workers.wsgi.response import Exchange, Gone
except ModuleNotFoundError as error:
    if error.name != "httptools":
        raise
    raise OptionError("worker_class: wsgi needs httptools; pip install 'prefork[wsgi]'", code="PF0107") from None

log = logs.get("prefork")


class WSGIWorker(Limits, Worker):
    """Serves a WSGI application: `RequestHandlerClass` of the server, or NAME of the command.

    The class attributes of `Limits` say what a client may do, and how long. A subclass may override them.

    Inherited by the fork: what the program made before it. A connection to a database belongs into `setup()`.
    """

    application = True
    SERVER = "prefork"  # the Server header; "": none

    @classmethod
    def check(cls, server: Any) -> None:
        if not hasattr(select, "epoll"):  # as it was: gevent.monkey takes it away
            raise OptionError(
                "worker_class: wsgi needs Linux's epoll; use thread with a server from wsgiref", code="PF0106"
            )
        if server.socket_type != socket.SOCK_STREAM:
            raise OptionError(
                "worker_class: wsgi serves streams, the server takes datagrams; bind tcp:// or unix:", code="PF0106"
            )
        application = getattr(server, "RequestHandlerClass", None)
        if not callable(application):
            raise OptionError(
                f"RequestHandlerClass: {application!r} is not a WSGI application: it cannot be called", code="PF0106"
            )
        if hasattr(server.socket, "do_handshake"):
            raise OptionError(
                "worker_class: wsgi does not speak TLS; put a proxy such as nginx or haproxy in front", code="PF0106"
            )
        if dispatch.hands_over(server):
            raise OptionError(
                f"{type(server).__name__} overrides process_request(), which wsgi does not call; set threads",
                code="PF0106",
            )

    # -- life ------------------------------------------------------------------------------------------------------

    def __init__(self, servers: Sequence[Any], context: WorkerContext) -> None:
        # Not in setup(), which belongs to subclasses.
        super().__init__(servers, context)
        self.threads = self.options.threads or 1
        if self.threads > 1:
            refuse_patched(("threading",), "wsgi with threads", "set threads to 1")
        self.clock = Clock(self.SERVER)
        contexts = {server: self._listener_context(server) for server in self.servers}
        self._loop = PollingLoop(self, contexts, self._serve, self._refuse)
        self._access = AccessLog(self.options.access_log) if self.options.access_log else None
        self._count, self._spent = 0, 0.0  # requests, and seconds in them, of a thread that is the only one
        # In a child that the application has forked: its parent's, which a collection would report as not closed.
        self._inherited: Connection | None = None
        if self.threads == 1:
            self._ints, self._floats = self._requests.enter_fast_path()

    def drain(self) -> None:
        self._loop.wake()

    def prepare_to_accept(self) -> None:
        super().prepare_to_accept()
        self._loop.open()

    def run(self) -> None:
        self._loop.run(self._requests)

    @property
    def disowned(self) -> bool:
        """Whether this process is a child that the application has forked, and no worker."""
        return self._disowned

    def _listener_context(self, server: Any) -> ListenerContext:
        address = server.socket.getsockname()
        name, port = server_name(address)
        if isinstance(address, tuple):
            # Accepted sockets inherit it; where head and body are two sends, the second must not wait for an ACK.
            server.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        base = {
            "wsgi.version": (1, 0),
            "wsgi.url_scheme": "http",
            "wsgi.errors": sys.stderr,
            "wsgi.multithread": self.threads > 1,
            "wsgi.multiprocess": True,
            "wsgi.run_once": False,
            "wsgi.file_wrapper": FileWrapper,
            "wsgi.input_terminated": True,
            "prefork.worker": self,
            "SERVER_SOFTWARE": self.SERVER or "prefork",
            "SERVER_NAME": name,
            "SERVER_PORT": port,
            "SCRIPT_NAME": "",
            "REMOTE_ADDR": "",
        }
        keep = self.MAX_KEPT if self.options.keepalive_timeout else 0
        context = ListenerContext(server.RequestHandlerClass, base, self, self.options.max_body, keep, self)
        context.verify = dispatch.verifier(server)
        return context

    # -- requests --------------------------------------------------------------------------------------------------

    def _serve(self, connection: Connection) -> WaitPhase | None:
        """Answer every request that is ready. Returns what the connection waits for then; None: it is to be closed."""
        requests: list[Exchange] = connection.requests
        while True:
            request = requests.pop(0)
            connection.served += 1
            plain = request.complete and not request.body
            request.environ["wsgi.input"] = BytesIO() if plain else self._input(connection, request)
            try:
                if self._requests.fast_path_cells is None or not self._run_alone(connection, request):
                    with self.serving(connection.peer):
                        if (followers := self._loop.followers) is not None:
                            followers.begun(connection)
                        request.run(connection.listener.application)
            except BaseException as error:
                if self._disowned:
                    self._inherited = connection
                self._failed(connection, request, error)
            if self._access:
                self._log_access(self._access.write, connection, request)
            if self._disowned:
                self._inherited = connection
                raise SystemExit  # this process is a child of the application, and shares what would be waited for
            if not request.kept:
                return self._last_phase(connection, request)
            if not requests or not (requests[0].complete or requests[0].early):
                return BODY if requests else HEAD if connection.environ is not None else IDLE

    def _input(self, connection: Connection, request: Exchange) -> Any:
        """`wsgi.input` of a request with a body."""
        if request.complete:
            return BytesIO(b"".join(request.body))
        return BufferedReader(Body(connection, request, request.continue_), READ)

    def _run_alone(self, connection: Connection, request: Exchange) -> bool:
        """What `serving()` does, for a thread that has one request at a time and is the only one (as in `sync`).

        A ValueError is the end of that; False: it had come before the request was begun.
        """
        floats, timeout = self._floats, self._timeout
        start = monotonic()
        try:
            floats[BUSY_SINCE] = start
            if timeout:
                floats[DEADLINE] = start + timeout
        except ValueError:
            return False
        try:
            board = self._board
            if connection.host == board.host:
                board.ints[PEER_PORT] = connection.port
            else:
                board.set_peer(connection.peer)
            request.run(connection.listener.application)
        finally:
            try:
                if timeout:
                    floats[DEADLINE] = 0.0  # from here on no RequestTimeout can come
                end = monotonic()
                self._count = count = self._count + 1
                self._spent = spent = self._spent + end - start
                self._ints[REQUESTS] = count
                floats[BUSY_TIME] = spent
                floats[BUSY_SINCE] = 0.0
            except ValueError:
                self._requests.fast_path_request.end()
            else:
                if count >= self._first_check:
                    self._recycling.check(count, end)
        return True

    def _refuse(self, connection: Connection) -> None:
        """Answer what was not understood with the connection's `fault`."""
        head, body = refusal(connection.fault, self.clock)
        with contextlib.suppress(OSError):
            connection.sock.send(head + body, DONTWAIT)
        self._log_refusal(connection)
        if self._access:
            self._log_access(self._access.refuse, connection, len(body))

    def _log_refusal(self, connection: Connection) -> None:
        peer, reason = host_port.of_peer(connection.peer), connection.reason
        text = "%s refused a request from %s with status %d: %s [PF0606]"
        log.info(text, self.log_name, peer, connection.fault, reason)

    def _log_access(self, write: Callable[..., None], *arguments: Any) -> None:
        """A failure of the access log is not the client's: a filter of the program may fail, or text that the
        application has left in the environment."""
        try:
            write(*arguments)
        except Exception:
            log.exception("%s: an access line cannot be written [PF0507]", self.log_name)

    def _failed(self, connection: Connection, request: Exchange, error: BaseException) -> None:
        """The application has failed. If nothing was sent the client gets an error, else the connection ends; an answer
        that was complete before stays as it is."""
        if isinstance(error, Gone):
            return
        if not isinstance(error, Exception):
            request.kept = False
            if not self._disowned:  # else it is the end of a process that the application has forked
                connection.broken = request.begun and not request.whole
                self._tell(request, 500)
                if self._access:
                    self._log_access(self._access.write, connection, request)
                self._loop.settle(connection, self._last_phase(connection, request))
            raise error
        if connection.fault and not request.complete:
            status = connection.fault  # the application could not have the body
            if not request.whole:
                self._log_refusal(connection)
        else:
            status = 503 if isinstance(error, RequestTimeout) else 500
            when = "after its response to" if request.whole else "at"
            line = f"{request.method} {request.target.decode('latin-1')}"
            log.error("%s: the application raised %s %s [PF0607]", self.log_name, when, line, exc_info=error)
        if self._disowned:
            raise SystemExit(1)  # a process that the application has forked: the client is its parent's
        if not request.whole:
            request.kept = False
            connection.broken = connection.broken or request.begun
            self._tell(request, status)

    def _tell(self, request: Exchange, status: int) -> None:
        if not request.begun:
            with contextlib.suppress(Gone):
                request.fail(status)

    def _last_phase(self, connection: Connection, request: Exchange) -> WaitPhase | None:
        """What the connection waits for after its last answer; None: it is to be closed."""
        if connection.broken:
            # A plain end would look like the end of the answer where nothing else tells its length.
            with contextlib.suppress(OSError):
                connection.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            return None
        if not request.keep and request.complete and not connection.requests and not connection.fault:
            return None  # the client wants it closed, and has nothing more to say
        return LINGER

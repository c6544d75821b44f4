"""The worker class `wsgi`: a WSGI application behind HTTP/1.1, as PEP 3333 has it.

How it waits is in `polling`, what it understands in `http`, what it answers in `response`.
"""

import contextlib
import socket
import struct
import sys
from collections.abc import Callable, Sequence
from io import BufferedReader, BytesIO
from time import monotonic
from typing import Any

import prefork.kernel.logs as logs
import prefork.workers.intake.dispatch as dispatch
from prefork.errors import OptionError, RequestTimeout
from prefork.kernel.unpatched import select
from prefork.link.scoreboard import BUSY_SINCE, BUSY_TIME, DEADLINE, PEER_PORT, REQUESTS
from prefork.link.worker_context import WorkerContext

try:
    from prefork.workers.wsgi.access_log import AccessLog
    from prefork.workers.wsgi.parser import (
        BODY,
        HEAD,
        IDLE,
        READ,
        Body,
        Connection,
        ListenerContext,
        Request,
        server_name,
    )
    from prefork.workers.wsgi.polling import PollingWorker
    from prefork.workers.wsgi.response import FileWrapper, Gone, Response
except ModuleNotFoundError as error:
    if error.name != "httptools":
        raise
    raise OptionError("worker_class: wsgi needs httptools; pip install 'prefork[wsgi]'") from None

log = logs.get("prefork")


class WSGIWorker(PollingWorker):
    """Serves a WSGI application: `RequestHandlerClass` of the server, or NAME of the command.

    What a client may do, and how long, are the class attributes of `Limits`, which a subclass may override.

    Inherited by the fork: what the program made before it. A connection to a database belongs into `setup()`.
    """

    application = True

    @classmethod
    def check(cls, server: Any) -> None:
        if not hasattr(select, "epoll"):  # as it was: gevent.monkey takes it away
            raise OptionError("worker_class: wsgi needs Linux's epoll; use thread with a server from wsgiref")
        if server.socket_type != socket.SOCK_STREAM:
            raise OptionError("worker_class: wsgi serves streams, the server takes datagrams; bind tcp:// or unix:")
        application = getattr(server, "RequestHandlerClass", None)
        if not callable(application):
            raise OptionError(f"RequestHandlerClass: {application!r} is no WSGI application: it cannot be called")
        if hasattr(server.socket, "do_handshake"):
            raise OptionError("worker_class: wsgi speaks no TLS; let a proxy do that, such as nginx or haproxy")
        if dispatch.hands_over(server):
            raise OptionError(
                f"{type(server).__name__} overrides process_request(), which wsgi has no use for; set threads"
            )

    def __init__(self, servers: Sequence[Any], context: WorkerContext) -> None:
        super().__init__(servers, context)
        self._access = AccessLog(self.options.access_log) if self.options.access_log else None
        self._count, self._spent = 0, 0.0  # requests, and seconds in them, of a thread that is the only one
        if self.threads == 1:
            self._ints, self._floats = self._requests.enter_fast_path()

    def site(self, server: Any) -> ListenerContext:
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
        make = Response.maker(self)
        site = ListenerContext(server.RequestHandlerClass, base, self, self.options.max_body, keep, make)
        site.verify = dispatch.verifier(server)
        return site

    def serve(self, connection: Connection) -> None:
        """Answer every request that is there. Then the connection waits, or is closed."""
        requests: list[Any] = connection.requests
        while True:
            request: Response = requests.pop(0)
            connection.served += 1
            plain = request.complete and not request.body
            request.environ["wsgi.input"] = BytesIO() if plain else self._input(connection, request)
            try:
                if self._requests.fast_path_cells is None or not self._run_alone(connection, request):
                    with self.serving(connection.peer):
                        self.begun(connection)
                        request.run(connection.site.application)
            except BaseException as error:
                self._failed(connection, request, error)
            if self._access:
                self._log_access(self._access.write, connection, request)
            if self._disowned:
                raise SystemExit  # a process that the application has forked shares with the worker what this waits for
            if not request.kept:
                self._let_go(connection, request)
                return
            if not requests or not (requests[0].complete or requests[0].early):
                break
        if connection.fault:
            self.turn_away(connection)
        else:
            self.park(connection, BODY if requests else HEAD if connection.environ is not None else IDLE)

    def _input(self, connection: Connection, request: Response) -> Any:
        """`wsgi.input` of a request with a body."""
        if request.complete:
            return BytesIO(b"".join(request.body))
        return BufferedReader(Body(connection, request, request.continue_), READ)

    def _run_alone(self, connection: Connection, request: Response) -> bool:
        """What `serving()` does, for a thread that has one request at a time and is the only one (as in `sync`). By an
        `ActiveRequest` a short request costs 11 to 15 % more CPU.

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
            request.run(connection.site.application)
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
                if count >= self._limit:
                    self._look(count, end)
        return True

    def refused(self, connection: Connection, size: int) -> None:
        super().refused(connection, size)
        if self._access:
            self._log_access(self._access.refuse, connection, size)

    def _log_access(self, write: Callable[..., None], *what: Any) -> None:
        """Its failure is not the client's: a filter of the program, or what the application has left in the environ."""
        try:
            write(*what)
        except Exception:
            log.exception("worker %d: the access log has failed", self.slot)

    def _failed(self, connection: Connection, request: Response, error: BaseException) -> None:
        """It came to no answer: the client is told so if nothing was sent, and else by the connection's end. Or it
        failed after its answer, which stays what it is."""
        if isinstance(error, Gone):
            return
        if not isinstance(error, Exception):
            request.kept = False
            if not self._disowned:  # else it is the end of a process that the application has forked
                connection.broken = request.begun and not request.whole
                self._tell(request, 500)
                if self._access:
                    self._log_access(self._access.write, connection, request)
                self._let_go(connection, request)
            raise error
        if connection.fault and not request.complete:
            status = connection.fault  # it could not have its body
            if not request.whole:
                super().refused(connection, 0)
        else:
            status = 503 if isinstance(error, RequestTimeout) else 500
            when = "after its answer at" if request.whole else "at"
            what = f"{request.method} {request.target.decode('latin-1')}"
            log.error("worker %d: the application raised %s %s", self.slot, when, what, exc_info=error)
        if self._disowned:
            raise SystemExit(1)  # a process that the application has forked: the client is its parent's
        if not request.whole:
            request.kept = False
            connection.broken = connection.broken or request.begun
            self._tell(request, status)

    def _tell(self, request: Response, status: int) -> None:
        if not request.begun:
            with contextlib.suppress(Gone):
                request.fail(status)

    def _let_go(self, connection: Connection, request: Request) -> None:
        """After the last answer."""
        if connection.broken:
            # A mere end would look like that of the answer where nothing else tells its length.
            with contextlib.suppress(OSError):
                connection.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.close(connection)
        elif not request.keep and request.complete and not connection.requests and not connection.fault:
            self.close(connection)  # as the client wanted it, who has nothing more to say
        else:
            self.linger(connection)

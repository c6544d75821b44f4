"""The worker class `wsgi`: a WSGI application behind HTTP/1.1, as PEP 3333 has it.

The main thread waits, in one epoll, for the listeners and for the clients from whom a whole request has not come yet:
those that idle between two requests, and those that are slow. So neither holds a worker. A request that is there is
served at once, in the main thread (`threads` = 1, where `RequestTimeout` can interrupt it) or in one of several.

Connections are looked through for their deadlines twice a second, and only while there are any: that is cheaper than to
order them anew at each request, and an idle worker does not wake up.
"""

import contextlib
import heapq
import logging
import os
import queue
import select
import socket
import socketserver
import struct
import sys
import threading
from io import BufferedReader, BytesIO
from time import monotonic
from typing import Any

import prefork.workers.chain as chain
from prefork.errors import OptionError, RequestTimeout
from prefork.workers.accept import FULL, PAUSE
from prefork.workers.base import Worker

try:
    from prefork.workers.access import AccessLog
    from prefork.workers.http import BODY, DONTWAIT, HEAD, IDLE, LINGER, READ, Body, Connection, Limits, Request, Site
    from prefork.workers.response import Clock, FileWrapper, Gone, Response, refusal
except ModuleNotFoundError as error:
    if error.name != "httptools":
        raise
    raise OptionError("worker_class: wsgi needs httptools; pip install 'prefork[wsgi]'") from None

log = logging.getLogger("prefork")

_NEVER = float("inf")
_BATCH = 64  # events looked at between two looks at the clock
_LEAVING_TICK = 0.02
_TURN = 8  # connections that a worker may take, serve and close before it looks at anything else


class WSGIWorker(Limits, Worker):
    """Serves a WSGI application: `RequestHandlerClass` of the server, or NAME of the command.

    What the limits do is said at `Limits`, whose class attributes a subclass may override; `SERVER` is the Server
    header, "" for none. At `max_connections` connections that wait, the longest idle are closed, and where none is idle
    no more are accepted: a client that reconnects costs less than one that is turned away.

    Inherited by the fork: what the program made before it. A connection to a database belongs into `setup()`.
    """

    application = True
    SERVER = "prefork"
    TICK = 0.5  # seconds between two looks at deadlines
    LAST_WORD = 0.5  # seconds for which a leaving worker still expects a next request from a client, since the last one
    FIRST_WORD = 2.0  # the same for a first request, since the connection

    @classmethod
    def check(cls, server: Any) -> None:
        if server.socket_type != socket.SOCK_STREAM:
            raise OptionError("worker_class: wsgi serves streams, the server takes datagrams; bind tcp:// or unix:")
        application = getattr(server, "RequestHandlerClass", None)
        if not callable(application):
            raise OptionError(f"RequestHandlerClass: {application!r} is no WSGI application: it cannot be called")
        if hasattr(server.socket, "do_handshake"):
            raise OptionError("worker_class: wsgi speaks no TLS; let a proxy do that, such as nginx or haproxy")
        if chain.hands_over(server):
            raise OptionError(
                f"{type(server).__name__} overrides process_request(), which wsgi has no use for; set threads"
            )

    # -- life ------------------------------------------------------------------------------------------------------

    def setup(self) -> None:
        self._threads = self.options.threads or 1
        self._wake_read, self._wake_write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self._connections: dict[int, Connection] = {}  # those that wait, by descriptor
        self._clock = Clock(self.SERVER)
        self._access = AccessLog(self.options.access_log) if self.options.access_log else None
        self._sites = {server: self._site(server) for server in self.servers}
        self._idle = self.options.keepalive_timeout
        self._tick = min(self.TICK, max(0.02, self._idle / 4)) if self._idle else self.TICK
        self._tick_at = 0.0
        self._taken = 0
        self._crowded = False  # whether more than one was found waiting the last time
        self._resume_at = _NEVER  # when to accept again
        # Whether the application has forked: then a close alone does not end a connection, of which there are copies.
        self._forked = False
        os.register_at_fork(after_in_parent=self._has_forked)
        # With threads.
        self._queue: queue.SimpleQueue[Connection] = queue.SimpleQueue()
        self._counts = threading.Condition()
        self._busy = 0  # of the threads, and what waits for one
        self._handed = 0  # of these, how many were not begun

    def _has_forked(self) -> None:
        self._forked = True

    def _site(self, server: Any) -> Site:
        address = server.socket.getsockname()
        named = isinstance(address, tuple)
        if named:  # accepted sockets inherit it; where head and body are two sends, the second must not wait for an ACK
            server.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        base = {
            "wsgi.version": (1, 0),
            "wsgi.url_scheme": "http",
            "wsgi.errors": sys.stderr,
            "wsgi.multithread": self._threads > 1,
            "wsgi.multiprocess": True,
            "wsgi.run_once": False,
            "wsgi.file_wrapper": FileWrapper,
            "wsgi.input_terminated": True,
            "SERVER_SOFTWARE": self.SERVER or "prefork",
            "SERVER_NAME": address[0] if named else "localhost",
            "SERVER_PORT": str(address[1]) if named else "80",
            "SCRIPT_NAME": "",
            "REMOTE_ADDR": "",
        }
        site = Site(server.RequestHandlerClass, base, self, self.options.max_body)
        if type(server).verify_request is not socketserver.BaseServer.verify_request:
            site.verify = server.verify_request
        return site

    def drain(self) -> None:
        with contextlib.suppress(BlockingIOError):
            os.write(self._wake_write, b"\0")

    def run(self) -> None:
        acceptor = self.acceptor
        self._listeners = set(acceptor.fds)
        with select.epoll() as self._epoll:
            self._epoll.register(self._wake_read, select.EPOLLIN)
            acceptor.poll_with(self._epoll)
            if self._threads > 1:
                for number in range(self._threads):
                    threading.Thread(target=self._serve_queue, name=f"wsgi-{number}", daemon=True).start()
            while not self.draining:
                self._turn()
            self._stop_accepting(_NEVER)
            for fd in acceptor.fds:
                self._take_last(fd, acceptor.last_look())
            self._see_out()

    def teardown(self) -> None:
        os.close(self._wake_read)
        os.close(self._wake_write)

    # -- the loop --------------------------------------------------------------------------------------------------

    def _turn(self) -> None:
        """Wait for whatever comes, and serve it."""
        connections, threads = self._connections, self._threads
        room = _BATCH if threads == 1 else threads - self._busy
        watched = bool(connections or self._busy or self._resume_at < _NEVER)
        tick = self._tick if self._resume_at == _NEVER else PAUSE
        if room > 0:
            for fd, _ in self._epoll.poll(tick if watched else -1, room):
                connection = connections.get(fd)
                if connection is not None:
                    self._read(connection)
                elif fd in self._listeners:
                    self._take(fd)
                elif fd == self._wake_read:
                    os.read(fd, 64)
        else:
            with self._counts:
                self._counts.wait_for(lambda: self._busy < threads, tick)
        if watched and (now := monotonic()) >= self._tick_at:
            self._tick_at = now + tick
            for connection in [one for one in list(connections.values()) if one.deadline <= now]:
                self._expire(connection)
            if self._resume_at <= now and (len(connections) < self.options.max_connections or self._close_idle()):
                self._resume_at = _NEVER
                self.acceptor.poll_with(self._epoll)

    def _take(self, fd: int) -> None:
        """Take and serve what the listener has, as long as it has more and nobody else's turn has come.

        To ask without having been told that somebody is there saves a poll where there is, a twentieth of what a short
        connection costs, and costs twice as much where there is not: it is done while it succeeds, and tried at times.
        """
        for number in range(1, _TURN + 1):
            waiting = len(self._connections)
            if waiting >= self.options.max_connections and not self._close_idle():
                self._stop_accepting(0.0)
                return
            taken = self._try_take(fd)
            if taken is None:
                self._crowded = self._crowded and number == 1
                break
            self._welcome(*taken)
            self._taken += 1
            self._crowded = self._crowded or number > 1
            # Who has got a connection to keep lets others have the next one. One that is over already leaves nothing
            # to be fair about.
            if len(self._connections) > waiting or self.draining or not (self._crowded or self._taken % _TURN == 0):
                break
        if self._resume_at == _NEVER and (len(self._connections) > waiting or number > 1):
            self.acceptor.step_back(self._epoll, fd)

    def _try_take(self, fd: int) -> Any:
        try:
            return self.acceptor.try_take(fd)
        except OSError as error:
            if error.errno not in FULL:
                raise
            self.acceptor.say_full(error)
            self._close_idle()
            self._stop_accepting(monotonic() + PAUSE)
            return None

    def _take_last(self, fd: int, number: int) -> None:
        """What is queued when this worker is told to leave."""
        for _ in range(number):
            try:
                taken = self.acceptor.try_take(fd)
            except OSError:
                return
            if taken is None:
                return
            self._welcome(*taken)

    def _stop_accepting(self, resume_at: float) -> None:
        """Until then, if it has not stopped already."""
        if self._resume_at == _NEVER:
            self.acceptor.poll_without(self._epoll)
        self._resume_at = resume_at

    def _see_out(self) -> None:
        """Nothing new is accepted any more: every client gets the answer to what it has sent, and is let go.

        One that was active a moment ago may have sent its next request: it has a moment more.
        """
        self._tick, self._tick_at = _LEAVING_TICK, 0.0
        for one in self._connections.values():
            if one.phase == IDLE:
                one.deadline += self.LAST_WORD - self._idle if one.served else self.FIRST_WORD - self.HEAD_TIMEOUT
            elif one.phase == LINGER:
                one.deadline += self.LAST_WORD - self.LINGER
        self._wait_out()
        with self._counts:
            self._counts.wait_for(lambda: not self._handed)
        self.finish()
        self._wait_out()

    def _wait_out(self) -> None:
        while any(one.deadline < _NEVER for one in list(self._connections.values())):
            self._turn()

    # -- a connection that waits -----------------------------------------------------------------------------------

    def _welcome(self, server: Any, sock: socket.socket, peer: Any) -> None:
        """A new connection. Its request is nearly always there, so it is read at once."""
        site = self._sites[server]
        if site.verify is not None and not site.verify(sock, peer):
            sock.close()
            return
        connection = Connection(site, sock, peer)
        connection.deadline = monotonic() + self.HEAD_TIMEOUT
        self._read(connection)

    def _read(self, connection: Connection) -> None:
        try:
            data = connection.sock.recv(READ, DONTWAIT)
        except BlockingIOError:
            self._park(connection)
        except OSError:
            self._close(connection)
        else:
            self._receive(connection, data)

    def _receive(self, connection: Connection, data: bytes) -> None:
        if not data:
            self._close(connection)
        elif connection.phase == LINGER:
            self._park(connection)
        else:
            if connection.phase == IDLE:
                connection.phase = HEAD
                if connection.served:
                    connection.deadline = monotonic() + self.HEAD_TIMEOUT
            connection.feed(data)
            self._go_on(connection)

    def _go_on(self, connection: Connection) -> None:
        """Serve it, hand it over, or wait on: as much as has come of it allows."""
        requests = connection.requests
        if requests and (requests[0].complete or requests[0].early):
            if self._threads == 1:
                self._serve(connection)
            else:
                self._hand_over(connection)
        elif connection.fault:
            self._turn_away(connection, connection.fault)
        else:
            if requests and connection.phase == HEAD:
                connection.phase, connection.deadline = BODY, monotonic() + self.BODY_TIMEOUT
            self._park(connection)

    def _park(self, connection: Connection) -> None:
        """Wait for more of it. With threads, each only once: then it belongs to whoever serves it."""
        if not connection.parked:
            connection.parked = True
            self._connections[connection.fd] = connection
            events = select.EPOLLIN if self._threads == 1 else select.EPOLLIN | select.EPOLLONESHOT
            self._epoll.register(connection.fd, events)
        elif self._threads > 1:
            self._epoll.modify(connection.fd, select.EPOLLIN | select.EPOLLONESHOT)

    def _expire(self, connection: Connection) -> None:
        """Its time is over, unless something has come that was not looked at yet."""
        try:
            data = connection.sock.recv(READ, DONTWAIT)
        except BlockingIOError:
            if connection.phase in (HEAD, BODY):
                self._turn_away(connection, 408)
            else:
                self._close(connection)
        except OSError:
            self._close(connection)
        else:
            if connection.phase == LINGER:
                self._close(connection)
            else:
                self._receive(connection, data)

    def _close_idle(self) -> bool:
        """Let go of a part of those that idle, the longest idle first. Whether there is room now."""
        idle = [one for one in list(self._connections.values()) if one.phase == IDLE and one.deadline < _NEVER]
        for one in heapq.nsmallest(1 + len(idle) // 16, idle, key=lambda one: one.deadline):
            self._expire(one)
        return len(self._connections) < self.options.max_connections

    def _turn_away(self, connection: Connection, status: int) -> None:
        head, body = refusal(status, self._clock)
        with contextlib.suppress(OSError):
            connection.sock.send(head + body, DONTWAIT)
        self._linger(connection)

    def _linger(self, connection: Connection) -> None:
        """The answer is over; what the client still sends is read and forgotten, until it closes or its time is over.

        A close with unread input would reset the connection, and the client might lose the answer.
        """
        connection.phase = LINGER
        connection.deadline = monotonic() + (self.LAST_WORD if self.draining else self.LINGER)
        try:
            connection.sock.shutdown(socket.SHUT_WR)
        except OSError:
            self._close(connection)
        else:
            self._park(connection)

    def _close(self, connection: Connection) -> None:
        if connection.parked:
            connection.parked = False
            del self._connections[connection.fd]
            self._epoll.unregister(connection.fd)  # by hand, as it would stay where a forked process has a copy
        if self._forked and not connection.broken:
            with contextlib.suppress(OSError):
                connection.sock.shutdown(socket.SHUT_RDWR)
        connection.close()

    # -- a connection that is served -------------------------------------------------------------------------------

    def _hand_over(self, connection: Connection) -> None:
        connection.deadline, connection.handed = _NEVER, True
        with self._counts:
            self._busy += 1
            self._handed += 1
        self._queue.put(connection)

    def _serve_queue(self) -> None:
        """A thread's life."""
        while True:
            connection = self._queue.get()
            try:
                self._serve(connection)
            except BaseException:
                log.exception("worker %d: in a thread", self.slot)
            finally:
                with self._counts:
                    self._busy -= 1
                    self._counts.notify()

    def _begun(self, connection: Connection) -> None:
        connection.handed = False
        with self._counts:
            self._handed -= 1
            self._counts.notify()

    def _serve(self, connection: Connection) -> None:
        """Answer every request that is there. Then the connection waits, or is closed."""
        requests = connection.requests
        while requests and (requests[0].complete or requests[0].early):
            request = requests[0]
            connection.served += 1
            response = Response(connection, request, self._clock, self._may_keep)
            try:
                self._answer(connection, request, response)
            finally:
                if not response.keep:
                    self._let_go(connection, request)
            if not response.keep:
                return
            del requests[0]
        if not requests:
            connection.phase = HEAD if connection.midway else IDLE
            patience = self.LAST_WORD if self.draining else self._idle
            connection.deadline = monotonic() + (self.HEAD_TIMEOUT if connection.midway else patience)
        if connection.fault:
            self._turn_away(connection, connection.fault)
        else:
            self._park(connection)

    def _answer(self, connection: Connection, request: Request, response: Response) -> None:
        if request.complete:
            body: Any = BytesIO(b"".join(request.body))
        else:
            body = BufferedReader(Body(connection, request, response.continue_), READ)
        request.environ["wsgi.input"] = body
        try:
            with self.serving(connection.peer):
                if connection.handed:
                    self._begun(connection)
                response.run(connection.site.application, request.environ)
        except Gone:
            connection.broken = True
            response.keep = False
        except Exception as error:
            self._fail(connection, request, response, error)
        except BaseException:
            self._tell(response, 500)
            raise
        finally:
            if self._access:
                self._access.write(connection, request, response)

    def _fail(self, connection: Connection, request: Request, response: Response, error: Exception) -> None:
        """The application raised. The client is told so if nothing was sent, and else by the connection's end."""
        if connection.fault and not request.complete:
            status = connection.fault  # it could not have its body
        else:
            status = 503 if isinstance(error, RequestTimeout) else 500
            what = f"{request.method} {request.target.decode('latin-1')}"
            log.error("worker %d: the application raised at %s", self.slot, what, exc_info=error)
        connection.broken = response.begun
        self._tell(response, status)

    def _tell(self, response: Response, status: int) -> None:
        response.keep = False
        if not response.begun:
            with contextlib.suppress(Gone):
                response.fail(status)

    def _may_keep(self, connection: Connection) -> bool:
        return self._idle > 0.0 and not self.draining and connection.served < self.MAX_KEPT

    def _let_go(self, connection: Connection, request: Request) -> None:
        """After the last answer."""
        if connection.broken:
            # A mere end would look like that of the answer where nothing else tells its length.
            with contextlib.suppress(OSError):
                connection.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self._close(connection)
        elif not request.keep and request.complete and len(connection.requests) == 1 and not connection.fault:
            self._close(connection)  # as the client wanted it, who has nothing more to say
        else:
            self._linger(connection)

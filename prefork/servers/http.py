"""`http.server` on the pool: keep-alive without its 44 ms, and connections that know when to end.

The standard handler sends a reply's head and its body apart. Nagle's algorithm holds the second back until the client
has acknowledged the first, which the client delays: 44 ms a request. `BufferedHTTPMixIn` sends a reply in one piece;
`PreforkHTTPServer` switches Nagle off too, once, on the listener, from which accepted sockets inherit it.

What was written is sent whenever the handler would wait for its client, so that neither waits for the other, and at
the latest at the end of the request. A connection is kept only while that harms nobody: not when the worker is told to
leave, not when a reply does not say where it ends, not when others wait for a worker and this client had its turn.
"""

import contextlib
import email.message
import http.server
import io
import re
import socket
import threading
from time import monotonic
from typing import TYPE_CHECKING, Any

from prefork.kernel.unpatched import select
from prefork.servers.mixin import PreforkMixIn

if TYPE_CHECKING:
    _Handler = http.server.BaseHTTPRequestHandler
else:
    _Handler = object


class PreforkHTTPServer(PreforkMixIn, http.server.HTTPServer):
    """`http.server.HTTPServer` on the pool, without Nagle's delay. For the keep-alive of `BufferedHTTPMixIn`."""

    def server_bind(self) -> None:
        super().server_bind()
        if self.address_family in (socket.AF_INET, socket.AF_INET6):
            self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)


class BufferedHTTPMixIn(_Handler):
    """Put it in front of a handler of `http.server`: `class H(BufferedHTTPMixIn, SimpleHTTPRequestHandler)`.

    It speaks HTTP/1.1 with keep-alive, and sends each reply in as few pieces as there are 64 KiB in it. A handler that
    writes and then waits for something other than its client, or goes on without `wfile`, calls `self.wfile.flush()`.

    Between two requests a connection may be idle for the server's `keepalive_timeout`; within a request the handler's
    own `timeout` counts. A handler need not know of keep-alive: after a reply without `Content-Length` or
    `Transfer-Encoding` the connection ends, and so it does after a request whose body was not read.

    A worker that leaves closes its connections after the request in hand, and says so in the reply. Where nothing could
    be said any more, the client has `parting` seconds for one more request.
    """

    protocol_version = "HTTP/1.1"

    write_limit = 65536  # bytes that are held back at most
    skip_limit = 65536  # bytes of a request's body that a handler may leave unread without losing the connection
    turn = 0.1  # seconds for which a connection may keep a worker while others wait for one
    parting = 0.05
    linger = 1.0  # seconds at most in which a client that has its reply already may send the rest of its request
    most_requests = 1000  # on one connection, so that a worker comes to its own limits

    def setup(self) -> None:
        super().setup()
        self.rfile.close()
        self.wfile.close()
        self._wire = _Wire(self)
        self.wfile = _Writer(self.connection, self.write_limit)
        self._wire.writer = self.wfile
        size = io.DEFAULT_BUFFER_SIZE if self.rbufsize < 0 else self.rbufsize
        self._reader = io.BufferedReader(self._wire, size) if size else None
        self.rfile = self._reader or self._wire  # type: ignore[assignment]  # raw for those who hand it to a child
        self._known_end = self._final = True  # of the reply: whether the client knows where it ends, and that it is one
        self._body: int | None = 0  # bytes that follow the request's head; None: unknown
        self._unread = False  # a part of it still comes
        self._begun = 0  # where they begin, in what was received

    def handle_one_request(self) -> None:
        wire = self._wire
        if wire.requests and not self._buffered():
            wire.idle = True
        wire.requests += 1
        self._known_end, self._body = False, 0
        super().handle_one_request()
        self.close_connection = self.close_connection or not self._known_end
        if self._body != 0 and not self._body_is_read():
            self.close_connection = self._unread = True

    def finish(self) -> None:
        try:
            super().finish()
            if self._unread:
                self._linger()
        finally:
            self._wire.close()

    # -- replies ---------------------------------------------------------------------------------------------------

    def send_response_only(self, code: int, message: str | None = None) -> None:
        self._final = code >= 200
        if code in (204, 304) or self.command == "HEAD":
            self._known_end = True
        super().send_response_only(code, message)

    def send_header(self, keyword: str, value: str) -> None:
        if len(keyword) in (14, 17) and keyword.lower() in ("content-length", "transfer-encoding"):
            self._known_end = True
        super().send_header(keyword, value)

    def end_headers(self) -> None:
        if self._final and not self.close_connection:
            if not self._known_end or self._body is None or self._wire.over():
                self.send_header("Connection", "close")
            elif self.request_version == "HTTP/1.0":
                self.send_header("Connection", "keep-alive")
        super().end_headers()

    # -- requests --------------------------------------------------------------------------------------------------

    def parse_request(self) -> bool:
        good = super().parse_request()
        if good:
            self._body = _length(self.headers)
        if self._body:
            self._begun = self._wire.taken - self._buffered()
        return good

    def _buffered(self) -> int:
        """Bytes that were received and not yet read."""
        if self._reader is None:
            return 0
        self._wire.quiet = True
        try:
            return len(self._reader.peek())
        finally:
            self._wire.quiet = False

    def _body_is_read(self) -> bool:
        """Whether nothing is left of the request's body; a little is read here."""
        if self._body is None:
            return False
        left = self._body - (self._wire.taken - self._buffered() - self._begun)
        # Whoever asked before sending the body may leave it out, now that there is a reply.
        if left <= 0 or self.close_connection or left > self.skip_limit or "Expect" in self.headers:
            return left == 0
        try:
            return bool(len(self.rfile.read(left)) == left)
        except OSError:
            return False

    def _linger(self) -> None:
        """Take what a client still sends before it reads its reply: a close would reset the connection, and with that
        might take the reply back."""
        with contextlib.suppress(OSError):
            self.connection.shutdown(socket.SHUT_WR)
            self.connection.settimeout(self.linger)
            ends = monotonic() + self.linger
            while self.connection.recv(65536) and monotonic() < ends:
                continue


def _length(headers: email.message.Message) -> int | None:
    """The bytes of a request's body; None where the one header that can say it does not."""
    lengths = headers.get_all("Content-Length", [])
    if "Transfer-Encoding" in headers or len(lengths) > 1:
        return None
    text = lengths[0].strip() if lengths else "0"
    return int(text) if re.fullmatch("[0-9]{1,18}", text) else None


class _Writer(io.BufferedIOBase):
    """Holds back what is written, up to `limit` bytes. What could not be sent is not tried again."""

    def __init__(self, sock: socket.socket, limit: int) -> None:
        self._sock, self._limit = sock, limit
        self._lock = threading.Lock()
        self._parts: list[bytes] = []
        self.held = 0

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        return self._sock.fileno()

    def write(self, data: Any) -> int:
        if self.closed:
            raise ValueError("write to closed file")
        part = data if type(data) is bytes else bytes(memoryview(data))
        with self._lock:
            self._parts.append(part)
            self.held += len(part)
            if self.held > self._limit:
                self._send()
        return len(part)

    def flush(self) -> None:
        if self.held:
            with self._lock:
                self._send()

    def _send(self) -> None:
        parts, self._parts, self.held = self._parts, [], 0
        self._sock.sendall(parts[0] if len(parts) == 1 else b"".join(parts))


class _Wire(io.RawIOBase):
    """The receiving end of a connection: the only place where a handler waits for its client."""

    writer: _Writer

    def __init__(self, handler: BufferedHTTPMixIn) -> None:
        self._sock = handler.connection
        self._fd: int = self._sock.fileno()
        self._pending = getattr(self._sock, "pending", None)
        self._turn, self._parting, self._most = handler.turn, handler.parting, handler.most_requests
        server: Any = handler.server
        self._worker: Any = getattr(server, "worker", None)
        self._keep, self._limit = 5.0, 0.0
        self._listeners: list[int] = []
        if self._worker is not None:  # None: the mix-in serves with any server
            self._keep = self._worker.options.keepalive_timeout
            self._limit = self._worker.options.request_timeout or 0.0
            self._listeners = [one.fileno() for one in self._worker.servers]
        self._poll: select.poll | None = None
        self._turn_ends = monotonic() + self._turn
        self.requests = 0
        self.taken = 0
        self.idle = False  # the client may take its time: no request has begun
        self.quiet = False  # tell what is there, do not receive

    def readable(self) -> bool:
        return True

    def fileno(self) -> int:
        return self._fd

    def readinto(self, buffer: Any) -> int | None:
        if self.quiet:
            return None
        if self.writer.held:
            self.writer.flush()
        idle, self.idle = self.idle, False
        if idle and not self._next_comes():
            return 0
        try:
            count: int = self._sock.recv_into(buffer)
        except ConnectionError:
            if idle:
                return 0  # it owed nothing to anybody
            raise
        self.taken += count
        return count

    def over(self) -> bool:
        """Whether this connection should not be kept beyond the request in hand."""
        if not self._keep or self.requests >= self._most or (self._worker is not None and self._worker.draining):
            return True
        now = monotonic()
        if now < self._turn_ends:
            return False
        self._turn_ends = now + self._turn
        return self._others_wait()

    def _others_wait(self) -> bool:
        """Whether a client is queued at a listener of this worker."""
        if not self._listeners or self._worker.draining:  # what stands in a listener's place then is always readable
            return False
        poll = select.poll()
        for fd in self._listeners:
            if fd >= 0:
                poll.register(fd, select.POLLIN)
        return bool(poll.poll(0))

    def _next_comes(self) -> bool:
        """Wait for the next request of an idle connection; False: it is over."""
        if self._pending is not None and self._pending():  # TLS has received more than it gave
            return True
        if self._poll is None:
            self._poll = select.poll()
            self._poll.register(self._fd, select.POLLIN)
            if self._worker is not None:
                self._poll.register(self._worker.drain_fd, select.POLLIN)
        if self._limit:
            self._worker.extend_deadline(self._keep + self._limit)
        wait, ends, leaves = min(self._turn, self._keep), 0.0, False
        while True:
            found = self._poll.poll(wait * 1000)
            if found and (len(found) > 1 or found[0][0] == self._fd):
                if self._limit:
                    self._worker.extend_deadline(self._limit)
                return True
            now = monotonic()
            ends = ends or now - wait + self._keep
            if found:
                leaves = True
                self._poll.unregister(self._worker.drain_fd)
                ends = now + self._parting
            elif now >= ends or (not leaves and self._others_wait()):
                return False
            wait = max(0.0, min(self._turn, ends - now))

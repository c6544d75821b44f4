"""`http.server` on the pool: keep-alive without its 44 ms, and connections that know when to end.

The standard handler sends the head and the body of a reply apart. Nagle's algorithm holds the second back until the
client has acknowledged the first, which the client delays: 44 ms per request. `BufferedHTTPMixIn` sends a reply in one
piece. `PreforkHTTPServer` also switches Nagle off, once, on the listener: accepted sockets inherit that.

A reply is sent when the handler waits for its client, and at the latest at the end of the request. A connection is kept
only while that harms nobody. It ends when the worker is to leave, when the client cannot know where a reply ends, and
when others wait for a worker and this client has had its turn.
"""

import contextlib
import email.message
import functools
import http.server
import io
import re
import socket
import socketserver
from time import monotonic
from typing import TYPE_CHECKING, Any

from prefork.servers.http_stream import HoldingWriter, Wire
from prefork.servers.mixin import PreforkMixIn, PreforkUnixStreamServer

if TYPE_CHECKING:
    _Handler = http.server.BaseHTTPRequestHandler
else:
    _Handler = object


class _NamedLaterHTTPServer(http.server.HTTPServer):
    """Looks its name up when somebody asks for it. HTTPServer does that in each bind, which a silent name server holds
    up for seconds, and each worker binds."""

    def server_bind(self) -> None:
        socketserver.TCPServer.server_bind(self)
        self.server_port = self.server_address[1]

    @functools.cached_property
    def server_name(self) -> str:  # type: ignore[override]
        return socket.getfqdn(str(self.server_address[0]))


class PreforkHTTPServer(PreforkMixIn, _NamedLaterHTTPServer):
    """`http.server.HTTPServer` on the pool, without Nagle's delay. For the keep-alive of `BufferedHTTPMixIn`."""

    def server_bind(self) -> None:
        super().server_bind()
        if self.address_family in (socket.AF_INET, socket.AF_INET6):
            self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)


class PreforkUnixHTTPServer(PreforkUnixStreamServer):
    """Handlers of `http.server` on a Unix socket. These write a client's address to the log, which has none there."""

    def finish_request(self, request: Any, client_address: Any) -> None:
        super().finish_request(request, client_address or ("unix", 0))


class BufferedHTTPMixIn(_Handler):
    """Put it in front of a handler of `http.server`: `class H(BufferedHTTPMixIn, SimpleHTTPRequestHandler)`.

    It speaks HTTP/1.1 with keep-alive, and sends a reply in one piece per 64 KiB. A handler calls `self.wfile.flush()`
    when it has written something and then waits for anything but its client, or goes on without `wfile`.

    Between two requests a connection may be idle for the server's `keepalive_timeout`; within a request the handler's
    own `timeout` counts. A handler need not know of keep-alive: the connection ends after a reply without
    `Content-Length` or `Transfer-Encoding`, and after a request whose body was not read.

    A worker that leaves closes its connections after the request in progress, and says so in the reply. An idle client
    cannot be told: it has `parting` seconds for one more request.
    """

    protocol_version = "HTTP/1.1"
    raw_requestline: bytes

    write_limit = 65536  # bytes that are held back at most
    skip_limit = 65536  # bytes of a request's body that a handler may leave unread without losing the connection
    turn = 0.1  # seconds for which a connection may keep a worker while others wait for a worker
    parting = 0.05
    linger = 1.0  # seconds at most that a client with its reply has to send the rest of its request
    most_requests = 1000  # on one connection, so that a worker reaches its own limits

    def setup(self) -> None:
        super().setup()
        self.rfile.close()
        self.wfile.close()
        self.wfile = HoldingWriter(self.connection, self.write_limit)
        self._wire = Wire(self, self.wfile)
        size = io.DEFAULT_BUFFER_SIZE if self.rbufsize < 0 else self.rbufsize
        self._reader = io.BufferedReader(self._wire, size) if size else None
        self.rfile = self._reader or self._wire  # type: ignore[assignment]  # raw for those who hand it to a child
        self._known_end = self._final = True  # of the reply: whether the client knows its end, and that it is a reply
        self._body: int | None = 0  # bytes that follow the request's head; None: unknown
        self._unread = False  # a part of it still comes
        self._begun = 0  # where they begin, in what was received
        self._in_head = False  # the request's head is not parsed yet

    def handle_one_request(self) -> None:
        wire = self._wire
        if wire.requests and not self._buffered():
            wire.idle = True
        wire.requests += 1
        self._known_end, self._body, self._in_head = False, 0, True
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

    def send_header(self, keyword: str, value: str, **private: Any) -> None:
        if len(keyword) in (14, 17) and keyword.lower() in ("content-length", "transfer-encoding"):
            self._known_end = True
        super().send_header(keyword, value, **private)  # Python 3.15 has an argument for its own headers

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        if self._in_head:
            self._unread = True
            # HTTP/0.9 until a version is read: a reply without a status. Before Python 3.14 errors were such replies.
            if self.request_version == "HTTP/0.9":
                self.request_version = ""
        super().send_error(code, message, explain)

    def end_headers(self) -> None:
        if self._final and not self.close_connection:
            if not self._known_end or self._body is None or self._wire.is_over():
                self.send_header("Connection", "close")
            elif self.request_version == "HTTP/1.0":
                self.send_header("Connection", "keep-alive")
        super().end_headers()

    # -- requests --------------------------------------------------------------------------------------------------

    def parse_request(self) -> bool:
        words = str(self.raw_requestline, "iso-8859-1").split()  # as it is split there: other blanks count, too
        good = self._parse_old_request() if len(words) == 2 else super().parse_request()
        self._in_head = False
        if good:
            self._body = _length(self.headers)
        if self._body:
            self._begun = self._wire.taken - self._buffered()
        return good

    def _parse_old_request(self) -> bool:
        """A request of HTTP/0.9 has no headers. Before Python 3.14 they were awaited all the same."""
        rfile, self.rfile = self.rfile, io.BytesIO()
        try:
            good = super().parse_request()
        finally:
            self.rfile = rfile
        self.headers = self.MessageClass()  # where Python 3.14 leaves a dict
        self._unread = True  # a client that sends headers, or an empty line, may do so later
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
        """Whether nothing is left of the request's body. Up to `skip_limit` bytes of it are read here."""
        if self._body is None:
            return False
        left = self._body - (self._wire.taken - self._buffered() - self._begun)
        # A client that sent `Expect` may leave its body out, now that there is a reply.
        if left <= 0 or self.close_connection or left > self.skip_limit or "Expect" in self.headers:
            return left == 0
        try:
            return bool(len(self.rfile.read(left)) == left)
        except OSError:
            return False

    def _linger(self) -> None:
        """Take what a client still sends before it reads its reply. A close would reset the connection, and the client
        might lose the reply."""
        with contextlib.suppress(OSError):
            self.connection.shutdown(socket.SHUT_WR)
            self.connection.settimeout(self.linger)
            ends = monotonic() + self.linger
            while self.connection.recv(65536) and monotonic() < ends:
                continue


def _length(headers: email.message.Message) -> int | None:
    """The bytes of a request's body; None where `Content-Length` does not tell."""
    lengths = headers.get_all("Content-Length", [])
    if "Transfer-Encoding" in headers or len(lengths) > 1:
        return None
    text = lengths[0].strip() if lengths else "0"
    return int(text) if re.fullmatch("[0-9]{1,18}", text) else None

"""The request side of HTTP/1 for the worker class `wsgi`: bytes come in, requests for an application come out.

llhttp (through httptools) parses every byte of the syntax, in its strict mode: bare LF, folded lines, two lengths, a
length beside a transfer coding, a bad chunk are its errors. What is decided here is what a parser cannot know: limits,
which header becomes which key, and what of a valid message is refused all the same.

A connection belongs to one thread at a time. Nothing here waits but `Body`, which an application reads from.
"""

import contextlib
import io
import itertools
import re
import socket
from collections.abc import Callable
from typing import Any
from urllib.parse import unquote_to_bytes

import httptools

from prefork.kernel.host_port import bracketed, host_port
from prefork.kernel.unpatched import select
from prefork.link.scoreboard import host_and_port

DONTWAIT = int(socket.MSG_DONTWAIT)
READ = 65536  # bytes asked of the kernel at once

# What a connection waits for: a first byte, the rest of a head, the rest of a short body, the client's end.
IDLE, HEAD, BODY, LINGER = range(4)

LAST = 0x7FFF_FFFF_FFFF_FFFF
NO_BODY: list[bytes] = []  # of all requests that have none, and never changed

FAULTS = {
    400: "Bad Request",
    408: "Request Timeout",
    413: "Content Too Large",
    414: "URI Too Long",
    417: "Expectation Failed",
    431: "Request Header Fields Too Large",
    500: "Internal Server Error",
    501: "Not Implemented",
    503: "Service Unavailable",
    505: "HTTP Version Not Supported",
}

# Which header becomes which key. Some tell of a body or the like, and are apart, so that others cost no look for it.
_keys: dict[bytes, str] = {}
_telling: dict[bytes, str] = {}
_KEYS_LEARNED = 1000  # header names are the client's choice: not more than so many are remembered
_TELLING = ("CONTENT_LENGTH", "HTTP_EXPECT", "HTTP_TRANSFER_ENCODING", "HTTP_UPGRADE")
_SLASH = ord("/")
# What `*` may be the target of: RFC 9112, 3.2.4, and UPnP's device architecture.
_SERVER_WIDE = ("OPTIONS", "M-SEARCH", "NOTIFY")
# A first line, or what has come of it.
_FIRST_LINE = re.compile(
    rb"(?:\A|\n)(([!#$%&'*+.^_`|~0-9A-Za-z-]+)"
    rb"(?: [^ \r\n]+ HTTP/1\.[01](?=\r)| [^ \r\n]*(?: [HTP/1.0]{0,8})?\Z|\Z))"
)
_METHODS = {name.encode(): name for name in ("GET", "HEAD", "POST")}


class Refused(OSError):
    """The client's fault while its body was being read: malformed, too long, too slow, or gone. `status` says which."""

    def __init__(self, status: int, text: str) -> None:
        super().__init__(text)
        self.status = status


class Limits:
    """Bounds on what a client may send and how slowly. Class attributes of the worker class: a subclass may set others.

    Sizes are in bytes, times in seconds.
    """

    MAX_LINE = 8190  # the target of a request line: 414
    MAX_HEAD = 65536  # everything before the body, looked at after each read: 431
    MAX_FIELDS = 100  # header lines: 431
    READ_AHEAD = 65536  # a body up to this is complete before the application is called, a longer one is streamed
    HEAD_TIMEOUT = 10.0  # from the connection, or the first byte of a later request, to the end of its head: 408
    BODY_TIMEOUT = 30.0  # for a body that is read ahead; of a longer one, without a byte: 408
    SEND_TIMEOUT = 30.0  # without the client taking a byte of the answer: the connection is given up
    LINGER = 2.0  # how long input is still read after the last byte of the answer
    MAX_KEPT = 10_000  # requests on one connection


class ListenerContext:
    """What all connections of one listener share.

    Parameters
    ----------
    base
        What of the environment is the same for all requests.
    keep
        How many requests a connection may have; none is kept with 0.
    make
        Called for every head with the connection, the environment, the method, the target, whether the client wants the
        connection kept, and whether it speaks HTTP/1.1: returns a `Request` that is complete and has no body. Where the
        head tells of one the parser changes that.
    """

    __slots__ = ("application", "base", "keep", "keys", "limits", "line", "make", "max_body", "verify")

    def __init__(
        self,
        application: Callable[..., Any],
        base: dict[str, Any],
        limits: Limits,
        max_body: int,
        keep: int,
        make: Callable[["Connection", dict[str, Any], str, bytes, bool, bool], "Request"],
    ) -> None:
        self.application, self.limits, self.max_body = application, limits, max_body or LAST
        self.keep, self.make = keep, make
        self.base = base | {"SERVER_PROTOCOL": "HTTP/1.1"}
        self.verify: Callable[[Any, Any], bool] | None = None
        # What a request adds beside headers are method, path, query, and its client's port.
        self.line, self.keys = limits.MAX_LINE, limits.MAX_FIELDS + len(self.base) + 4


class Request:
    """A request whose head is complete, and as much of its body as has come.

    `keep`: the client wants the connection kept. `early`: the application is called before the body is complete; like
    `size` and `expects` it is there where the head tells of a body or the like.

    Set by who makes one (`ListenerContext.make`), not by an `__init__`: a call from C into Python costs as much as all
    of it.
    """

    __slots__ = ("body", "complete", "early", "environ", "expects", "http11", "keep", "method", "size", "target")

    # Method and target once more: the environment is the application's to change.
    environ: dict[str, Any]
    method: str
    target: bytes
    body: list[bytes]
    size: int
    keep: bool
    http11: bool
    complete: bool
    early: bool
    expects: bool


class Connection:
    """One client, and the callbacks of its parser.

    `requests` are those that nobody answers yet, in order; only the last that was made can be incomplete. `fault` is
    the status that is due after them, when what followed could not be understood: then nothing more is read, and
    `reason` and `line` are there: what was wrong, and the request's first line as far as it is known, as the client has
    sent it.
    `environ`: what a head that comes has become so far, if one does. `broken`: an answer could not be finished.
    """

    __slots__ = (
        *(
            "broken",
            "deadline",
            "environ",
            "fault",
            "fd",
            "host",
            "line",
            "parked",
            "peer",
            "phase",
            "port",
            "reason",
            "requests",
            "served",
            "site",
            "sock",
        ),
        *("_head", "_incomplete", "_parser", "_port_text", "_repeated", "_replaying", "_seen"),
        *("_switches", "_target", "_tells"),
    )

    def __init__(self, site: ListenerContext, sock: socket.socket, peer: Any) -> None:
        self.site, self.sock, self.peer = site, sock, peer
        self.fd = sock.fileno()
        self.requests: list[Request] = []
        self.fault = self.served = self._head = self._repeated = self._seen = 0
        self.phase, self.deadline = IDLE, 0.0
        self.broken = self.parked = self._replaying = self._switches = self._tells = False
        self.environ: dict[str, Any] | None = None
        self._incomplete: Any = None  # the request whose body comes, if one does
        self.host, self.port = host_and_port(peer)
        self._port_text = str(peer[1]) if type(peer) is tuple and len(peer) > 1 else ""
        self._parser = httptools.HttpRequestParser(self)

    # -- bytes in --------------------------------------------------------------------------------------------------

    def feed(self, data: bytes) -> None:
        """Parse what has come. It raises nothing: see `requests` and `fault`."""
        request = self._incomplete
        while True:
            try:
                self._parser.feed_data(data)
            except httptools.HttpParserUpgrade as switch:
                if self._switches:
                    self._ignore_upgrade()
                    data = data[switch.args[0] :]
                    continue
                self.spoil(400, "another protocol begins, for no reason that is known here")
            except httptools.HttpParserError as error:
                if not self.fault:
                    self._misread(str(error), data)
            break
        if request is not None:
            self._look_behind(request, len(data))
        elif not (self.requests or self._incomplete is not None or self.fault):
            self._head += len(data)
            if self._head > self.site.limits.MAX_HEAD:
                self.spoil(431, f"the head is longer than {self.site.limits.MAX_HEAD} bytes")

    def _look_behind(self, request: "Request", size: int) -> None:
        """Behind the last chunk of a body there may be headers, of which the parser keeps what is not whole."""
        behind = request is self._incomplete and request.size == self._seen
        self._head = self._head + size if behind else 0
        self._seen = request.size
        if self._head > self.site.limits.MAX_HEAD:
            self.spoil(431, f"the trailers are longer than {self.site.limits.MAX_HEAD} bytes")

    def close(self) -> None:
        self.sock.close()
        # It holds this object's methods, a request this object: without circles all are freed now, not by a collection.
        del self._parser
        if self.requests or self._incomplete is not None:
            self.requests, self._incomplete = [], None

    def _ignore_upgrade(self) -> None:
        """No other protocol is spoken here, so the message goes on as HTTP/1.1.

        The parser takes all that follows for the other protocol, the body too. Another one, told by a head of its own
        how the body is delimited, goes on from there.
        """
        environ = self._incomplete.environ
        chunked = "HTTP_TRANSFER_ENCODING" in environ
        framing = "Transfer-Encoding: chunked" if chunked else f"Content-Length: {environ.get('CONTENT_LENGTH', '0')}"
        self._parser = httptools.HttpRequestParser(self)
        self._replaying, self._switches = True, False
        self._parser.feed_data(f"POST / HTTP/1.1\r\nHost: \r\n{framing}\r\n\r\n".encode("latin-1"))
        self._replaying = False

    @property
    def head(self) -> dict[str, Any]:
        """What is known of the request that comes."""
        if self._incomplete is not None:
            environ: dict[str, Any] = self._incomplete.environ
            return environ
        return self.environ or {}

    # -- the parser's callbacks ------------------------------------------------------------------------------------

    def on_message_begin(self) -> None:
        self.environ = self.site.base.copy()
        self._target = b""

    def on_url(self, part: bytes) -> None:
        self._target += part
        if len(self._target) > self.site.line:
            self._refuse(414, f"the target is longer than {self.site.line} bytes")

    def on_header(self, name: bytes, value: bytes) -> None:
        environ = self.environ
        if environ is None:
            return  # a trailer
        key = _keys.get(name) or self._key(name)
        if key in environ:
            self._repeat(environ, key, value)
        elif key:
            environ[key] = value.rstrip().decode("latin-1")

    def _key(self, name: bytes) -> str:
        """Of a header that tells something, or is new here."""
        key = _telling.get(name)
        if key is None:
            key = _learn(name)
        if key in _TELLING:
            self._tells = True
        return key

    def _repeat(self, environ: dict[str, Any], key: str, value: bytes) -> None:
        self._repeated += 1
        if key == "HTTP_HOST" or key == "CONTENT_TYPE":
            self._refuse(400, f"the head has two {'Host' if key == 'HTTP_HOST' else 'Content-Type'} headers")
        if self._repeated > self.site.limits.MAX_FIELDS:
            self._refuse(431, f"the head has more than {self.site.limits.MAX_FIELDS} headers")
        environ[key] += ("; " if key == "HTTP_COOKIE" else ",") + value.rstrip().decode("latin-1")

    def on_headers_complete(self) -> None:
        environ: Any = self.environ
        parser = self._parser
        # It is only right in here: afterwards the parser has forgotten the Connection header.
        http11 = keep = parser.should_keep_alive()
        # To ask for the version is dear. Without a header about it (llhttp knows two) HTTP/1.1 alone is kept.
        if not keep or "HTTP_CONNECTION" in environ or "HTTP_PROXY_CONNECTION" in environ:
            version = parser.get_http_version()
            http11 = version == "1.1"
            if not http11:
                if version != "1.0":
                    self._refuse(505, f"HTTP/{version} is not spoken here")
                environ["SERVER_PROTOCOL"] = "HTTP/1.0"
        if not environ.get("HTTP_HOST"):
            self._miss_host(environ, http11)
        environ["REQUEST_METHOD"] = method = _METHODS.get(name := parser.get_method()) or self._method(name)
        if self._port_text:
            environ["REMOTE_ADDR"], environ["REMOTE_PORT"] = self.host, self._port_text
        target = self._target
        text = target.decode("latin-1")
        if target[0] == _SLASH and "#" not in text:
            path, _, environ["QUERY_STRING"] = text.partition("?")
            if "%" in path:
                path = unquote_to_bytes(path.encode("latin-1")).decode("latin-1")
            environ["PATH_INFO"] = path
        else:
            self._locate(environ, target)
        site = self.site
        if len(environ) > site.keys:
            self._refuse(431, f"the head has more than {site.limits.MAX_FIELDS} headers")
        request = site.make(self, environ, method, target, keep, http11)
        self.environ = None
        if self._tells:
            self._tells = False
            if self._replaying:
                return
            self._heed(request, environ)
        self._head = self._repeated = 0
        self.requests.append(request)

    def on_body(self, data: bytes) -> None:
        request = self._incomplete
        if request.body:
            request.body.append(data)
        else:
            request.body = [data]
        request.size += len(data)
        if request.size > self.site.limits.READ_AHEAD:
            request.early = True
        if request.size > self.site.max_body:
            self._refuse(413, f"the body is longer than {self.site.max_body} bytes")

    def on_message_complete(self) -> None:
        # One without a body was complete before. While the protocol switches it is only the end of a head.
        if self._incomplete is not None and not self._switches:
            self._incomplete.complete = True
            self._incomplete = None

    # -- what is refused -------------------------------------------------------------------------------------------

    def _method(self, name: bytes) -> str:
        """One that is rare. After CONNECT, whatever its target, the parser expects no HTTP any more."""
        if name == b"CONNECT":
            self._refuse(501, "CONNECT is for proxies")
        return name.decode()

    def _heed(self, request: Request, environ: dict[str, Any]) -> None:
        """What a head says of the connection and of what follows it."""
        request.complete = request.early = request.expects = False
        request.size = 0
        self._incomplete = request
        if "CONTENT_LENGTH" in environ or "HTTP_TRANSFER_ENCODING" in environ:
            self._announce(request, environ)
        if "HTTP_EXPECT" in environ and request.http11:
            if (expected := environ["HTTP_EXPECT"]).lower() != "100-continue":
                self._refuse(417, f"nobody here meets the expectation {_shown(expected)}")
            request.expects = request.early = True
        if "HTTP_UPGRADE" in environ:
            self._switches = self._parser.should_upgrade()

    def _announce(self, request: Request, environ: dict[str, Any]) -> None:
        """A body is announced. Its length was checked by the parser: digits, once, and not beside a coding."""
        coding = environ.get("HTTP_TRANSFER_ENCODING")
        if coding is None:
            length = int(environ["CONTENT_LENGTH"])
            if length > self.site.max_body:
                self._refuse(413, f"the body is longer than {self.site.max_body} bytes")
            request.early = length > self.site.limits.READ_AHEAD
        elif not request.http11:
            self._refuse(400, "HTTP/1.0 knows no Transfer-Encoding")  # RFC 9112, 6.1: treat the framing as faulty
        elif coding.lower() != "chunked":
            self._refuse(501, f"the transfer coding {_shown(coding)} is not spoken here")

    def _miss_host(self, environ: dict[str, Any], http11: bool) -> None:
        """HTTP/1.0 may leave Host out, and it is empty where the client's URL has no host. An application is then told
        the address to which the client has connected (RFC 9112, 3.3), whatever the listener is bound to."""
        if environ.pop("HTTP_HOST", None) is None and http11:
            self._refuse(400, "the head has no Host header")
        with contextlib.suppress(OSError):  # the client is gone
            environ["SERVER_NAME"], environ["SERVER_PORT"] = server_name(self.sock.getsockname())

    def _locate(self, environ: dict[str, Any], target: bytes) -> None:
        """A target that is no plain path: a whole URL, as to a proxy, or `*`."""
        method = environ["REQUEST_METHOD"]
        path, query = b"", b""
        if target != b"*" or method not in _SERVER_WIDE:
            try:
                url = httptools.parse_url(target)
            except httptools.HttpParserInvalidURLError:
                self._refuse(400, "the target is no URL")
            if url.fragment is not None or (url.host is None and target[:1] != b"/"):
                self._refuse(400, "the target is no URL of a resource")
            if url.host is not None:  # RFC 9112, 3.2.2: it counts, the header does not
                host = url.host.decode("latin-1")
                environ["HTTP_HOST"] = bracketed(host) if url.port is None else host_port(host, url.port)
            path, query = url.path or b"/", url.query or b""
        environ["PATH_INFO"] = unquote_to_bytes(path).decode("latin-1")
        environ["QUERY_STRING"] = query.decode("latin-1")

    def _refuse(self, status: int, reason: str) -> None:
        self.spoil(status, reason)
        raise ValueError(status)  # it stops the parser

    def spoil(self, status: int, reason: str, line: str | None = None) -> None:
        """What comes is not understood, or not wanted. What was wrong first counts."""
        if not self.fault:
            self.fault, self.reason, self.line = status, reason, self._first_line() if line is None else line

    def _first_line(self) -> str:
        """Of the request that comes, as far as it is known."""
        request: Request | None = self._incomplete
        if request is not None:
            return f"{request.method} {request.target.decode('latin-1')} HTTP/{'1.1' if request.http11 else '1.0'}"
        if self.environ is None or not self._target:
            return ""
        version = self._parser.get_http_version()
        line = f"{self._parser.get_method().decode()} {self._target.decode('latin-1')}"
        return line if version == "0.0" else f"{line} HTTP/{version}"

    def _misread(self, error: str, data: bytes) -> None:
        """llhttp does not go on. It takes a method that it has not heard of for garbage, where RFC 9110, 9.1 says that
        it is not implemented: so a first line that is sound apart from that is looked for."""
        if "method" in error.lower():
            for line in itertools.islice(_FIRST_LINE.finditer(data), self.site.limits.MAX_FIELDS):
                if not _is_known(line[2]):
                    self.spoil(501, f"the method {_shown(line[2].decode())} is unknown", line[1].decode("latin-1"))
                    return
        self.spoil(400, error)


def _is_known(method: bytes) -> bool:
    """Whether the parser takes a request with this method."""
    try:
        httptools.HttpRequestParser(object()).feed_data(method + b" / HTTP/1.1\r\n")
    except httptools.HttpParserError:
        return False
    return True


def _shown(text: str) -> str:
    """A client's text in a line of the log: escaped, and not more of it than tells what it is."""
    return ascii(text[:100])


def server_name(address: Any) -> tuple[str, str]:
    """SERVER_NAME and SERVER_PORT for the address of a listener or of its end of a connection; never empty (PEP 3333).

    IPv6 in brackets (RFC 3875, 4.1.14), without its zone, which has no place in an `http` URL and no meaning elsewhere.
    """
    if isinstance(address, tuple):
        return bracketed(address[0].partition("%")[0]), str(address[1])
    return "localhost", "80"


def _learn(name: bytes) -> str:
    """The key of a header, remembered. One with an underscore is dropped (""): it would pass for one with a hyphen."""
    if b"_" in name:
        return ""
    key = name.decode("latin-1").upper().replace("-", "_")
    if key not in ("CONTENT_TYPE", "CONTENT_LENGTH"):
        key = "HTTP_" + key
    known = _telling if key in _TELLING else _keys
    if len(known) < _KEYS_LEARNED and len(name) <= 64:
        known[name] = key
    return key


# -- the body, as the application reads it -------------------------------------------------------------------------


class Body(io.RawIOBase):
    """The rest of a long body, read from the client as the application reads. Never held whole."""

    def __init__(self, connection: Connection, request: Request, go_on: Callable[[], None]) -> None:
        self._connection, self._request, self._go_on = connection, request, go_on

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        request = self._request
        while not request.body:
            if request.complete:
                return 0
            self._receive()
        part = request.body[0]
        room = len(buffer)
        if len(part) <= room:
            del request.body[0]
            buffer[: len(part)] = part
            return len(part)
        buffer[:room] = part[:room]
        request.body[0] = part[room:]
        return room

    def _receive(self) -> None:
        connection, request = self._connection, self._request
        if connection.fault:
            raise Refused(connection.fault, connection.reason)
        if request.expects:
            request.expects = False
            self._go_on()
        try:
            data = receive(connection.sock, connection.site.limits.BODY_TIMEOUT)
        except ConnectionError:
            data = b""  # an abrupt end, but an end
        if data is None:
            connection.spoil(408, f"nothing of the body came for {connection.site.limits.BODY_TIMEOUT:g} s")
        elif data:
            connection.feed(data)
        else:
            connection.spoil(400, "the client left in the middle of its request")
            raise Refused(400, connection.reason)


def receive(sock: socket.socket, seconds: float) -> bytes | None:
    """What comes within so many seconds; None if nothing does, b"" at the end of the stream."""
    try:
        return sock.recv(READ, DONTWAIT)
    except BlockingIOError:
        pass
    poll = select.poll()
    poll.register(sock, select.POLLIN)
    if not poll.poll(seconds * 1000):
        return None
    return sock.recv(READ, DONTWAIT)

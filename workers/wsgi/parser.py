"""The request side of HTTP/1: bytes come in, exchanges for an application come out.

llhttp (through httptools) parses every byte of the syntax, in its strict mode: bare LF, folded lines, two lengths, a
length beside a transfer coding, a bad chunk are its errors. This module decides what a parser cannot know: the limits,
which header becomes which key, and which valid messages are refused all the same.

A connection belongs to one thread at a time. Nothing here waits.
"""

import contextlib
import itertools
import re
import socket
from typing import Any
from urllib.parse import unquote_to_bytes

import httptools

from prefork.kernel.host_port import bracketed, host_port
from prefork.link.scoreboard import host_and_port
from prefork.workers.intake.waiting import IDLE, WaitPhase
from prefork.workers.wsgi.limits import ListenerContext, server_name
from prefork.workers.wsgi.response import Exchange, make_exchange

# Which header becomes which key. Headers that tell of a body or the like are apart: the others cost no question for it.
_keys: dict[bytes, str] = {}
_telling: dict[bytes, str] = {}
_KEYS_LEARNED = 1000  # names that are remembered at most, because they are the client's choice
_TELLING = ("CONTENT_LENGTH", "HTTP_EXPECT", "HTTP_TRANSFER_ENCODING", "HTTP_UPGRADE")
_SLASH = ord("/")
# The methods that may have the target `*`: RFC 9112, 3.2.4, and UPnP's device architecture.
_SERVER_WIDE = ("OPTIONS", "M-SEARCH", "NOTIFY")
# A first line, or its beginning.
_FIRST_LINE = re.compile(
    rb"(?:\A|\n)(([!#$%&'*+.^_`|~0-9A-Za-z-]+)"
    rb"(?: [^ \r\n]+ HTTP/1\.[01](?=\r)| [^ \r\n]*(?: [HTP/1.0]{0,8})?\Z|\Z))"
)
_METHODS = {name.encode(): name for name in ("GET", "HEAD", "POST")}


class Connection:
    """One client, and the callbacks of its parser.

    requests
        The exchanges that nobody answers yet, in order. Only the last can be incomplete.
    fault, reason, line
        The status that is due after the requests, when the bytes that followed could not be understood: then nothing
        more is read. Then also what was wrong, and the request's first line as far as it is known, as the client has
        sent it.
    environ
        What a head that has come in part has become so far; None: there is no such head.
    served, broken
        The number of requests that were answered or are being answered; an answer could not be finished.
    phase, deadline, parked, in_service
        See `intake.waiting`.
    """

    __slots__ = (
        *("broken", "deadline", "environ", "fault", "fd", "host", "in_service", "line", "listener", "parked", "peer"),
        *("phase", "port", "reason", "requests", "served", "sock"),
        *("_head", "_incomplete", "_parser", "_port_text", "_repeated", "_replaying", "_seen"),
        *("_switches", "_target", "_tells"),
    )

    def __init__(self, listener: ListenerContext, sock: socket.socket, peer: Any) -> None:
        self.listener, self.sock, self.peer = listener, sock, peer
        self.fd = sock.fileno()
        self.requests: list[Exchange] = []
        self.fault = self.served = self._head = self._repeated = self._seen = 0
        self.phase: WaitPhase = IDLE
        self.deadline = 0.0
        self.broken = self.parked = self.in_service = self._replaying = self._switches = self._tells = False
        self.environ: dict[str, Any] | None = None
        self._incomplete: Any = None  # the request whose body has come in part; None: there is no such request
        self.host, self.port = host_and_port(peer)
        self._port_text = str(peer[1]) if type(peer) is tuple and len(peer) > 1 else ""
        self._parser = httptools.HttpRequestParser(self)

    # -- bytes in --------------------------------------------------------------------------------------------------

    def feed(self, data: bytes) -> None:
        """Parse bytes of the client. It raises nothing: see `requests` and `fault`."""
        request = self._incomplete
        while True:
            try:
                self._parser.feed_data(data)
            except httptools.HttpParserUpgrade as switch:
                if self._switches:
                    self._ignore_upgrade()
                    data = data[switch.args[0] :]
                    continue
                self.spoil(400, "the client switches to an unknown protocol")
            except httptools.HttpParserError as error:
                if not self.fault:
                    self._misread(str(error), data)
            break
        if request is not None:
            self._look_behind(request, len(data))
        elif not (self.requests or self._incomplete is not None or self.fault):
            self._head += len(data)
            if self._head > self.listener.limits.MAX_HEAD:
                self.spoil(431, f"the head is longer than {self.listener.limits.MAX_HEAD} bytes")

    def _look_behind(self, request: Exchange, size: int) -> None:
        """Count the bytes of trailers, the headers behind the last chunk of a body: the parser keeps those that are not
        whole."""
        behind = request is self._incomplete and request.size == self._seen
        self._head = self._head + size if behind else 0
        self._seen = request.size
        if self._head > self.listener.limits.MAX_HEAD:
            self.spoil(431, f"the trailers are longer than {self.listener.limits.MAX_HEAD} bytes")

    def close(self) -> None:
        self.sock.close()
        # The parser holds this object's methods, a request this object: without circles all are freed now, not by a
        # collection.
        del self._parser
        if self.requests or self._incomplete is not None:
            self.requests, self._incomplete = [], None

    def _ignore_upgrade(self) -> None:
        """No other protocol is spoken here, so the message goes on as HTTP/1.1.

        The parser takes all that follows for the other protocol, the body too. So a new parser, which a head of its own
        tells how the body is delimited, goes on from there.
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
        """The environment of a request that has come in part, as far as it is known."""
        if self._incomplete is not None:
            environ: dict[str, Any] = self._incomplete.environ
            return environ
        return self.environ or {}

    # -- the parser's callbacks ------------------------------------------------------------------------------------

    def on_message_begin(self) -> None:
        self.environ = self.listener.base.copy()
        self._target = b""

    def on_url(self, part: bytes) -> None:
        self._target += part
        if len(self._target) > self.listener.line:
            self._refuse(414, f"the target is longer than {self.listener.line} bytes")

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
        """The key of a header that tells of a body or the like, or is new here."""
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
        if self._repeated > self.listener.limits.MAX_FIELDS:
            self._refuse(431, f"the head has more than {self.listener.limits.MAX_FIELDS} headers")
        environ[key] += ("; " if key == "HTTP_COOKIE" else ",") + value.rstrip().decode("latin-1")

    def on_headers_complete(self) -> None:
        environ: Any = self.environ
        parser = self._parser
        # The answer is only right in this callback: afterwards the parser has forgotten the Connection header.
        http11 = keep = parser.should_keep_alive()
        # The version is expensive to ask. Without a header about it (llhttp knows two) only HTTP/1.1 is kept.
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
        listener = self.listener
        if len(environ) > listener.keys:
            self._refuse(431, f"the head has more than {listener.limits.MAX_FIELDS} headers")
        request = make_exchange(self, environ, method, target, keep, http11)
        self.environ = None
        if self._tells:
            self._tells = False
            if self._replaying:
                return
            self._apply(request, environ)
        self._head = self._repeated = 0
        self.requests.append(request)

    def on_body(self, data: bytes) -> None:
        request = self._incomplete
        if request.body:
            request.body.append(data)
        else:
            request.body = [data]
        request.size += len(data)
        if request.size > self.listener.limits.READ_AHEAD:
            request.early = True
        if request.size > self.listener.max_body:
            self._refuse(413, f"the body is longer than {self.listener.max_body} bytes")

    def on_message_complete(self) -> None:
        # A request without a body was complete before. While the protocol switches this is only the end of a head.
        if self._incomplete is not None and not self._switches:
            self._incomplete.complete = True
            self._incomplete = None

    # -- what is refused -------------------------------------------------------------------------------------------

    def _method(self, name: bytes) -> str:
        """A rare method. After CONNECT, whatever its target, the parser expects no HTTP any more."""
        if name == b"CONNECT":
            self._refuse(501, "CONNECT is for proxies")
        return name.decode()

    def _apply(self, request: Exchange, environ: dict[str, Any]) -> None:
        """Apply the headers that tell of the connection and of the bytes behind the head."""
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

    def _announce(self, request: Exchange, environ: dict[str, Any]) -> None:
        """A body is announced. The parser has checked its length: digits, once, and not beside a coding."""
        coding = environ.get("HTTP_TRANSFER_ENCODING")
        if coding is None:
            length = int(environ["CONTENT_LENGTH"])
            if length > self.listener.max_body:
                self._refuse(413, f"the body is longer than {self.listener.max_body} bytes")
            request.early = length > self.listener.limits.READ_AHEAD
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
        """Take apart a target that is no plain path: a whole URL, as to a proxy, or `*`."""
        method = environ["REQUEST_METHOD"]
        path, query = b"", b""
        if target != b"*" or method not in _SERVER_WIDE:
            try:
                url = httptools.parse_url(target)
            except httptools.HttpParserInvalidURLError:
                self._refuse(400, "the target is no URL")
            if url.fragment is not None or (url.host is None and target[:1] != b"/"):
                self._refuse(400, "the target is no URL of a resource")
            if url.host is not None:  # RFC 9112, 3.2.2: this host counts, the header does not
                host = url.host.decode("latin-1")
                environ["HTTP_HOST"] = bracketed(host) if url.port is None else host_port(host, url.port)
            path, query = url.path or b"/", url.query or b""
        environ["PATH_INFO"] = unquote_to_bytes(path).decode("latin-1")
        environ["QUERY_STRING"] = query.decode("latin-1")

    def _refuse(self, status: int, reason: str) -> None:
        self.spoil(status, reason)
        raise ValueError(status)  # it stops the parser

    def spoil(self, status: int, reason: str, line: str | None = None) -> None:
        """The client's bytes are not understood, or not wanted. Only the first fault counts."""
        if not self.fault:
            self.fault, self.reason, self.line = status, reason, self._first_line() if line is None else line

    def _first_line(self) -> str:
        """The first line of a request that has come in part, as far as it is known."""
        request: Exchange | None = self._incomplete
        if request is not None:
            return f"{request.method} {request.target.decode('latin-1')} HTTP/{'1.1' if request.http11 else '1.0'}"
        if self.environ is None or not self._target:
            return ""
        version = self._parser.get_http_version()
        line = f"{self._parser.get_method().decode()} {self._target.decode('latin-1')}"
        return line if version == "0.0" else f"{line} HTTP/{version}"

    def _misread(self, error: str, data: bytes) -> None:
        """llhttp has stopped. It takes an unknown method for garbage, where RFC 9110, 9.1 says that the method is not
        implemented. So look for a first line that is sound apart from its method."""
        if "method" in error.lower():
            for line in itertools.islice(_FIRST_LINE.finditer(data), self.listener.limits.MAX_FIELDS):
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
    """A client's text for a line of the log: escaped, and cut where the rest tells nothing more."""
    return ascii(text[:100])


def _learn(name: bytes) -> str:
    """The key of a header, remembered. "" for a name with an underscore: it would pass for a name with a hyphen."""
    if b"_" in name:
        return ""
    key = name.decode("latin-1").upper().replace("-", "_")
    if key not in ("CONTENT_TYPE", "CONTENT_LENGTH"):
        key = "HTTP_" + key
    known = _telling if key in _TELLING else _keys
    if len(known) < _KEYS_LEARNED and len(name) <= 64:
        known[name] = key
    return key

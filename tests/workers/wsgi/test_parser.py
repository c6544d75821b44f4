"""The fast parser of `BufferedHTTPMixIn` against the standard library's: whatever it takes, it understands alike."""

import http.client
import http.server
import socket
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from prefork.servers.http import BufferedHTTPMixIn

PLAIN = b"GET /a?b=c HTTP/1.1\r\nHost: x\r\nUser-Agent:\t y z \r\nEmpty:\r\nX-High: \xe9\x85\r\nhost: again\r\n\r\n"


class Stock(http.server.BaseHTTPRequestHandler):
    """Parses one request, and tells all that it made of it."""

    seen: tuple[Any, ...]
    fast = False

    def handle(self) -> None:
        self.raw_requestline = self.rfile.readline(65537)
        good = self.parse_request()
        told: list[Any] = [good, self.command, self.request_version, self.requestline, self.close_connection]
        if good:
            headers = self.headers
            told += [self.path, type(headers), headers.items(), headers.is_multipart(), headers.preamble]
            told += [headers.epilogue, headers.get_unixfrom(), [repr(defect) for defect in headers.defects]]
            told += [headers.policy, headers.get_charset(), headers.get_default_type()]
            told += [[part.as_string() for part in headers.walk()]]
        self.wfile.flush()
        type(self).seen = (*told, self.rfile.read())

    def log_message(self, format: str, *arguments: object) -> None:
        """Silence."""

    def date_time_string(self, timestamp: float | None = None) -> str:
        return "today"


class Fast(BufferedHTTPMixIn, Stock):
    def _parse_plain(self) -> bool | None:
        good = super()._parse_plain()
        type(self).fast = good is not None
        return good


def understood(kind: type[Stock], request: bytes, protocol: str) -> tuple[Any, ...]:
    """What a handler makes of a request: all that it knows, and all that it has sent."""
    near, far = socket.socketpair()
    with near, far:
        far.settimeout(5)
        far.sendall(request)
        far.shutdown(socket.SHUT_WR)
        kind.protocol_version = protocol
        try:
            kind(near, ("", 0), SimpleNamespace())  # type: ignore[arg-type]  # it asks nothing of its server
        except Exception as error:
            kind.seen = (type(error), str(error))
        near.shutdown(socket.SHUT_WR)
        sent = b""
        while part := far.recv(65536):
            sent += part
    return (*kind.seen, sent)


def agree(request: bytes, protocol: str = "HTTP/1.1") -> bool:
    """Both understand a request alike; whether it was the fast parser that did."""
    Fast.fast = False
    assert understood(Fast, request, protocol) == understood(Stock, request, protocol)
    return Fast.fast


NAMES = [
    "Host",
    "Connection",
    "connection",
    "Expect",
    "Content-Length",
    "Content-Type",
    "Transfer-Encoding",
    "From",
    "X",
]
VALUES = [
    *("", " ", "close", "Close ", "keep-alive", "Keep-Alive", "100-continue", "100-Continue", "3", "text/plain; x=y"),
    *("multipart/mixed", "multipart/mixed; boundary=b", "message/rfc822", "message/delivery-status", " \xa0message/x"),
]
text = st.text(st.characters(max_codepoint=255), max_size=12)
ends = st.sampled_from(["\r\n"] * 20 + ["\n", "\r", "\r\r\n", "", "\r\n ", "\r\n\t"])
colons = st.sampled_from([": ", ":", ":\t ", " : ", ":  "])
sound = st.builds("{}: {}\r\n".format, st.sampled_from(NAMES), st.sampled_from(VALUES))
header = sound | st.builds(
    "".join, st.tuples(st.sampled_from(NAMES) | text, colons, st.sampled_from(VALUES) | text, ends)
)
method = st.sampled_from(["GET", "GET", "GET", "POST", "HEAD", "get", "G-T", "From", ""]) | text
path = st.sampled_from(["/", "/a", "/a?b=c", "//a", "///", "*", "a", "/\x80", "http://h/p"]) | text
version = st.sampled_from(
    [*["HTTP/1.1"] * 6, "HTTP/1.0", "HTTP/1.1 ", "HTTP/2.0", "HTTP/0.9", "HTTP/1.01", "HTTP/01.1", "HTTP/1", "X", ""]
)
first = st.sampled_from(["GET / HTTP/1.1\r\n", "POST /a HTTP/1.0\r\n"]) | st.builds(
    "{} {} {}{}".format, method, path, version, ends
)
requests = st.builds(
    lambda line, headers, end, rest: (line + "".join(headers) + end + rest).encode("iso-8859-1"),
    first,
    st.lists(header, max_size=5),
    ends,
    text,
)


@st.composite
def damaged(draw: st.DrawFn) -> bytes:
    """A sound request with a few bytes of it replaced, left out, or put in."""
    request = bytearray(PLAIN)
    for _ in range(draw(st.integers(1, 3))):
        at, width = draw(st.integers(0, len(request))), draw(st.integers(0, 2))
        request[at : at + width] = draw(st.binary(max_size=2) | st.sampled_from([b"\r\n", b"\n", b"\0", b" ", b":"]))
    return bytes(request)


@settings(max_examples=700, deadline=None)
@given(requests | damaged(), st.sampled_from(["HTTP/1.1", "HTTP/1.1", "HTTP/1.0"]))
@example(PLAIN, "HTTP/1.0")
@example(b"GET / HTTP/1.1\r\nFrom : x\r\n\r\n", "HTTP/1.1")
@example(b"GET / HTTP/1.1\r\nContent-Type: message/rfc822\r\n\r\n", "HTTP/1.1")
@example(b"GET / HTTP/1.1\r\nConnection: keep-alive\r\n\r\n", "HTTP/1.0")
@example(b"GET / HTTP/1.1\r\nContent-Type: multipart/x\r\nExpect: 100-continue\r\n\r\nbody", "HTTP/1.1")
def test_the_fast_parser_is_the_standard_one(request_: bytes, protocol: str) -> None:
    """Whatever comes, the same is understood, answered, and left to be read as by the standard parser."""
    agree(request_, protocol)


@pytest.mark.parametrize("number", [0, 1, 64, 65, 99, 100, 101])
def test_many_headers(number: int) -> None:
    """Up to the standard parser's limit of headers, and beyond it."""
    request = b"GET / HTTP/1.1\r\n" + b"".join(b"X-%d: y\r\n" % n for n in range(number)) + b"\r\nrest"
    assert agree(request) == (number <= 64)


@pytest.mark.parametrize("size", [8000, 9000, 65519, 70000])
def test_long_lines(size: int) -> None:
    """Lines that no longer fit the buffer, and lines that are refused."""
    assert agree(b"GET /" + b"x" * size + b" HTTP/1.1\r\n\r\n") == (size < 65519)
    assert agree(b"GET / HTTP/1.1\r\nX: " + b"x" * size + b"\r\n\r\n") == (size < 8192)


@pytest.mark.parametrize(
    "request_",
    [
        PLAIN,
        b"GET / HTTP/1.0\r\n\r\n",
        b"GET / HTTP/1.1\r\nConnection: close\r\nConnection: keep-alive\r\n\r\n",
        b"POST /form HTTP/1.1\r\nContent-Type: text/plain\r\nContent-Length: 3\r\nExpect: 100-continue\r\n\r\nabc",
        b"GET /one HTTP/1.1\r\nHost: x\r\n\r\nGET /two HTTP/1.1\r\n\r\n",
        # what curl, a browser and wrk send
        b"GET / HTTP/1.1\r\nHost: 127.0.0.1:80\r\nUser-Agent: curl/8\r\nAccept: */*\r\n\r\n",
        b'GET / HTTP/1.1\r\nHost: h\r\nAccept-Language: de,en-US;q=0.7\r\nCookie: a=b; c="d"\r\nDNT: 1\r\n\r\n',
    ],
)
def test_usual_requests_take_the_fast_path(request_: bytes) -> None:
    """What clients usually send is what the fast parser is for."""
    assert agree(request_)


@pytest.mark.parametrize(
    "request_",
    [
        b"GET //evil HTTP/1.1\r\n\r\n",
        b"GET / HTTP/1.1\nHost: x\n\n",
        b"GET / HTTP/1.1\r\nA: b\r\n folded\r\n\r\n",
        b"GET / HTTP/1.1\r\nA: b\0\r\n\r\n",
        b"GET / HTTP/1.1\r\nA : b\r\n\r\n",
        b"POST / HTTP/1.1\r\nContent-Type: multipart/mixed; boundary=b\r\n\r\n--b\r\n",
        b"GET / HTTP/1.1\r\nHost: x",
        b"GET /\r\n",
    ],
)
def test_peculiar_requests_do_not(request_: bytes) -> None:
    """What is unusual is left to the standard parser."""
    assert not agree(request_)


def test_a_message_class_of_ones_own() -> None:
    """A handler that replaces the class of its headers gets them in that class, from the standard parser."""

    class Headers(http.client.HTTPMessage):
        pass

    near, far = socket.socketpair()
    with near, far:
        far.sendall(PLAIN)
        far.shutdown(socket.SHUT_WR)
        own: Any = type("Own", (Fast,), {"MessageClass": Headers})
        own(near, ("", 0), SimpleNamespace())
    assert own.seen[6] is Headers and not own.fast

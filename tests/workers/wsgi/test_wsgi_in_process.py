"""What the class `wsgi` reads and writes, without a process: requests in pieces, noise, heads of answers, bodies."""

import enum
import socket
import time
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import prefork.workers.wsgi.header_lines as header_lines
from prefork.workers.wsgi.body import Body, Refused
from prefork.workers.wsgi.header_lines import Clock
from prefork.workers.wsgi.limits import Limits, ListenerContext
from prefork.workers.wsgi.parser import Connection
from support.wsgi import CHUNKED, GET, HOST, POST, VALID

pytestmark = pytest.mark.timeout(60)


# -- requests, in pieces ---------------------------------------------------------------------------


class Bounds(Limits):
    """The shipped ones."""


class Desk:
    """What a response asks of its worker."""

    def __init__(self) -> None:
        self.clock, self.draining = Clock(""), False


def site(max_body: int = 0) -> ListenerContext:
    return ListenerContext(lambda *_: [], {"SCRIPT_NAME": ""}, Bounds(), max_body, 10, Desk())


def connection(max_body: int = 0) -> Connection:
    one, other = socket.socketpair()
    one.close()
    other.close()
    return Connection(site(max_body), other, "")


def parsed(*parts: bytes) -> list[tuple[dict[str, Any], bytes, bool, bool]]:
    """What is made of the bytes."""
    one = connection()
    for part in parts:
        assert not one.fault
        one.feed(part)
    assert not one.fault
    return [(r.environ, b"".join(r.body), r.complete, r.keep) for r in one.requests]


@pytest.mark.parametrize("name", VALID)
def test_split_anywhere(name: str) -> None:
    """A request that comes in two pieces, split at any byte, or byte by byte, is the request that comes whole."""
    raw = VALID[name]
    (whole,) = parsed(raw)
    assert whole[2], "not complete"
    for at in range(1, len(raw)):
        assert parsed(raw[:at], raw[at:]) == [whole], at
    assert parsed(*[raw[at : at + 1] for at in range(len(raw))]) == [whole]


@pytest.mark.parametrize("version", ["1.0", "1.1"])
@pytest.mark.parametrize("name", ["", "Connection", "CONNECTION", "Proxy-Connection", "Keep-Alive", "Upgrade"])
@pytest.mark.parametrize("value", ["keep-alive", "close", "upgrade", "x, keep-alive"])
def test_the_version_is_what_was_said(version: str, name: str, value: str) -> None:
    """Whatever a request says of its connection, its version is the one of its first line."""
    line = f"{name}: {value}\r\n" if name else ""
    ((environ, _, _, _),) = parsed(f"GET / HTTP/{version}\r\nHost: test\r\n{line}\r\n".encode())
    assert environ["SERVER_PROTOCOL"] == f"HTTP/{version}"


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.data())
def test_split_and_pipelined_at_random(data: st.DataObject) -> None:
    """Requests that follow each other are the same, in order, however the stream is cut."""
    names = [name for name in VALID if name not in ("http 1.0", "close")]
    chosen = data.draw(st.lists(st.sampled_from(names), min_size=1, max_size=4))
    raw = b"".join(VALID[name] for name in chosen)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(raw)), max_size=6)))
    parts = [raw[a:b] for a, b in zip([0, *cuts], [*cuts, len(raw)], strict=True) if a < b]
    assert parsed(*parts) == [parsed(VALID[name])[0] for name in chosen]


@settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    st.sampled_from(list(VALID.values())), st.lists(st.tuples(st.integers(0, 400), st.binary(max_size=3)), max_size=3)
)
def test_noise(raw: bytes, edits: list[tuple[int, bytes]]) -> None:
    """A request that was tampered with is a request, or a fault; the parser's callbacks never fail otherwise."""
    for at, noise in edits:
        raw = raw[:at] + noise + raw[at + len(noise) :]
    one = connection()
    for at in range(0, len(raw), 7):
        if not one.fault:
            one.feed(raw[at : at + 7])
    assert one.fault in (0, 400, 414, 417, 431, 501, 505)
    for request in one.requests:
        assert request.environ["REQUEST_METHOD"].isalpha() or "-" in request.environ["REQUEST_METHOD"]
        assert "\r" not in repr(request.environ) and "\n" not in "".join(map(str, request.environ.values()))


# -- answers ---------------------------------------------------------------------------------------


def head_of(headers: Any, status: Any = "200 OK") -> bytes:
    """What becomes of start_response(status, headers), up to the server's own lines."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        one = Connection(site(), ours, "")
        one.feed(b"HEAD / HTTP/1.1\r\n" + HOST + b"\r\n")  # whose answer is nothing else
        request: Any = one.requests.pop()
        request.run(lambda _, start_response: (start_response(status, headers), [b""])[1])
        return theirs.recv(65536).partition(b"Date: ")[0]


class Said(str, enum.Enum):  # noqa: UP042  # a StrEnum is shown as its text
    """Equal to their texts, and with the same hashes, but shown otherwise by format()."""

    OK = "200 OK"
    NAME = "X-Said"
    JSON = "application/json"

    __hash__ = str.__hash__

    def __format__(self, _: str) -> str:
        return "otherwise"


class Small(str):
    """Equal to itself in capitals."""

    __slots__ = ()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, str) and self.lower() == other.lower()

    def __hash__(self) -> int:
        return hash(self.lower())


def test_texts_of_a_class_of_ones_own() -> None:
    """A status, name or value whose class is not str itself goes out as its text, and changes nothing for one that is
    equal to it."""
    for _ in range(3):
        expected = b"HTTP/1.1 200 OK\r\nX-Said: application/json\r\n"
        assert head_of([(Said.NAME, Said.JSON)], Said.OK) == expected
        assert head_of([("X-Said", Said.JSON)]) == expected
        assert head_of([("X-Said", "application/json")]) == expected
        for value in ("foo", "FOO", "Foo"):
            assert head_of([("X-Small", Small(value))]) == b"HTTP/1.1 200 OK\r\nX-Small: %b\r\n" % value.encode()


def test_headers_of_any_shape() -> None:
    """A header may be any pair, such as a list or an iterator, each time that it is said."""
    shapes: tuple[Callable[[str, str], object], ...] = (
        lambda *pair: list(pair),
        lambda *pair: iter(pair),
        lambda *pair: dict.fromkeys(pair),
        lambda *pair: pair,
    )
    for _ in range(2):
        for shape in shapes:
            headers = [shape("X-One", "1"), shape("Content-Length", "0"), shape("X-Two", "2")]
            assert head_of(headers) == b"HTTP/1.1 200 OK\r\nX-One: 1\r\nContent-Length: 0\r\nX-Two: 2\r\n"
        assert head_of(shape("X-One", str(number)) for number in range(2)) == (
            b"HTTP/1.1 200 OK\r\nX-One: 0\r\nX-One: 1\r\n"
        )


STATUSES: list[Any] = [200, None, b"200 OK", "200", "100 Continue", "200 O\nK", "200 \u20ac", ("200 OK",), []]
NAMES: list[Any] = [7, None, b"X-A", "", "X A", "X-A\r\n", ("X-A",), [], "Connection", "X-\xe4"]
VALUES: list[Any] = [7, None, b"1", ("1",), frozenset("1"), [], "a\nb", "a\rb", "a\0b", "\u20ac"]
LENGTHS: list[Any] = ["x", "", "-1", "1_0", " 1", "\u0661", 1, ["1"]]
SHAPES: list[Any] = [7, (), ("X-A",), ("X-A", "1", "2"), None]
WRONG: list[tuple[Any, Any]] = [
    *((status, []) for status in STATUSES),
    *(("200 OK", [(name, "1")]) for name in NAMES),
    *(("200 OK", [("X-A", value)]) for value in VALUES),
    *(("200 OK", [("Content-Length", value)]) for value in LENGTHS),
    *(("200 OK", [header]) for header in SHAPES),
    ("200 OK", None),
]


@pytest.mark.parametrize("number", range(len(WRONG)))
def test_what_is_wrong_is_wrong_each_time(number: int) -> None:
    """A status, name or value of a wrong type or text raises each time, and leaves what is right as it is."""
    status, headers = WRONG[number]
    for _ in range(3):
        with pytest.raises((TypeError, ValueError, AttributeError)):
            head_of(headers, status)
        assert head_of([("X-A", "1")]) == b"HTTP/1.1 200 OK\r\nX-A: 1\r\n"


def test_what_is_remembered_is_bounded() -> None:
    """However many different statuses, names and values an application says, and however long, each goes out as it is,
    and a bounded number of short ones is remembered."""
    for number in range(2500):
        line = b"X-N%d: %d\r\n" % (number % 1200, number)
        status = f"200 {number}"
        assert head_of([(f"X-N{number % 1200}", str(number))], status) == b"HTTP/1.1 200 %d\r\n%b" % (number, line)
    long = "x" * 5000
    for _ in range(2):
        expected = b"HTTP/1.1 200 %b\r\nX-%b: %b\r\n" % ((long.encode(),) * 3)
        assert head_of([(f"X-{long}", long)], f"200 {long}") == expected
    for memory in (header_lines._known_names, header_lines.known_statuses, header_lines.known_headers):
        assert 0 < len(memory) <= 1000
        assert len(str(max(memory, key=lambda one: len(str(one))))) < 1000


def test_date_beside_threads() -> None:
    """At the turn of a second another thread that looks at the clock finds Date and Server complete at any moment."""

    class Watched(Clock):
        def __setattr__(self, name: str, value: object) -> None:
            super().__setattr__(name, value)
            if getattr(self, "until", 0.0) > time.monotonic():  # so long as this is so others take what is there
                seen.append((self.kept, self.closed, self.date))

    seen: list[tuple[bytes, bytes, bytes]] = []
    clock = Watched("prefork")
    clock.look()
    server = b"Server: prefork\r\n"
    assert seen
    for kept, closed, date in seen:
        assert date.startswith(b"Date: ")
        assert kept == server + date + b"\r\n"
        assert closed == server + date + b"Connection: close\r\n\r\n"


# -- bodies ----------------------------------------------------------------------------------------


def test_body_of_a_stream() -> None:
    """A body that is cut short, or turns out malformed, is an error for whoever reads it, never an end."""
    one, other = socket.socketpair()
    with one, other:
        connection = Connection(site(), other, "")
        connection.feed(CHUNKED + b"5\r\nhello\r\n")
        body = Body(connection, connection.requests[0], lambda: None)
        assert body.read(100) == b"hello"
        one.sendall(b"zz\r\n")
        with pytest.raises(Refused):
            body.read(100)
        with pytest.raises(Refused):
            body.read(100)


def test_head_after_a_streamed_body() -> None:
    """What was read of a body, in however large a piece, does not count as a part of the next head."""
    one, other = socket.socketpair()
    with one, other:
        connection = Connection(site(), other, "")
        connection.feed(POST + b"Content-Length: 131072\r\n\r\n" + b"x" * 65536)
        body = Body(connection, connection.requests.pop(), lambda: None)
        one.sendall(b"x" * 65536)
        assert len(b"".join(iter(lambda: body.read(65536), b""))) == 131072
        connection.feed(GET + b"X: ")
        connection.feed(b"1\r\n\r\n")
        assert (len(connection.requests), connection.fault) == (1, 0)

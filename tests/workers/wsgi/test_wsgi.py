"""The worker class `wsgi`, what it makes of requests and answers: PEP 3333, HTTP/1.1, limits, and what is refused."""

import contextlib
import enum
import json
import os
import signal
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import prefork.workers.wsgi.response as response
from prefork.workers.wsgi.parser import Body, Connection, Limits, ListenerContext, Refused
from prefork.workers.wsgi.response import Clock, Response
from support import Program, patterns, until
from support.scripts import Notes, Start, noted, path_of_modules
from support.web import Answer, Unanswered, Web

pytestmark = pytest.mark.timeout(60)

TCP = "tcp://127.0.0.1:0"
APP = "webapp:app"
TRACE = [patterns.TRACEBACK, r"ValueError: .*", r"prefork\.errors\..*"]


def serve(start: Start, *flags: object, app: str = APP, bind: str = TCP, **options: Any) -> Program:
    """The command over an application, with one worker if no flag says otherwise."""
    env = {**path_of_modules(), **options.pop("env", {})}
    worker = [] if "--worker-class" in flags else ["--worker-class", "wsgi"]
    number = [] if "-w" in flags else ["-w", 1]
    program: Program = start("prefork", app, "-b", bind, *worker, *number, *flags, env=env, **options)
    return program.ready()


@pytest.fixture
def web(start: Start) -> Iterator[Callable[..., Web]]:
    """`web(program)`: a client that is closed with the test."""
    with ExitStack() as stack:
        yield lambda program, **options: stack.enter_context(Web(program.address, **options))


Dial = Callable[..., Web]


# -- requests, in pieces ---------------------------------------------------------------------------

HOST = b"Host: test\r\n"
POST = b"POST /echo HTTP/1.1\r\n" + HOST
CHUNKED = POST + b"Transfer-Encoding: chunked\r\n\r\n"
VALID = {
    "get": b"GET /echo?a=b&c HTTP/1.1\r\n" + HOST + b"\r\n",
    "http 1.0": b"GET /echo HTTP/1.0\r\n\r\n",
    "http 1.0, kept": b"GET /echo HTTP/1.0\r\nConnection: keep-alive\r\n\r\n",
    "http 1.0, kept for a proxy": b"GET /echo HTTP/1.0\r\nProxy-Connection: keep-alive\r\n\r\n",
    "close": b"GET /echo HTTP/1.1\r\nConnection: close\r\n" + HOST + b"\r\n",
    "blank lines first": b"\r\n\r\nGET /echo HTTP/1.1\r\n" + HOST + b"\r\n",
    "escapes": b"GET /echo/%41%e2%82%ac%2F?%41 HTTP/1.1\r\n" + HOST + b"\r\n",
    "whole url": b"GET http://other:81/echo?q HTTP/1.1\r\n" + HOST + b"\r\n",
    "headers": b"GET /echo HTTP/1.1\r\n"
    + HOST
    + b"X-One: 1\r\nx-one: 2\r\nCookie: a\r\nCookie: b\r\nX_Under: 3\r\n\r\n",
    "odd values": b"GET /echo HTTP/1.1\r\n" + HOST + b"X-Empty:\r\nX-Space: \t a b \t\r\nX-High: \xe4\r\n\r\n",
    "length": POST + b"Content-Type: text/x\r\nContent-Length: 5\r\n\r\nhello",
    "no body": POST + b"Content-Length: 0\r\n\r\n",
    "chunks": CHUNKED + b"5\r\nhello\r\n6;x=y\r\n world\r\n0\r\n\r\n",
    "trailers": CHUNKED + b"a\r\n0123456789\r\n0\r\nX-Trailer: 1\r\n\r\n",
    "upgrade": b"GET /echo HTTP/1.1\r\n" + HOST + b"Connection: Upgrade\r\nUpgrade: h2c\r\n\r\n",
    "upgrade with a body": POST + b"Connection: Upgrade\r\nUpgrade: h2c\r\nContent-Length: 5\r\n\r\nhello",
    "upgrade with chunks": POST
    + b"Connection: Upgrade\r\nUpgrade: h2c\r\nTransfer-Encoding: chunked\r\n\r\n1\r\na\r\n0\r\n\r\n",
}


class Bounds(Limits):
    """The shipped ones."""


class Desk:
    """What a response asks of its worker."""

    def __init__(self) -> None:
        self.clock, self.draining = Clock(""), False


def site(max_body: int = 0) -> ListenerContext:
    return ListenerContext(lambda *_: [], {"SCRIPT_NAME": ""}, Bounds(), max_body, 10, Response.maker(Desk()))


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


def test_split_anywhere_on_the_wire(start: Start, web: Dial) -> None:
    """Over a connection too, at every byte: the answer is that to the whole request."""
    program = serve(start)
    for name in ("headers", "length", "chunks", "upgrade with a body"):
        raw = VALID[name]
        kept = web(program)
        whole = kept.send(raw).answer()
        for at in range(1, len(raw)):
            again = kept.send(raw[:at], raw[at:]).answer()
            assert (again.status, again.body) == (200, whole.body), (name, at)
    program.finish()


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


# -- malformed -------------------------------------------------------------------------------------

GET = b"GET / HTTP/1.1\r\n" + HOST
MALFORMED = {
    "garbage": (b"\x16\x03\x01\x02\x00\x01\x00", 400),
    "no method": (b" / HTTP/1.1\r\n\r\n", 400),
    "unknown method": (b"FOO / HTTP/1.1\r\n" + HOST + b"\r\n", 501),
    "small letters": (b"get / HTTP/1.1\r\n" + HOST + b"\r\n", 501),
    "no version": (b"GET /\r\n\r\n", 505),
    "http 2 over text": (b"GET / HTTP/2.0\r\n" + HOST + b"\r\n", 505),
    "http 2 preface": (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 400),
    "http 1.2": (b"GET / HTTP/1.2\r\n" + HOST + b"\r\n", 400),
    "space in the target": (b"GET /a b HTTP/1.1\r\n" + HOST + b"\r\n", 400),
    "NUL in the target": (b"GET /\0 HTTP/1.1\r\n" + HOST + b"\r\n", 400),
    "fragment": (b"GET /#a HTTP/1.1\r\n" + HOST + b"\r\n", 400),
    "star": (b"GET * HTTP/1.1\r\n" + HOST + b"\r\n", 400),
    "connect": (b"CONNECT a:80 HTTP/1.1\r\n" + HOST + b"\r\n", 501),
    "connect to a path": (b"CONNECT / HTTP/1.1\r\n" + HOST + b"\r\n", 501),
    "connect with a body": (b"CONNECT / HTTP/1.0\r\nContent-Length: 1\r\n\r\na", 501),
    "connect and upgrade": (
        b"CONNECT http://a/ HTTP/1.1\r\n" + HOST + b"Connection: upgrade\r\nUpgrade: x\r\n\r\n",
        501,
    ),
    "no host": (b"GET / HTTP/1.1\r\n\r\n", 400),
    "two hosts": (GET + HOST + b"\r\n", 400),
    "bare LF": (b"GET / HTTP/1.1\nHost: test\n\n", 400),
    "bare LF after a value": (b"GET / HTTP/1.1\r\nHost: test\n\r\n", 400),
    "bare CR in a value": (GET + b"X: a\rb\r\n\r\n", 400),
    "folded": (GET + b"X: a\r\n b\r\n\r\n", 400),
    "space before the colon": (GET + b"X : a\r\n\r\n", 400),
    "space before the name": (GET + b"\tX: a\r\n\r\n", 400),
    "no name": (GET + b": a\r\n\r\n", 400),
    "no colon": (GET + b"X\r\n\r\n", 400),
    "bad name": (GET + b"X(: a\r\n\r\n", 400),
    "NUL in a value": (GET + b"X: a\0b\r\n\r\n", 400),
    "two lengths": (POST + b"Content-Length: 1\r\nContent-Length: 1\r\n\r\na", 400),
    "a list of lengths": (POST + b"Content-Length: 1, 1\r\n\r\na", 400),
    "signed length": (POST + b"Content-Length: +1\r\n\r\na", 400),
    "hexadecimal length": (POST + b"Content-Length: 0x1\r\n\r\na", 400),
    "length with an underscore": (POST + b"Content-Length: 1_0\r\n\r\na", 400),
    "empty length": (POST + b"Content-Length:\r\n\r\na", 400),
    "huge length": (POST + b"Content-Length: 99999999999999999999\r\n\r\na", 400),
    "length, then chunked": (POST + b"Content-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", 400),
    "chunked, then length": (POST + b"Transfer-Encoding: chunked\r\nContent-Length: 1\r\n\r\n0\r\n\r\n", 400),
    "chunked not last": (POST + b"Transfer-Encoding: chunked, gzip\r\n\r\n0\r\n\r\n", 400),
    "chunked twice": (POST + b"Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", 400),
    "not quite chunked": (POST + b"Transfer-Encoding: xchunked\r\n\r\n0\r\n\r\n", 501),
    "another coding": (POST + b"Transfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n", 501),
    "chunked in 1.0": (b"POST / HTTP/1.0\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", 400),
    "chunk size of letters": (CHUNKED + b"xyz\r\n", 400),
    "chunk size signed": (CHUNKED + b"-1\r\na\r\n0\r\n\r\n", 400),
    "chunk size with 0x": (CHUNKED + b"0x1\r\na\r\n0\r\n\r\n", 400),
    "chunk size with a space": (CHUNKED + b"1 \r\na\r\n0\r\n\r\n", 400),
    "chunk size overflows": (CHUNKED + b"fffffffffffffffff\r\n", 400),
    "chunk longer than it says": (CHUNKED + b"1\r\nab\r\n0\r\n\r\n", 400),
    "chunk without its end": (CHUNKED + b"1\r\naXX0\r\n\r\n", 400),
    "chunks of bare LF": (CHUNKED + b"1\na\n0\n\n", 400),
    "LF in an extension": (CHUNKED + b"1;a\nb\r\na\r\n0\r\n\r\n", 400),
    "length in a trailer": (CHUNKED + b"0\r\nContent-Length: 5\r\n\r\n", 400),
    "unknown expectation": (POST + b"Expect: more\r\nContent-Length: 1\r\n\r\na", 417),
    "long target": (b"GET /" + b"a" * 9000 + b" HTTP/1.1\r\n" + HOST + b"\r\n", 414),
    "endless target": (b"GET /" + b"a" * 200_000, 414),
    "many headers": (GET + b"".join(b"X-%d: 1\r\n" % n for n in range(200)) + b"\r\n", 431),
    "one header many times": (GET + b"X: 1\r\n" * 200 + b"\r\n", 431),
    "long header": (GET + b"X: " + b"a" * 200_000, 431),
    "endless blank lines": (b"\r\n" * 100_000, 431),
}


def test_malformed(start: Start, web: Dial) -> None:
    """Each is refused with its status and the end of the connection; what follows on it is never looked at. One worker
    survives them all, without a traceback."""
    program = serve(start)
    (worker,) = program.wait_ready(1)
    for name, (raw, status) in MALFORMED.items():
        client = web(program)
        answer = client.send(raw, GET + b"\r\n").answer()
        assert (name, answer.status, answer.closes) == (name, status, True)
        assert client.is_over(), name
    assert web(program).get("/pid").body == b"%d\n" % worker
    program.finish()


def test_malformed_after_good(start: Start, web: Dial) -> None:
    """What came before a malformed request, in the same segment, is answered; then the connection ends."""
    program = serve(start)
    client = web(program).send(GET + b"\r\n" + GET + b"\r\n" + b"GARBAGE\r\n\r\n")
    assert [client.answer().status for _ in range(3)] == [200, 200, 400]
    assert client.is_over()
    program.finish()


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(noise=st.one_of(st.binary(max_size=200), st.text(alphabet="GET /:HTP1.\r\n 0aX", max_size=80).map(str.encode)))
def test_garbage_on_the_wire(noisy: Program, noise: bytes) -> None:
    """Whatever comes is answered by an error, or by nothing, and the worker lives."""
    with Web(noisy.address) as client:
        client.send(noise)
        client.sock.shutdown(socket.SHUT_WR)
        with contextlib.suppress(Unanswered, ConnectionResetError):
            assert 200 <= client.answer().status <= 505
    with Web(noisy.address) as client:
        assert client.get("/pid").body == b"%d\n" % noisy.children()[0]


@pytest.fixture
def noisy(start: Start) -> Program:
    return serve(start)


# -- limits and deadlines --------------------------------------------------------------------------


def test_max_body(start: Start, web: Dial) -> None:
    """A body longer than max_body is refused: by its length before any of it is read, in chunks when it is too long."""
    program = serve(start, "--max-body", 100)
    assert json.loads(web(program).get("/upload", method="POST", body=b"x" * 100).body)[0] == 100
    client = web(program).send(b"POST /upload HTTP/1.1\r\n" + HOST + b"Content-Length: 101\r\n\r\n")
    assert (client.answer().status, client.is_over()) == (413, True)
    client = web(program).send(b"POST /upload HTTP/1.1\r\n" + HOST + b"Transfer-Encoding: chunked\r\n\r\n")
    client.send(b"50\r\n" + b"x" * 80 + b"\r\n" + b"50\r\n" + b"x" * 80 + b"\r\n")
    assert (client.answer().status, client.is_over()) == (413, True)
    program.finish()


QUICK = """
import prefork
from prefork.workers.wsgi.worker import WSGIWorker

class Quick(WSGIWorker):
    HEAD_TIMEOUT = 0.3
    BODY_TIMEOUT = 0.3
    SEND_TIMEOUT = 0.3
    MAX_KEPT = 3
    TICK = 0.05
"""


def quick(start: Start, *flags: object) -> Program:
    return serve(start, "--worker-class", "quick:Quick", *flags, files={"quick.py": QUICK})


def test_slow_clients_are_let_go(start: Start, web: Dial) -> None:
    """A head or a body that does not come in time is answered with 408, a connection without a byte with its end."""
    program = quick(start)
    long = b"POST /upload HTTP/1.1\r\n" + HOST + b"Content-Length: 100000\r\n\r\n"
    for said, status in (
        (b"GET / HT", 408),
        (POST + b"Content-Length: 5\r\n\r\nhell", 408),
        (long, 408),
        (CHUNKED, 408),
    ):
        client = web(program).send(said)
        assert (client.answer().status, client.is_over()) == (status, True), said
    assert web(program).rest() == b""
    for begun in (b"GET /", b"G"):
        kept = web(program)
        assert kept.get().status == 200
        assert kept.send(begun).answer().status == 408
        kept = web(program).send(GET + b"\r\n" + begun)
        assert [kept.answer().status, kept.answer().status] == [200, 408]
    program.finish()


def test_slow_reader_is_let_go(start: Start, web: Dial) -> None:
    """A client that takes nothing of its answer loses it, and the worker serves the next one."""
    program = quick(start)
    silent = web(program)
    silent.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    silent.send(b"GET /download/100000000 HTTP/1.1\r\n" + HOST + b"\r\n")
    assert web(program).get("/pid").status == 200
    with pytest.raises(ConnectionResetError):
        silent.rest()
    program.finish()


def test_kept_connections_end(start: Start, web: Dial) -> None:
    """A connection is kept while it is used, up to a number of requests; one that idles is closed in time."""
    program = quick(start, "--keepalive-timeout", 0.5)
    client = web(program)
    assert [client.get().closes for _ in range(3)] == [False, False, True]
    assert client.is_over()
    idle = web(program)
    idle.get()
    begun = time.monotonic()
    assert idle.is_over()
    assert 0.4 < time.monotonic() - begun < 3
    program.finish()


def test_no_keepalive(start: Start, web: Dial) -> None:
    """keepalive_timeout = 0 closes after each answer, and says so."""
    program = serve(start, "--keepalive-timeout", 0)
    client = web(program)
    assert client.get().closes
    assert client.is_over()
    program.finish()


def test_max_connections(start: Start, web: Dial) -> None:
    """At the bound the longest idle connection makes room; where none is idle, new ones wait for one of them."""
    program = serve(start, "--max-connections", 3)
    first = web(program)
    assert first.get().status == 200
    others = [web(program) for _ in range(2)]
    assert [other.get().status for other in others] == [200, 200]
    newest = web(program)
    assert newest.get().status == 200
    assert first.is_over()
    half = [web(program).send(b"GET / HTTP/1.1\r\n") for _ in range(4)]
    waiting = web(program).send(GET + b"\r\n")
    assert [one.send(HOST + b"\r\n").answer().status for one in half] == [200] * 4
    assert waiting.answer().status == 200
    program.finish()


def test_request_timeout(start: Start, web: Dial) -> None:
    """An application that takes longer than request_timeout is interrupted: 503, and the worker lives."""
    program = serve(start, "--request-timeout", 0.3, allow=TRACE)
    (worker,) = program.wait_ready(1)
    client = web(program)
    answer = client.get("/hang")
    assert (answer.status, answer.closes, client.is_over()) == (503, True, True)
    assert web(program).get("/pid").body == b"%d\n" % worker
    assert "RequestTimeout" in program.log
    program.finish()


# -- the environment -------------------------------------------------------------------------------


def environ_of(answer: Answer) -> dict[str, str]:
    found: dict[str, str] = json.loads(answer.body)["environ"]
    return found


def test_environ(start: Start, web: Dial) -> None:
    """The environment is PEP 3333's: unescaped path, raw query, headers as text, both ends of the connection."""
    program = serve(start)
    host, port = program.address.where, str(program.address.port)
    client = web(program)
    found = environ_of(client.send(VALID["escapes"]).answer())
    assert {name: found[name] for name in ("REQUEST_METHOD", "SCRIPT_NAME", "PATH_INFO", "QUERY_STRING")} == {
        "REQUEST_METHOD": "GET",
        "SCRIPT_NAME": "",
        "PATH_INFO": "/echo/A\xe2\x82\xac/",
        "QUERY_STRING": "%41",
    }
    assert (found["SERVER_NAME"], found["SERVER_PORT"], found["SERVER_PROTOCOL"]) == (host, port, "HTTP/1.1")
    assert (found["REMOTE_ADDR"], found["wsgi.url_scheme"], found["HTTP_HOST"]) == ("127.0.0.1", "http", "test")
    found = environ_of(client.send(VALID["headers"]).answer())
    assert (found["HTTP_X_ONE"], found["HTTP_COOKIE"], "HTTP_X_UNDER" in found) == ("1,2", "a; b", False)
    found = environ_of(client.send(VALID["odd values"]).answer())
    assert (found["HTTP_X_EMPTY"], found["HTTP_X_SPACE"], found["HTTP_X_HIGH"]) == ("", "a b", "\xe4")
    found = environ_of(client.send(VALID["whole url"]).answer())
    assert (found["HTTP_HOST"], found["PATH_INFO"], found["QUERY_STRING"]) == ("other:81", "/echo", "q")
    found = environ_of(client.send(VALID["length"]).answer())
    assert (found["CONTENT_TYPE"], found["CONTENT_LENGTH"], "HTTP_CONTENT_LENGTH" in found) == ("text/x", "5", False)
    found = environ_of(client.send(VALID["http 1.0"]).answer())
    assert found["SERVER_PROTOCOL"] == "HTTP/1.0"
    program.finish()


def test_liberties_of_an_application(start: Start, web: Dial) -> None:
    """One that closes its input does no harm to the next request, with a body or without, and headers may be lists."""
    program = serve(start)
    client = web(program)
    for body in (b"", b"", b"given", b""):
        answer = client.get("/shut", method="POST" if body else "GET", body=body)
        assert (answer.status, answer.body, answer.headers["content-type"]) == (200, body, "text/plain")
    assert client.get("/upload").body.startswith(b"[0, ")
    program.finish()


def test_validator(start: Start, web: Dial, notes: Notes) -> None:
    """The standard library's validator finds nothing wrong with the server, nor does it change an answer."""
    program = serve(start, app="webapp:valid", allow=TRACE)
    plain = serve(start)
    for path in ("/pid", "/parts", "/list", "/write", "/again", "/empty", "/file/70000", "/status/404", "/echo"):
        answer, expected = web(program).get(path), web(plain).get(path)
        assert answer.status == expected.status, path
        assert path in ("/pid", "/echo") or answer.body == expected.body
        assert web(program).get(path, method="HEAD").status == answer.status
    assert web(program).get("/upload", method="POST", body=b"x" * 100_000).status == 200
    with pytest.raises(ConnectionResetError):
        web(program).get("/late")
    assert "AssertionError" not in program.log
    program.finish()
    plain.finish()


# -- answers ---------------------------------------------------------------------------------------


def test_answers(start: Start, web: Dial, notes: Notes) -> None:
    """A body of known length says it, one of unknown length comes in chunks; an iterable is closed."""
    program = serve(start)
    client = web(program)
    answer = client.get("/pid")
    assert (answer.headers["content-length"], answer.headers["content-type"]) == (str(len(answer.body)), "text/plain")
    assert answer.headers["server"] == "prefork"
    assert abs(parsedate_to_datetime(answer.headers["date"]).timestamp() - time.time()) < 5
    assert (client.get("/parts").body, client.get("/parts").chunked) == (b"onetwothree", True)
    noted(notes, "closed", 2)
    answer = client.get("/list")
    assert (answer.body, answer.headers["content-length"]) == (b"onetwo", "6")
    assert client.get("/write").body == b"written twice and returned"
    for path in ("/empty", "/empty/closing"):
        assert client.get(path).headers["content-length"] == "0"
    assert (client.get("/again").reason, client.get("/again").body) == ("Second", b"second")
    assert client.get("/download/300000").body == client.get("/whole/300000").body
    assert client.get("/header/Server=other").headers["server"] == "other"
    assert client.get("/header/Date=then").headers["date"] == "then"
    program.finish()


def test_answers_to_http_1_0(start: Start, web: Dial) -> None:
    """HTTP/1.0 gets no chunks: the body ends with the connection; a kept one says so."""
    program = serve(start)
    client = web(program).send(b"GET /parts HTTP/1.0\r\n\r\n")
    answer = client.answer()
    assert (answer.body, answer.closes, answer.chunked) == (b"onetwothree", True, False)
    kept = web(program)
    for _ in range(2):
        answer = kept.send(b"GET /pid HTTP/1.0\r\nConnection: keep-alive\r\n\r\n").answer()
        assert answer.headers["connection"] == "keep-alive"
    assert kept.send(b"GET /parts HTTP/1.0\r\nConnection: keep-alive\r\n\r\n").answer().closes
    assert kept.is_over()
    program.finish()


def test_answers_without_a_body(start: Start, web: Dial) -> None:
    """HEAD, 204 and 304 have no body, whatever the application gave, and the connection goes on."""
    program = serve(start)
    client = web(program)
    whole = client.get("/list")
    head = client.get("/list", method="HEAD")
    assert {**head.headers, "date": ""} == {**whole.headers, "date": ""}
    for path in ("/parts", "/write", "/file/1000", "/empty"):
        assert client.get(path, method="HEAD").status == 200
    for status in ("204", "304"):
        answer = client.get(f"/status/{status}")
        assert (answer.status, answer.headers.get("content-length"), answer.chunked) == (int(status), None, False)
    assert client.get("/status/404").body == b"body"
    assert client.get("/pid").status == 200
    program.finish()


def test_answers_of_a_wrong_length(start: Start, web: Dial) -> None:
    """More than the Content-Length is left out; less ends the connection, so the client can tell. Both are logged."""
    program = serve(start)
    client = web(program)
    assert client.get("/length/3/5").body == b"xxx"
    assert client.get("/length/3/3").body == b"xxx"
    client.send(b"GET /length/5/3 HTTP/1.1\r\n" + HOST + b"\r\n")
    with pytest.raises(Unanswered):
        client.answer()
    assert program.log.count("more than its Content-Length") == 1
    assert program.log.count("gave 3 bytes of a body of 5") == 1
    program.finish()


def test_headers_by_the_thousand(start: Start, web: Dial) -> None:
    """Any number of different headers go out as the application gave them, and what is wrong in one of them is found
    however often others of its name were right."""
    program = serve(start, allow=TRACE)
    client = web(program)
    for number in range(1500):
        answer = client.get(f"/header/X-{number % 1100}={number}")
        assert (answer.status, answer.headers[f"x-{number % 1100}"]) == (200, str(number))
    assert client.get("/header/X-Split=well").status == 200
    assert client.get("/split").status == 500
    program.finish()


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
    for memory in (response._names, response._statuses, response._headers):
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


FAULTS = (
    *("/raise", "/twice", "/never", "/text", "/split", "/badstatus/OK", "/badstatus/2000 Long", "/badstatus/100 Wait"),
    "/never/iterated",
    *("/header/Connection=close", "/header/transfer-encoding=chunked", "/header/Keep-Alive=1", "/header/Up grade=1"),
    *("/header/X:y=1", "/header/=1", "/header/Content-Length=-1", "/header/Content-Length=x", "/header/Upgrade=h2c"),
)


def test_faults_of_the_application(start: Start, web: Dial) -> None:
    """An application that raises, or breaks PEP 3333, is answered for with 500, and logged with its traceback."""
    program = serve(start, allow=[*TRACE, r"AssertionError: .*", r"TypeError: .*"])
    (worker,) = program.wait_ready(1)
    for path in FAULTS:
        client = web(program)
        answer = client.get(path.replace(" ", "%20"))
        assert (path, answer.status, answer.closes, "Set-Cookie" in str(answer)) == (path, 500, True, False)
        assert client.is_over()
        assert f"the application raised at GET {path.replace(' ', '%20')}" in program.log
    assert web(program).get("/pid").body == b"%d\n" % worker
    program.finish()


def test_fault_halfway(start: Start, web: Dial, notes: Notes) -> None:
    """Where the answer has begun its connection is reset, so that no client takes the half for the whole."""
    program = serve(start, allow=TRACE)
    for path in ("/halfway", "/late"):
        for version in ("1.0", "1.1"):
            client = web(program).send(f"GET {path} HTTP/{version}\r\n".encode() + HOST + b"\r\n")
            with pytest.raises(ConnectionResetError):
                client.answer()
    noted(notes, "closed", 2)
    assert web(program).get("/pid").status == 200
    program.finish()


def test_exit_in_an_application(start: Start, web: Dial) -> None:
    """A SystemExit ends its worker, after a 500, or a reset where an answer has begun, and the worker is replaced."""
    program = serve(start)
    (worker,) = program.wait_ready(1)
    assert web(program).get("/leave").status == 500
    (worker,) = program.wait_ready(1, without=[worker])
    client = web(program).send(b"GET /leave/halfway HTTP/1.0\r\n\r\n")
    with pytest.raises(ConnectionResetError):
        client.rest()
    program.wait_ready(1, without=[worker])
    program.finish()


def test_client_that_leaves(start: Start, web: Dial, notes: Notes) -> None:
    """A client that goes away in the middle of its request or its answer is no error of anybody; close() is called."""
    program = serve(start)
    for raw in (
        POST + b"Content-Length: 9\r\n\r\nhalf",
        POST + b"Content-Length: 100000\r\n\r\nhalf",
        b"GET /down",
        b"",
    ):
        web(program).send(raw).sock.close()
    gone = web(program).send(b"GET /download/50000000 HTTP/1.1\r\n" + HOST + b"\r\n")
    gone.sock.recv(1000)
    gone.sock.close()
    assert web(program).get("/pid").status == 200
    program.finish()


# -- bodies ----------------------------------------------------------------------------------------


def test_input(start: Start, web: Dial) -> None:
    """wsgi.input reads lines, all, a part, in whichever way the body came."""
    program = serve(start)
    text = b"first\nsecond\nthird\nfourth"
    expected = ["first\n", "sec", "ond\n", "third\n", "fourth", ""]
    client = web(program)
    assert json.loads(client.get("/lines", method="POST", body=text).body) == expected
    chunks = b"".join(b"%x\r\n%b\r\n" % (len(part), part) for part in (text[:3], text[3:14], text[14:]))
    client.send(b"POST /lines HTTP/1.1\r\n" + HOST + b"Transfer-Encoding: chunked\r\n\r\n" + chunks + b"0\r\n\r\n")
    assert json.loads(client.answer().body) == expected
    client.send(b"POST /lines HTTP/1.1\r\n" + HOST + b"Expect: 100-continue\r\n")
    client.send(b"Content-Length: %d\r\n\r\n" % len(text))
    assert client.answer().status == 100
    assert json.loads(client.send(text).answer().body) == expected
    program.finish()


def test_continue(start: Start, web: Dial) -> None:
    """100 Continue is sent when the application reads, and only then; where it does not, the answer comes at once."""
    program = serve(start)
    head = b"HTTP/1.1\r\n" + HOST + b"Expect: 100-continue\r\nContent-Length: 5\r\n\r\n"
    client = web(program).send(b"POST /echo " + head)
    assert (client.answer().status, client.buffer) == (100, b"")
    assert json.loads(client.send(b"hello").answer().body)["body"] == "hello"
    unread = web(program).send(b"POST /ignore " + head)
    answer = unread.answer()
    assert (answer.status, answer.body, answer.closes) == (200, b"ignored", True)
    hasty = web(program).send(b"POST /echo " + head + b"hello")
    assert hasty.answer().status == 200
    program.finish()


def test_body_left_unread(start: Start, web: Dial) -> None:
    """An application that does not read its body is no hazard: a short one was read for it, a long one ends the
    connection, and the client has its answer though it was still sending."""
    program = serve(start)
    client = web(program)
    assert client.get("/ignore", method="POST", body=b"GET /leave HTTP/1.1\r\n\r\n").body == b"ignored"
    assert client.get("/pid").status == 200
    long = web(program).send(b"POST /ignore HTTP/1.1\r\n" + HOST + b"Content-Length: 1000000\r\n\r\n", b"x" * 900_000)
    answer = long.answer()
    assert (answer.body, answer.closes, long.send(b"x" * 100_000).is_over()) == (b"ignored", True, True)
    program.finish()


def peak(pid: int) -> int:
    """The most memory that a process ever had, in bytes."""
    text = Path(f"/proc/{pid}/status").read_text()
    return 1024 * int(text.partition("VmHWM:")[2].split()[0])


@pytest.mark.parametrize("chunked", [False, True])
def test_large_bodies_are_streamed(start: Start, web: Dial, chunked: bool) -> None:
    """64 MiB up and 64 MiB down leave the worker's memory as it was."""
    program = serve(start)
    client = web(program, timeout=30)
    (worker,) = program.wait_ready(1)
    client.get("/upload", method="POST", body=b"x" * 200_000)
    before = peak(worker)
    block, count = os.urandom(1 << 20), 64
    framing = b"Transfer-Encoding: chunked" if chunked else b"Content-Length: %d" % (count << 20)
    client.send(b"POST /upload HTTP/1.1\r\n" + HOST + framing + b"\r\n\r\n")
    for _ in range(count):
        client.send(*([b"100000\r\n", block, b"\r\n"] if chunked else [block]))
    size, _digest, pid = json.loads(client.send(b"0\r\n\r\n" if chunked else b"").answer().body)
    assert (size, pid) == (count << 20, worker)
    if not chunked:
        assert len(client_download(program, web)) == count << 20
    assert peak(worker) - before < 8 << 20
    program.finish()


def client_download(program: Program, web: Dial) -> bytes:
    client = web(program).send(b"GET /download/%d HTTP/1.0\r\n\r\n" % (64 << 20))
    body: bytes = client.answer().body
    return body


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


def test_file_wrapper(start: Start, web: Dial) -> None:
    """A file is sent from where it stands, with its length; what is no file is read."""
    program = serve(start)
    client = web(program)
    pattern = b"0123456789abcdef" * 4096 * 32
    answer = client.get("/file/1000000")
    assert (answer.body, answer.headers["content-length"]) == (pattern[:1_000_000], "1000000")
    assert client.get("/file/1000/990").body == pattern[990:1000]
    assert client.get("/file/0").body == b""
    assert client.get("/nofile").body == b"in memory" * 1000
    last = client.get("/file/300000", "Connection: close")
    assert (last.body, client.is_over()) == (pattern[:300_000], True)
    program.finish()


def test_pipelining(start: Start, web: Dial) -> None:
    """Requests that are sent without waiting are answered in order; after one that closes nothing is answered."""
    program = serve(start)
    client = web(program)
    client.send(b"".join(b"GET /echo?%d HTTP/1.1\r\n" % number + HOST + b"\r\n" for number in range(50)))
    assert [environ_of(client.answer())["QUERY_STRING"] for _ in range(50)] == [str(n) for n in range(50)]
    client.send(
        VALID["length"] + VALID["chunks"] + b"GET /pid HTTP/1.1\r\nConnection: close\r\n" + HOST + b"\r\n" + GET
    )
    bodies = [client.answer().body for _ in range(3)]
    assert json.loads(bodies[0])["body"] == "hello"
    assert json.loads(bodies[1])["body"] == "hello world"
    assert client.is_over()
    program.finish()


# -- the log ---------------------------------------------------------------------------------------


def test_access_log(start: Start, web: Dial) -> None:
    """One line a request in the combined format, which a rotation and USR1 make go to the new file."""
    program = serve(start, "--access-log", "access.log")
    client = web(program)
    client.get("/echo?x", 'User-Agent: a "quoted" one', "Referer: http://x/")
    client.send(b"GET /parts HTTP/1.0\r\n\r\n").answer()
    path = program.work / "access.log"
    first, second = until(lambda: rows if len(rows := path.read_text().splitlines()) == 2 else None) or ["", ""]
    assert first.startswith("127.0.0.1 - - [") and '] "GET /echo?x HTTP/1.1" 200 ' in first
    assert first.endswith(r' "http://x/" "a \x22quoted\x22 one"')
    assert second.endswith('] "GET /parts HTTP/1.0" 200 11 "-" "-"')
    path.rename(program.work / "access.1")
    program.send(signal.SIGUSR1)
    until(path.exists)
    web(program).get("/pid")
    until(lambda: '"GET /pid HTTP/1.1" 200' in path.read_text())
    program.finish()


def test_access_log_on_stdout(start: Start, web: Dial) -> None:
    """`-` is standard output."""
    program = serve(start, "--access-log", "-")
    web(program).get("/status/204")
    until(lambda: '"GET /status/204 HTTP/1.1" 204 0 "-" "-"' in program.out_path.read_text())
    program.finish()

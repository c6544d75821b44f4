"""The worker class `wsgi` reads requests in pieces, and refuses malformed ones."""

import contextlib
import socket

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from support import Program
from support.scripts import Start
from support.web import Unanswered, Web
from support.wsgi import CHUNKED, GET, HOST, POST, VALID, Dial, serve

pytestmark = pytest.mark.timeout(60)


# -- requests, in pieces ---------------------------------------------------------------------------


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


# -- malformed -------------------------------------------------------------------------------------

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

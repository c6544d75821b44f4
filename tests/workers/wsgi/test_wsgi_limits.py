"""The worker class `wsgi` keeps its limits and deadlines: bodies, slow clients, connections, requests."""

import json
import socket
import time

import pytest

from support import Program
from support.scripts import Start
from support.wsgi import CHUNKED, GET, HOST, POST, TRACE, Dial, serve

pytestmark = pytest.mark.timeout(60)


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

"""The worker class `wsgi`: what comes to no request leaves a line in both logs; and which methods it takes."""

import re
from typing import Any

import pytest

from support import Program, until
from support.scripts import Start, path_of_modules
from support.web import Web

pytestmark = pytest.mark.timeout(60)

APP = """
import prefork.workers.wsgi.worker

def app(environ, start_response):
    body = environ["wsgi.input"].read() if environ["PATH_INFO"] == "/read" else b""
    start_response("200 OK", [("X-Target", environ["PATH_INFO"])])
    return [environ["REQUEST_METHOD"].encode() + body]

class Quick(prefork.workers.wsgi.worker.WSGIWorker):
    HEAD_TIMEOUT = BODY_TIMEOUT = 0.2
    TICK = 0.05
    SERVER = ""
"""
HOST = b"User-Agent: tester\r\nHost: test\r\n"
GET = b"GET /x HTTP/1.1\r\n" + HOST
POST = b"POST /x HTTP/1.1\r\n" + HOST
CHUNKED, CHUNK = b"Transfer-Encoding: chunked\r\n\r\n", b"64\r\n" + b"x" * 100 + b"\r\n"

GOT, POSTED = "GET /x HTTP/1.1", "POST /x HTTP/1.1"
LATE = r"the %s did not arrive within 0\.2 s"
LONG = "the body is longer than 150 bytes"
MANY = "the head has more than 100 headers"
ODD = r"nobody here meets the expectation '\"m\\xf6re!{95}'"
LARGE = "the head is longer than 65536 bytes"

# What is sent; the status; the reason in the log, as a regex; the first line in the access log, and its user agent.
REFUSED: dict[str, tuple[bytes, int, str, str, str]] = {
    "garbage": (b"\x16\x03\x01\r\n\r\n", 400, "Invalid method encountered", "-", "-"),
    "two hosts": (GET + b"Host: b\r\n\r\n", 400, "the head has two Host headers", GOT, "tester"),
    "no host": (b"GET /x HTTP/1.1\r\n\r\n", 400, "the head has no Host header", GOT, "-"),
    "no version": (b"GET /x y\r\n\r\n", 400, "Expected HTTP/.*", "GET /x", "-"),
    "bad header": (GET + b"X : y\r\n\r\n", 400, "Invalid header token", GOT, "tester"),
    "bad chunk": (POST + CHUNKED + b"z\r\n", 400, ".*chunk size", POSTED, "tester"),
    "no url": (b"GET *x HTTP/1.1\r\n" + HOST + b"\r\n", 400, "the target is no URL.*", "GET *x HTTP/1.1", "tester"),
    "head": (b"GET /x HTTP/1.1\r\nHo", 408, LATE % "head", GOT, "-"),
    "first byte": (b"G", 408, LATE % "head", "-", "-"),
    "body": (POST + b"Content-Length: 2\r\n\r\nx", 408, LATE % "body", POSTED, "tester"),
    "length": (POST + b"Content-Length: 200\r\n\r\n", 413, LONG, POSTED, "tester"),
    "chunks": (POST + CHUNKED + 2 * CHUNK, 413, LONG, POSTED, "tester"),
    "target": (b"GET /" + b"a" * 9000, 414, "the target is longer than 8190 bytes", "GET /" + "a" * 195, "-"),
    "expectation": (GET + b'Expect: "m\xf6re' + b"!" * 500 + b"\r\n\r\n", 417, ODD, GOT, "tester"),
    "headers": (GET + b"".join(b"X-%d: 1\r\n" % number for number in range(200)) + b"\r\n", 431, MANY, GOT, "tester"),
    "one header": (GET + b"X: 1\r\n" * 200 + b"\r\n", 431, MANY, GOT, "tester"),
    "long head": (GET + b"X: " + b"1" * 70_000, 431, LARGE, GOT, "tester"),
    "nothing but lines": (b"\r\n" * 40_000, 431, LARGE, "-", "-"),
    "connect": (b"CONNECT a:80 HTTP/1.1\r\n" + HOST + b"\r\n", 501, "CONNECT is .*", "CONNECT a:80 HTTP/1.1", "tester"),
    "method": (b"TURN /x?y HTTP/1.1\r\n\r\n", 501, "the method 'TURN' is unknown", "TURN /x?y HTTP/1.1", "-"),
    "coding": (
        POST + b"Transfer-Encoding: gzip, chunked\r\n\r\n",
        501,
        ".* 'gzip, chunked' .*",
        POSTED,
        "tester",
    ),
    "version": (b"GET /x HTTP/2.0\r\n" + HOST + b"\r\n", 505, r"HTTP/2\.0 is .*", "GET /x HTTP/2.0", "tester"),
}


def serve(start: Start, *flags: object, **options: Any) -> Program:
    argv = ["app:app", "-b", "tcp://127.0.0.1:0", "--worker-class", "app:Quick", "-w", 1, "--access-log", "access"]
    program: Program = start("prefork", *argv, *flags, files={"app.py": APP}, env=path_of_modules(), **options)
    return program.ready()


def accesses(program: Program, number: int) -> list[str]:
    """The lines of the access log, once there are so many."""

    def enough() -> list[str] | None:
        lines = (program.work / "access").read_text().splitlines()
        return lines if len(lines) >= number else None

    return until(enough, 5, f"{number} lines in the access log") or []


def reasons(program: Program) -> list[str]:
    return re.findall(r" INFO: worker \d+ \(slot 0, generation 1\) (refused .*)", program.log)


def expected_reason(status: int, port: int, reason: str) -> str:
    """The regex of one of `reasons()`."""
    return rf"refused a request from 127\.0\.0\.1:{port} with status {status}: {reason} \[PF0606\]"


@pytest.mark.parametrize("threads", [1, 2])
def test_what_is_refused_is_told(start: Start, threads: int) -> None:
    """Each refused request is one line of the access log, with as much of its first line as is known, and one of the
    log at level info, with its client and the reason. A client's text is escaped, and short."""
    program = serve(start, "--max-body", 150, "--threads", threads)
    for number, (name, (raw, status, reason, first, agent)) in enumerate(REFUSED.items(), 1):
        with Web(program.address) as client:
            port = client.sock.getsockname()[1]
            answer = client.send(raw).answer()
            assert (answer.status, answer.closes) == (status, True), name
        line = accesses(program, number)[-1]
        expected = rf'127\.0\.0\.1 - - \[.*\] "{re.escape(first)}" {status} \d+ "-" "{agent}"'
        assert re.fullmatch(expected, line), (name, line)
        assert re.fullmatch(expected_reason(status, port, reason), reasons(program)[-1]), name
    assert len(reasons(program)) == len(accesses(program, 1)) == len(REFUSED)
    program.finish()


@pytest.mark.parametrize("threads", [1, 2])
def test_what_is_refused_while_it_is_read(start: Start, threads: int) -> None:
    """A body that an application reads, and that does not come or turns out wrong, has one line in each log, too; so
    has what follows good requests on their connection."""
    program = serve(start, "--threads", threads)
    read = b"POST /read HTTP/1.1\r\n" + HOST + b"Expect: 100-continue\r\nTransfer-Encoding: chunked\r\n\r\n"
    for sent, status, reason in (
        (b"1\r\nx", 408, r"no part of the body arrived for 0\.2 s"),
        (b"z\r\n", 400, "Invalid character in chunk size"),
    ):
        with Web(program.address) as client:
            assert client.send(read).answer().status == 100
            assert client.send(sent).answer().status == status
        assert re.search(reason + r" \[PF0606\]$", reasons(program)[-1]), reasons(program)
    with Web(program.address) as client:
        client.send(GET + b"\r\n" + GET + b"\r\n" + b"GARBAGE\r\n\r\n")
        assert [client.answer().status for _ in range(3)] == [200, 200, 400]
    lines = [line.split('"')[1:3] for line in accesses(program, 5)]
    assert sorted((line, answer.split()[0]) for line, answer in lines) == [  # threads write after they have answered
        ("-", "400"),
        *[("GET /x HTTP/1.1", "200")] * 2,
        ("POST /read HTTP/1.1", "400"),
        ("POST /read HTTP/1.1", "408"),
    ]
    assert len(reasons(program)) == 3
    program.finish()


def test_who_says_nothing_is_not_refused(start: Start) -> None:
    """A client that leaves, or idles until its time is over, leaves no line."""
    program = serve(start, "--keepalive-timeout", 0.2)
    with Web(program.address) as silent, Web(program.address) as idle, Web(program.address) as gone:
        assert idle.get("/x").status == 200
        gone.send(b"GET /").sock.close()
        assert silent.is_over() and idle.is_over()
    assert len(accesses(program, 1)) == 1 and not reasons(program)
    program.finish()


# -- methods -----------------------------------------------------------------------------------------------------------

KNOWN = "DELETE GET POST PUT OPTIONS TRACE PATCH M-SEARCH NOTIFY SUBSCRIBE PROPFIND REPORT MKCOL LOCK PURGE LINK QUERY"
UNKNOWN = ("FOO", "get", "GETX", "PROPS", "VERSION-CONTROL", "X!#$%&'*+.^_`|~1", "DESCRIBE", "ANNOUNCE")
WRONG = (
    b"G(T /x HTTP/1.1\r\n",
    b"G\xc3T /x HTTP/1.1\r\n",
    b"FOO\r\n",
    b"FOO /x\r\n",
    b"FOO /x HTTP/x\r\n",
    b" /x HTTP/1.1\r\n",
)


def test_methods(start: Start) -> None:
    """A method that the parser knows is the application's, be its target a path or the whole server; another one is not
    implemented (RFC 9110, 9.1), however it comes; what is no method is malformed."""
    program = serve(start)
    with Web(program.address) as client:
        for method in KNOWN.split():
            answer = client.get("/x", method=method)
            assert (answer.status, answer.body) == (200, method.encode())
        for method in ("OPTIONS", "M-SEARCH", "NOTIFY"):
            answer = client.get("*", method=method)
            assert (answer.status, answer.body, answer.headers["x-target"]) == (200, method.encode(), "")
        assert client.get("*").status == 400
    for method in UNKNOWN:
        head = method.encode() + b" /x HTTP/1.1\r\n" + HOST + b"\r\n"
        for parts in ((head,), (b"\r\n" + head,), (head[:1], head[1:]), (head[:5], head[5:]), (GET + b"\r\n" + head,)):
            with Web(program.address) as client:
                client.send(*parts[:1])
                if len(parts) > 1:
                    client.send(*parts[1:])
                if parts[0].startswith(GET):
                    assert client.answer().status == 200
                assert client.answer().status == 501, parts
    for raw in WRONG:
        with Web(program.address) as client:
            assert client.send(raw + b"\r\n" + HOST + b"\r\n").answer().status == 400, raw
    program.finish()

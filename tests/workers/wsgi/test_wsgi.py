"""The worker class `wsgi`: the environment of PEP 3333, bodies in both directions, and the access log."""

import json
import os
import signal
from pathlib import Path

import pytest

from support import Program, until
from support.scripts import Notes, Start
from support.web import Answer
from support.wsgi import GET, HOST, TRACE, VALID, Dial, serve

pytestmark = pytest.mark.timeout(60)


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

"""The worker class `wsgi`: a complete answer stays complete, and one that has no body is not iterated for one."""

from contextlib import ExitStack
from typing import Any

import pytest

from support import Program, patterns, until, within
from support.scripts import Notes, Start, noted, path_of_modules
from support.web import Web

pytestmark = pytest.mark.timeout(60)

SIZE = 8 * 65536
TROUBLE = [patterns.TRACEBACK]

APP = '''
import itertools, sys
import prefork.workers.wsgi.worker
from kit import *

class Impatient(prefork.workers.wsgi.worker.WSGIWorker):
    SEND_TIMEOUT = 0.2

class Parts:
    """An iterable of `number` parts of 64 KiB, each of which is noted, with an end of its own."""

    def __init__(self, number, close=None, then=None):
        self.number, self.then = number, then
        self.end = close or (lambda: None)

    def __iter__(self):
        for number in range(self.number) if self.number else itertools.count():
            note(f"part {number}")
            yield b"x" * 65536
        if self.then:
            self.then()

    def close(self):
        note("closed")
        self.end()

class File:
    """A file whose close() fails."""

    def __init__(self, name):
        self.file = open(name, "rb")
        self.fileno, self.tell, self.read = self.file.fileno, self.file.tell, self.file.read

    def close(self):
        self.file.close()
        trouble()

def trouble():
    raise ValueError("ordered trouble")

class Odd:
    def __str__(self):
        trouble()

def endless(start_response, status, headers):
    """An application that is a generator."""
    start_response(status, headers)
    try:
        for number in itertools.count():
            note(f"part {number}")
            yield b"x" * 65536
    finally:
        note("closed")

def app(environ, start_response):
    word, _, rest = environ["PATH_INFO"][1:].partition("/")
    length = [("Content-Length", str(8 * 65536))]
    match word:
        case "close":
            start_response("200 OK", length)
            return Parts(8, trouble)
        case "close-chunks":
            start_response("200 OK", [])
            return Parts(8, trouble)
        case "close-file":
            (HOME / "file").write_bytes(b"x" * 8 * 65536)
            start_response("200 OK", length)
            return environ["wsgi.file_wrapper"](File("file"))
        case "then":
            start_response("200 OK", length)
            return Parts(8, then=trouble)
        case "hang":
            start_response("200 OK", length)
            return Parts(8, lambda: linger(30))
        case "exit":
            start_response("200 OK", length)
            return Parts(8, lambda: sys.exit(3))
        case "swallow":
            write = start_response("200 OK", [])
            for _ in range(400):
                try:
                    write(b"x" * 65536)
                except OSError:
                    note("told")
                    break
            return [b"end"]
        case "write-late":
            write = start_response("200 OK", [])
            return Parts(8, lambda: write(b"late"))
        case "odd":
            environ["HTTP_REFERER"] = Odd()
        case "more":
            start_response("200 OK", length)
            return Parts(0)
        case "endless":
            start_response(rest or "200 OK", [])
            return Parts(0)
        case "generator":
            return endless(start_response, rest or "200 OK", [])
        case "writes":
            write = start_response(rest or "200 OK", [])
            try:
                for number in itertools.count():
                    write(b"x" * 65536)
            finally:
                note("closed")
    start_response("200 OK", [("Content-Length", "2")])
    return [b"ok"]
'''


def serve(start: Start, *flags: object, **options: Any) -> Program:
    kind = [] if "--worker-class" in flags else ["--worker-class", "wsgi"]
    argv = ["app:app", "-b", "tcp://127.0.0.1:0", *kind, *flags]
    program: Program = start("prefork", *argv, files={"app.py": APP}, env=path_of_modules(), **options)
    return program.ready()


def slow(program: Program, stack: ExitStack) -> Web:
    """A client with a small window."""
    return stack.enter_context(Web(program.address, window=4096))


# -- complete ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("path", ["/close", "/close-chunks", "/close-file", "/then"])
def test_a_complete_answer_arrives(start: Start, path: str, threads: int) -> None:
    """Whatever an application raises after the last byte of its answer, a slow client has all of the answer, the
    connection is kept, and the error is logged."""
    program = serve(start, "-w", 1, "--threads", threads, allow=TROUBLE)
    with ExitStack() as stack:
        client = slow(program, stack)
        assert len(client.get(path).body) == SIZE
        assert client.get("/").body == b"ok"
        last = slow(program, stack)
        assert len(last.get(path, "Connection: close").body) == SIZE
        assert last.rest() == b""
    assert program.log.count(f"the application raised after its response to GET {path}") == 2
    assert program.log.count("ValueError: ordered trouble") == 2
    program.finish()


def test_a_late_end_does_not_undo_an_answer(start: Start) -> None:
    """An application that is interrupted, or ends its worker, after its answer has been answered with."""
    program = serve(start, "-w", 1, "--request-timeout", 0.3, allow=TROUBLE)
    (worker,) = program.wait_ready(1)
    with ExitStack() as stack:
        client = slow(program, stack)
        assert len(client.get("/hang").body) == SIZE
        assert client.get("/").body == b"ok"
        assert "RequestTimeout" in program.log
        client = slow(program, stack)
        assert len(client.get("/exit").body) == SIZE
        assert client.rest() == b""
    program.wait_ready(1, without=[worker])
    program.finish()


def test_what_was_lost_stays_lost(start: Start, notes: Notes) -> None:
    """Where a client takes too long, and the application goes on as if nothing had been, its connection is reset: the
    client does not take a part for the whole."""
    program = serve(start, "-w", 1, "--worker-class", "app:Impatient")
    with Web(program.address, window=4096) as client:
        client.send(b"GET /swallow HTTP/1.1\r\nHost: test\r\n\r\n")
        noted(notes, "told")
        with pytest.raises(ConnectionResetError):
            client.answer()
    program.finish()


def test_what_is_written_too_late(start: Start) -> None:
    """What an application writes in its close() is no part of its answer, nor of the next one."""
    program = serve(start, "-w", 1)
    with Web(program.address) as client:
        for _ in range(2):
            answer = client.get("/write-late")
            assert (len(answer.body), answer.chunked) == (SIZE, True)
            assert client.get("/").body == b"ok"
    program.finish()


def test_an_access_log_that_fails(start: Start) -> None:
    """An application whose environ cannot be written to the access log is answered for like any other."""
    program = serve(start, "-w", 1, "--access-log", "access.log", allow=TROUBLE)
    (worker,) = program.wait_ready(1)
    with Web(program.address) as client:
        assert [client.get(path).body for path in ("/odd", "/", "/odd", "/")] == [b"ok"] * 4
    assert program.wait_ready(1) == [worker]
    log = program.work / "access.log"
    until(lambda: log.read_text().count('"GET / HTTP/1.1" 200') == 2, 5, "both others are written")
    assert program.log.count("an access line cannot be written") == 2
    program.finish()


MEMORY = """
import psutil
from kit import *

psutil.PROCFS_PATH = "/nowhere"

def wsgi(environ, start_response):
    start_response("200 OK", [("Content-Length", "2")])
    return [b"ok"]

async def asgi(scope, receive, send):
    assert scope["type"] == "http"
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]})
    await send({"type": "http.response.body", "body": b"ok"})

class Coroutine(prefork.AsyncStreamRequestHandler):
    async def handle(self):
        await self.reader.readline()
        self.writer.write(b"HTTP/1.1 200 OK\\r\\nContent-Length: 2\\r\\n\\r\\nok")

class Plain(socketserver.StreamRequestHandler):
    def handle(self):
        self.rfile.readline()
        self.wfile.write(b"HTTP/1.1 200 OK\\r\\nContent-Length: 2\\r\\n\\r\\nok")
"""
KINDS = {"sync": "Plain", "thread": "Plain", "asyncio": "Coroutine", "wsgi": "wsgi", "asgi": "asgi"}


@pytest.mark.parametrize("kind", KINDS)
def test_memory_that_cannot_be_told(start: Start, kind: str) -> None:
    """Where a worker cannot find out how much memory it has, it says so once, serves, and lives."""
    argv = [f"app:{KINDS[kind]}", "-b", "tcp://127.0.0.1:0", "--worker-class", kind, "-w", 1, "--max-memory", "1G"]
    program = start("prefork", *argv, files={"app.py": MEMORY}, env=path_of_modules()).ready()
    workers = program.wait_ready(1)
    for _ in range(3):
        with Web(program.address) as client:
            assert client.get("/", "Connection: close").body == b"ok"
    program.wait_for("max_memory has no effect")
    assert program.wait_ready(1) == workers
    program.finish()
    assert program.log.count("max_memory has no effect") == 1


# -- without a body ----------------------------------------------------------------------------------------------------

BARE = {
    "HEAD": ("HEAD", "/endless"),
    "204": ("GET", "/endless/204 No Content"),
    "304": ("GET", "/endless/304 Not Modified"),
}
LATE = {name: (method, path.replace("endless", "generator")) for name, (method, path) in BARE.items()}
WRITTEN = {name: (method, path.replace("endless", "writes")) for name, (method, path) in BARE.items()}


def take_heads(program: Program, notes: Notes, method: str, path: str, clients: int) -> None:
    """Each client gets its head and then leaves; its application is told so."""
    for number in range(len(notes("closed")), len(notes("closed")) + clients):
        with Web(program.address) as client:
            answer = client.get(path.replace(" ", "%20"), method=method)
            assert (answer.body, answer.chunked) == (b"", False)
        noted(notes, "closed", number + 1)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("name", BARE)
def test_no_body_is_not_iterated_for(start: Start, notes: Notes, name: str, threads: int) -> None:
    """HEAD, 204 and 304 take no part of an iterable without end, and the first part of a generator that calls
    start_response() only then. Each is closed, nobody is held, and a stop is prompt."""
    program = serve(start, "-w", 2, "--threads", threads)
    take_heads(program, notes, *BARE[name], clients=4)
    assert notes("part") == []
    take_heads(program, notes, *LATE[name], clients=4)
    assert notes("part") == ["0"] * 4
    with Web(program.address) as client:
        method, path = BARE[name]
        for _ in range(3):
            client.get(path.replace(" ", "%20"), method=method)
        assert client.get("/").body == b"ok"
    within(program.stop().seconds, 1)
    program.finish()


@pytest.mark.parametrize("name", BARE)
def test_write_without_a_body(start: Start, notes: Notes, name: str) -> None:
    """An application that calls write() for ever, for an answer that has no body, is told when its client has left."""
    program = serve(start, "-w", 1)
    take_heads(program, notes, *WRITTEN[name], clients=2)
    within(program.stop().seconds, 1)
    program.finish()


def test_more_than_its_length(start: Start, notes: Notes) -> None:
    """An iterable without end, in an answer that has one, is asked for one part more at most."""
    program = serve(start, "-w", 1)
    with Web(program.address) as client:
        assert len(client.get("/more").body) == SIZE
        assert client.get("/").body == b"ok"
    assert notes("part") == [str(number) for number in range(9)]
    assert "more than its Content-Length" in program.log
    program.finish()

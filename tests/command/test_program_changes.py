"""A reload decides anew what NAME is."""

import re
import signal

import pytest

from support import Address, Program, dial, patterns
from support.scripts import Start, rest
from support.web import Web

pytestmark = pytest.mark.timeout(60)

WSGI = """
def app(environ, start_response):
    start_response("200 OK", [("Content-Length", "4")])
    return [b"wsgi"]
"""
ASGI = """
async def app(scope, receive, send):
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"4")]})
    await send({"type": "http.response.body", "body": b"asgi"})
"""
HANDLER = """
import socketserver

class app(socketserver.StreamRequestHandler):
    def handle(self):
        self.rfile.readline()
        self.wfile.write(b"HTTP/1.1 200 OK\\r\\nContent-Length: 4\\r\\n\\r\\nhand")
"""
DATAGRAMS = """
import socketserver

class app(socketserver.DatagramRequestHandler):
    def handle(self):
        self.wfile.write(b"done")
"""
ANYTHING = "def app(*arguments): ...\n"


def body(address: Address) -> bytes:
    with Web(address) as web:
        return web.get().body


def replaced(program: Program, text: str) -> None:
    """A reload to another text, until every worker is of it."""
    workers = program.wait_ready(2)
    program.write("app.py", text)
    program.reload()
    program.wait_ready(2, without=workers)


def served(start: Start, text: str, *flags: object) -> Program:
    program: Program = start("prefork", "app", "-w", 2, "-b", 0, *flags, files={"app.py": text}).ready()
    program.wait_ready(2)
    return program


def test_another_kind_is_another_class_of_workers(start: Start) -> None:
    """What NAME has become by a reload has its class of workers, and a line of the log says so."""
    program = served(start, WSGI)
    assert body(program.address) == b"wsgi"
    for text, answer, taken in (
        (ASGI, b"asgi", "is an ASGI application; worker class asgi"),
        (HANDLER, b"hand", "is a handler class; worker class sync"),
        (WSGI, b"wsgi", "is a WSGI application; worker class wsgi"),
    ):
        mark = program.mark
        replaced(program, text)
        program.wait_for(f": app:app {taken}\n", since=mark)
        assert body(program.address) == answer
    program.finish()


def test_the_same_kind_is_not_named_again(start: Start) -> None:
    """A reload says nothing of a program that is what it was."""
    program = served(start, WSGI)
    replaced(program, WSGI.replace("wsgi", "more"))
    assert body(program.address) == b"more"
    assert len(program.found(re.compile("WSGI application"))) == 1
    program.finish()


@pytest.mark.parametrize(
    ("before", "after", "says"),
    [
        (WSGI, ANYTHING, "type -k wsgi or -k asgi"),
        (WSGI, "app = 7\n", "app:app is 7"),
        (HANDLER, DATAGRAMS, r"the program now wants udp://\S+; other addresses need a restart"),
    ],
)
def test_what_cannot_be_served(start: Start, before: str, after: str, says: str) -> None:
    """What the command would not have started with fails the reload with the same line; the old workers serve on."""
    program = served(start, before)
    workers, expected = program.wait_ready(2), body(program.address)
    program.write("app.py", after)
    program.send(signal.SIGHUP)
    assert re.search(says, program.wait_for(patterns.RELOAD_FAILED)[0])
    assert body(program.address) == expected
    assert program.wait_ready(2) == workers
    program.finish()


def test_a_class_that_was_typed_stays(start: Start) -> None:
    """`-k` overrules in each generation: what it does not serve fails the reload."""
    program = served(start, ANYTHING, "-k", "wsgi")
    replaced(program, WSGI)
    assert body(program.address) == b"wsgi"
    mark = program.mark
    program.write("app.py", HANDLER)
    program.send(signal.SIGHUP)
    assert "leave -k out" in program.wait_for(patterns.RELOAD_FAILED, since=mark)[0]
    with dial(program.address) as sock:
        sock.sendall(b"GET / HTTP/1.0\r\n\r\n")
        assert rest(sock).endswith(b"wsgi")
    program.finish()

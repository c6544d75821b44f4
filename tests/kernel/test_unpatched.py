"""Programs that patch the standard modules they run on, as gevent.monkey does at their top: served, or refused in one
line that says what is patched and what to do."""

import signal
from contextlib import ExitStack
from typing import Any

import pytest

from support import Program, ask, patterns, queue_up, until
from support.scripts import Notes, Start, hold, noted, path_of_modules, rest
from support.web import KeepAlive, Web

pytest.importorskip("gevent")
pytestmark = pytest.mark.timeout(60)

TCP = "tcp://127.0.0.1:0"

APP = """
import gevent, gevent.monkey
gevent.monkey.patch_all()

from kit import *
import http.server

def application(environ, start_response):
    if environ["PATH_INFO"] == "/sleep":
        time.sleep(60)
    turns = []
    greenlet = gevent.spawn(turns.append, 1)
    time.sleep(0.001)
    start_response("200 OK", [("Content-Type", "text/plain")])
    return [b"%d" % len(turns)]

class Sleeping(Handler):
    def answer(self, order):
        if order == "sleep":
            time.sleep(60)
        return super().answer(order)

class Web(prefork.BufferedHTTPMixIn, http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        self.send_response(200)
        self.send_header("Content-Length", "1")
        self.end_headers()
        self.wfile.write(b"1")

    def log_message(self, *arguments): ...

async def asgi(scope, receive, send): ...

class Awaiting(prefork.AsyncStreamRequestHandler):
    async def handle(self): ...

class Threading(socketserver.ThreadingTCPServer):
    def __init__(self, address):
        super().__init__(address, Handler)
"""


def command(start: Start, name: str, *arguments: object, **options: Any) -> Program:
    return start(
        "prefork", f"app:{name}", *arguments, "-b", TCP, files={"app.py": APP}, env=path_of_modules(), **options
    )


def test_handlers(start: Start, notes: Notes) -> None:
    """The class sync serves handlers of a patched program: its waits, deadlines, respawns, reloads and the drain."""
    program = command(
        start, "Sleeping", "-w", 2, "--request-timeout", 0.5, allow=[patterns.HANDLER_ERROR, patterns.ANYTHING]
    ).ready()
    workers = program.wait_ready(2)
    with ExitStack() as stack:
        late = hold(program.address, stack, "sleep")
        assert rest(late) == b""
        assert ask(program.address).result == "done"
    program.kill_workers(workers[0])
    program.wait_ready(2, without=workers[:1])
    program.reload()
    program.wait_ready(2, without=workers)
    with ExitStack() as stack:
        held = hold(program.address, stack, "gate go")
        noted(notes, "begun")
        clients = queue_up(program.address, 20, stack)
        program.begin_stop()
        program.write("go", "")
        assert rest(held).endswith(b":held:done\n")
        for identity, sock in clients.items():
            assert rest(sock).endswith(f":{identity}:done\n".encode())
    assert program.wait_exit().code == 0
    program.finish()


def test_wsgi(start: Start) -> None:
    """The class wsgi, with one thread, serves an application of a patched program: a client that says nothing holds
    nobody, a late request is ended, and no kept connection loses a request by a reload or the stop."""
    options = ["--worker-class", "wsgi", "--request-timeout", 0.5]
    program = command(start, "application", "-w", 2, *options, allow=[patterns.ANYTHING]).ready()
    with Web(program.address).send(b"GET / HT"), Web(program.address), Web(program.address) as web:
        assert [web.get().body for _ in range(3)] == [b"1"] * 3
        assert web.get("/sleep").status == 503
    load = KeepAlive(program.address, 4)
    program.reload()
    until(lambda: load.counts["sum"] > 100, 10, "requests are answered")
    assert program.stop().code == 0
    assert load.stop()["lost"] == 0
    program.finish()


def test_kept_connections_of_http_server(start: Start) -> None:
    """Handlers of http.server with kept connections are served, and a worker that leaves ends these."""
    program = command(start, "Web", "-w", 1).ready()
    with Web(program.address) as web:
        assert [web.get().body for _ in range(3)] == [b"1"] * 3
        assert program.stop(signal.SIGTERM).seconds < 3
    program.finish()


REFUSED: dict[str, tuple[str, list[object], int, str]] = {
    "thread": ("Handler", ["--worker-class", "thread"], 2, "worker_class thread"),
    "asyncio": ("Awaiting", ["--worker-class", "asyncio"], 2, "asyncio"),
    "asgi": ("asgi", ["--worker-class", "asgi"], 2, "asyncio"),
    "mix-in": ("Threading", [], 2, "ThreadingMixIn"),
    "threads": ("application", ["--worker-class", "wsgi", "--threads", 4], 3, "set threads to 1"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused(start: Start, case: str) -> None:
    """What needs real threads, or asyncio, is refused at the start, with what is patched, by whom, and the mend."""
    name, arguments, code, says = REFUSED[case]
    program = command(start, name, "-w", 1, *arguments, allow=[patterns.ANYTHING])
    assert program.wait_exit().code == code
    last = program.log.splitlines()[-1]
    assert "the program has patched " in last and "threading (gevent.monkey)" in last and says in last
    assert "epoll" not in program.log
    program.finish(code=None)


@pytest.mark.parametrize("first", ["gevent", "prefork"])
def test_a_master_that_is_patched(start: Start, first: str) -> None:
    """A script whose own process is patched is refused likewise, whichever it imports first."""
    lines = ["import gevent.monkey; gevent.monkey.patch_all()", "import prefork"]
    serve = "prefork.PreforkTCPServer(('127.0.0.1', 0), prefork.BaseRequestHandler).serve_forever()"
    text = "\n".join([*(lines if first == "gevent" else lines[::-1]), serve])
    program = start("{work}/app.py", files={"app.py": text}, allow=[patterns.ANYTHING])
    assert program.wait_exit().code == 1
    assert "the program has patched select and threading (gevent.monkey)" in program.log
    program.finish(code=None)

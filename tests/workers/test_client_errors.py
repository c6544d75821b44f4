"""A client that leaves in the middle is a quiet line; what breaks elsewhere with the same exception is a traceback."""

import contextlib
import re
import socket
import ssl
import struct
from collections.abc import Callable
from pathlib import Path

import pytest

from support import Program, dial, patterns
from support.clients import reset
from support.scripts import Notes, Start, launch, noted, path_of_modules

pytestmark = pytest.mark.timeout(60)

LEFT = r": client .* disconnected during its request: .+"
TROUBLE = [patterns.HANDLER_ERROR]

APP = """
import asyncio
import http.server
import shutil
import struct

from kit import *
from prefork import AsyncStreamRequestHandler
from prefork.servers.http import BufferedHTTPMixIn, PreforkHTTPServer

ENDLESS = b"x" * 100_000

logging.getLogger("prefork").setLevel(logging.DEBUG)

def broken():
    # what a connection to a database raises whose server went away
    one, other = socket.socketpair()
    other.close()
    with one:
        one.sendall(b"x")

class Order(socketserver.StreamRequestHandler):
    def handle(self):
        order = self.rfile.readline().decode().split()
        note("begun")
        getattr(self, order[1])(*order[2:])
        if order[1] != "database":
            raise AssertionError("the client is still there")

    def write(self):
        while True:
            self.wfile.write(ENDLESS)

    def read(self):
        while self.rfile.readline():
            pass
        self.write()

    def send(self):
        while True:
            self.request.sendall(ENDLESS)

    def copy(self):
        with open("/dev/zero", "rb") as file:
            shutil.copyfileobj(file, self.wfile)

    def database(self):
        try:
            broken()
        finally:
            self.wfile.write(b"was broken\\n")

    def both(self):
        self.gone()
        broken()

    def gone(self):
        poll = select.poll()
        poll.register(self.request, 0)
        while not poll.poll(5000):
            pass

    def shut(self):
        self.request.shutdown(socket.SHUT_WR)
        self.wfile.write(b"x")

    def other(self):
        self.gone()
        raise ValueError("ordered trouble")

    def own(self):
        self.request.shutdown(socket.SHUT_WR)
        self.request.sendall(b"x")

class Buffered(Order):
    wbufsize = 8192

class Datagram(socketserver.DatagramRequestHandler):
    def handle(self):
        data = self.rfile.read()
        note("begun")
        if b"gate" in data:
            pass_gate("go")
        if b"database" in data:
            raise ConnectionRefusedError("of the database")
        self.wfile.write(data)

class Page:
    def do_GET(self):
        note("begun")
        self.send_response(200)
        self.send_header("Content-Length", str(10 ** 10))
        self.end_headers()
        while True:
            self.wfile.write(ENDLESS)

    def log_message(self, *arguments):
        pass

class Plain(Page, http.server.BaseHTTPRequestHandler):
    pass

class Kept(Page, BufferedHTTPMixIn, http.server.BaseHTTPRequestHandler):
    pass

class Coroutine(AsyncStreamRequestHandler):
    async def handle(self):
        order = (await self.reader.readline()).decode().split()
        note("begun")
        if order[1] == "database":
            self.writer.write(b"was broken\\n")
            broken()
        while order[1] == "read":
            if not await self.reader.read(1000):
                break
        while True:
            self.writer.write(ENDLESS)
            await self.writer.drain()
            await asyncio.sleep(0)  # uvloop's TLS drops what is written to a broken connection, and lets nobody wait

class Own:
    def handle_error(self, request, client_address):
        note(f"own {sys.exc_info()[0].__name__}")

class Handles(Own, socketserver.ThreadingTCPServer):
    daemon_threads = True

class Front(prefork.PreforkTCPServer):
    def handle_error(self, request, client_address):
        note("front")
        super().handle_error(request, client_address)
"""


@pytest.fixture
def serve(start: Start) -> Callable[..., Program]:
    """`serve("Order", "sync", bind)`: the command over a class of the program above, with one worker."""

    def begin(name: str, kind: str = "sync", bind: str = "tcp://127.0.0.1:0", *, wrong: bool = False) -> Program:
        argv = [f"app:{name}", "--worker-class", kind, "-b", bind, "-w", 1, "--log-level", "debug"]
        env = path_of_modules()
        allow = TROUBLE if wrong else []
        return start("prefork", *argv, files={"app.py": APP}, env=env, allow=allow).ready(20)

    return begin


Serve = Callable[..., Program]


def leave(program: Program, notes: Notes, order: str, *, part: int = 1000, abrupt: bool = True) -> None:
    """Order something, take a part of the answer, if one is due, and go."""
    number = len(notes("begun"))
    sock = dial(program.address)
    sock.sendall(order.encode())
    noted(notes, "begun", number + 1)
    if part:
        assert sock.recv(part)
    if abrupt and not program.address.is_unix:
        reset(sock)
    else:
        sock.close()


STREAMS = ["tcp://127.0.0.1:0", "unix:{run}/s"]


@pytest.mark.parametrize("bind", STREAMS)
@pytest.mark.parametrize("kind", ["sync", "thread"])
def test_a_client_that_leaves(serve: Serve, notes: Notes, kind: str, bind: str) -> None:
    """Whichever way a handler reads and writes, a client that resets or just goes is one line, and no traceback."""
    program = serve("Order", kind, bind)
    (worker,) = program.wait_ready(1)
    number = 0
    for order in ("write", "copy", "send", "read"):
        for abrupt in (True, False):
            leave(program, notes, f"x {order}\n", part=0 if order == "read" else 1000, abrupt=abrupt)
            number += 1
            program.wait_for(LEFT, number=number)
    assert program.wait_ready(1) == [worker] and "Traceback" not in program.log
    program.finish()


@pytest.mark.parametrize("name", ["Buffered", "Plain", "Kept"])
def test_files_and_http(serve: Serve, notes: Notes, name: str) -> None:
    """So it is with a buffered file, with http.server, and with the kept connections of BufferedHTTPMixIn."""
    program = serve(name)
    order = "GET / HTTP/1.1\r\nHost: x\r\n\r\n" if name != "Buffered" else "x write\n"
    for number, abrupt in enumerate((True, False), 1):
        leave(program, notes, order, abrupt=abrupt)
        program.wait_for(LEFT, number=number)
    assert "Traceback" not in program.log
    program.finish()


def test_coroutines(serve: Serve, notes: Notes) -> None:
    """So it is with handlers that are coroutines."""
    program = serve("Coroutine", "asyncio")
    for number, (order, abrupt) in enumerate([("write", True), ("write", False), ("read", True)], 1):
        leave(program, notes, f"x {order}\n", part=1000 if order == "write" else 0, abrupt=abrupt)
        program.wait_for(LEFT, number=number)
    assert "Traceback" not in program.log
    program.finish()


@pytest.mark.parametrize("kind", ["sync", "asyncio"])
def test_tls(start: Start, notes: Notes, certificate: tuple[Path, Path], kind: str) -> None:
    """So it is behind TLS, in the handshake and after it."""
    cert, key = certificate
    handler = "Coroutine" if kind == "asyncio" else "Order"
    body = f"""
import ssl

class S(prefork.PreforkTCPServer):
    workers, worker_class = 1, {kind!r}

with S(("127.0.0.1", 0), {handler}) as server:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain({str(cert)!r}, {str(key)!r})
    server.socket = context.wrap_socket(server.socket, server_side=True)
    server.serve_forever()
"""
    program = launch(start, APP + body).ready()
    context = ssl.create_default_context(cafile=str(cert))
    for abrupt in (True, False):
        sock = dial(program.address)
        sock.sendall(b"\x16\x03\x01" if abrupt else b"GET / HTTP/1.0\r\n\r\n")
        if abrupt:
            reset(sock)
        else:
            with contextlib.suppress(ConnectionError):
                assert sock.recv(100) is not None
            sock.close()
    for number, abrupt in enumerate((True, False), 1):
        plain = dial(program.address)
        client = context.wrap_socket(plain, server_hostname="localhost")
        client.sendall(b"x write\n")
        assert client.recv(1000)
        if abrupt:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        client.close()
        program.wait_for(LEFT, number=number)
    assert "Traceback" not in program.log
    program.finish()


def test_a_datagram_whose_sender_is_gone(serve: Serve, notes: Notes) -> None:
    """An answer to a Unix datagram that nobody waits for any more is one line."""
    program = serve("Datagram", bind="unixgram:{run}/s", wrong=True)
    with dial(program.address) as sock:
        sock.send(b"gate")
        noted(notes, "begun")
    program.write("go", "")
    program.wait_for(LEFT)
    assert "Traceback" not in program.log
    with dial(program.address) as sock:
        sock.send(b"database")
        program.wait_for("ConnectionRefusedError: of the database")
    program.finish()


@pytest.mark.parametrize(("name", "kind"), [("Order", "sync"), ("Coroutine", "asyncio")])
def test_the_connection_of_somebody_else(serve: Serve, notes: Notes, name: str, kind: str) -> None:
    """A ConnectionError of a database is a traceback, whether the client waits for its answer or not."""
    program = serve(name, kind, wrong=True)
    with dial(program.address) as sock:
        sock.sendall(b"x database\n")
        assert sock.recv(100) == b"was broken\n"
        program.wait_for(r"BrokenPipeError: ")
    if name == "Order":
        leave(program, notes, "x both\n", part=0)
        program.wait_for(r"BrokenPipeError: ", number=2)
        assert "in broken" in program.log
    assert not program.found(re.compile(LEFT))
    program.finish()


def test_what_the_program_itself_has_done(serve: Serve, notes: Notes) -> None:
    """A handler that writes after it has shut its end down, and any other exception, is a traceback, also when the
    client has left."""
    program = serve("Order", wrong=True)
    for number, order in enumerate(("shut", "own"), 1):
        with dial(program.address) as sock:
            sock.sendall(f"x {order}\n".encode())
            program.wait_for(r"BrokenPipeError: ", number=number)
    leave(program, notes, "x other\n", part=0)
    program.wait_for("ValueError: ordered trouble")
    assert not program.found(re.compile(LEFT))
    program.finish()


@pytest.mark.parametrize(("name", "kind"), [("Handles", "sync"), ("Front", "thread")])
def test_a_handle_error_of_the_program(start: Start, notes: Notes, name: str, kind: str) -> None:
    """A program's own handle_error() is called in any case, behind the mix-in as in front of it; what it passes on is
    the quiet line."""
    text = APP + "\ndef make(address):\n    return Front(address, Order)\n\n"
    text += "class Served(Handles):\n    def __init__(self, address, handler=None):\n"
    text += "        super().__init__(address, Order)\n"
    target = "app:Served" if name == "Handles" else "app:make"
    argv = [target, "--worker-class", kind, "-b", "tcp://127.0.0.1:0", "-w", 1, "--log-level", "debug"]
    program = start("prefork", *argv, files={"app.py": text}, env=path_of_modules()).ready(20)
    leave(program, notes, "x write\n")
    if name == "Handles":
        assert noted(notes, "own")[0] in ("ConnectionResetError", "BrokenPipeError")
        assert not program.found(re.compile(LEFT))
    else:
        noted(notes, "front")
        program.wait_for(LEFT)
    assert "Traceback" not in program.log
    program.finish()


@pytest.mark.parametrize("abrupt", [False, True])
def test_an_upload_to_wsgi(start: Start, notes: Notes, abrupt: bool) -> None:
    """A client that leaves in the middle of a body which the application reads is no error of the application."""
    argv = ["webapp:app", "--worker-class", "wsgi", "-b", "tcp://127.0.0.1:0", "-w", 1]
    program = start("prefork", *argv, env=path_of_modules()).ready(20)
    (worker,) = program.wait_ready(1)
    sock = dial(program.address)
    sock.sendall(b"POST /upload/go HTTP/1.1\r\nHost: x\r\nContent-Length: 1000000\r\n\r\n" + b"x" * 200_000)
    noted(notes, "begun")
    program.write("go", "")
    if abrupt:
        reset(sock)
    else:
        sock.close()
    with dial(program.address) as other:
        other.sendall(b"GET /pid HTTP/1.0\r\n\r\n")
        assert other.recv(1000).startswith(b"HTTP/1.1 200")
    assert program.wait_ready(1) == [worker] and "Traceback" not in program.log
    program.finish()

"""A pool that is started without some of the descriptors 0, 1 and 2 gives none of these numbers to a connection or a
file."""

import itertools
import json
import socket
import ssl
import textwrap
from pathlib import Path
from typing import Any

import pytest

from support import Address, Program, ask, descriptors, patterns, until
from support.scripts import Start, path_of_modules
from support.web import Web

pytestmark = pytest.mark.timeout(60)

CLOSED = [numbers for size in (1, 2, 3) for numbers in itertools.combinations(range(3), size)]
# What a C library might do, and what Python does, with the three streams.
STRAY = """
import sys

def stray():
    for fd in (1, 2):
        os.write(fd, b"STRAY\\n")
    print("STRAY")
    print("STRAY", file=sys.stderr)
    subprocess.run(["/bin/sh", "-c", "cat; echo STRAY; echo STRAY >&2"], check=True)
    sys.stdin.read()
    return sorted(os.readlink(f"/proc/self/fd/{fd}") for fd in range(3) if fd in CLOSED)

"""
HANDLER = """
class Handler(Handler):
    def answer(self, order):
        if order == "raise":
            raise ValueError("ordered trouble")
        return f"{self.request.fileno()} {stray()}"
"""
SERVER = """
class Server(prefork.PreforkTCPServer):
    workers = 2

with Server(("127.0.0.1", {port}), Handler) as server:
    {first}
    server.serve_forever()
"""


def text(closed: tuple[int, ...], body: str) -> str:
    return f"from kit import *\nCLOSED = {closed}\n{STRAY}{textwrap.dedent(body)}"


def command(start: Start, closed: tuple[int, ...], body: str, *flags: object, **options: Any) -> Program:
    program: Program = start(
        "prefork",
        *("app:Handler" if "class Handler" in body else "app:app", "-b", "unix:{run}/socket", "-w", 2, *flags),
        files={"app.py": text(closed, body)},
        env=path_of_modules(),
        closed=closed,
        allow=["STRAY", patterns.HANDLER_ERROR],
        **options,
    )
    program.wait_ready(2, timeout=10)
    return program


def check(program: Program, address: Address, closed: tuple[int, ...]) -> None:
    """Nothing stray reaches a client, in any worker, and an exception is no end."""
    nowhere = str(["/dev/null"] * len(closed))
    for _ in range(8):
        number, _, targets = ask(address, "").result.partition(" ")
        assert int(number) > 2 and targets == nowhere
    with socket.socket(address.family) as client:
        client.connect(address.target)
        client.sendall(b"x raise\n")
        assert client.recv(1000) == b""
    victims = program.wait_ready(2)
    program.kill_workers(*victims)
    program.wait_ready(2, without=victims)
    assert ask(address).result.partition(" ")[2] == nowhere
    assert descriptors(program.pid)["/dev/null"] >= len(closed)


@pytest.mark.parametrize("closed", CLOSED)
def test_command(start: Start, closed: tuple[int, ...]) -> None:
    """The command opens them on /dev/null, in its master and in workers."""
    program = command(start, closed, HANDLER)
    check(program, Address("unix", str(program.run / "socket")), closed)
    program.finish()


@pytest.mark.parametrize("closed", CLOSED)
def test_program_of_its_own(start: Start, port: int, closed: tuple[int, ...]) -> None:
    """So does serve_forever(), though the listener was bound before and has got the first of the numbers."""
    first = 'Path("listener").write_text(str(server.fileno()))'
    body = text(closed, HANDLER) + SERVER.format(port=port, first=first)
    program = start(
        "{work}/app.py",
        files={"app.py": body},
        env=path_of_modules(),
        closed=closed,
        allow=["STRAY", patterns.HANDLER_ERROR],
    )
    program.wait_ready(2, timeout=10)
    assert int((program.work / "listener").read_text()) == closed[0]
    check(program, Address("tcp", "127.0.0.1", port), closed)
    program.finish()


@pytest.mark.parametrize("kind", ["unix", "tls", "udp"])
def test_listeners_of_other_kinds(start: Start, kind: str, port: int, certificate: tuple[Path, Path]) -> None:
    """The same with listeners of other kinds, whose number another object knows too."""
    bases = {"unix": "PreforkUnixStreamServer", "tls": "PreforkTCPServer", "udp": "PreforkUDPServer"}
    address = 'str(RUN / "socket")' if kind == "unix" else f'("127.0.0.1", {port})'
    body = f"""
    import ssl

    class Datagrams(Datagrams):
        def answer(self, order):
            return f"3 {{stray()}}"

    class Server(prefork.{bases[kind]}):
        workers = 2

    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(*{tuple(map(str, certificate))!r})
    with Server({address}, {"Datagrams" if kind == "udp" else "Handler"}) as server:
        if {kind == "tls"}:
            server.socket = context.wrap_socket(server.socket, server_side=True)
        assert server.fileno() == 0
        server.serve_forever()
    """
    program = start(
        "{work}/app.py",
        files={"app.py": text((0, 2), HANDLER) + textwrap.dedent(body)},
        env=path_of_modules(),
        closed=(0, 2),
    )
    program.wait_ready(2, timeout=10)
    if kind == "tls":
        with socket.create_connection(("127.0.0.1", port)) as raw:
            context = ssl.create_default_context(cafile=str(certificate[0]))
            with context.wrap_socket(raw, server_hostname="127.0.0.1") as client:
                client.sendall(b"x\n")
                answer = client.makefile().read()
    else:
        where = Address("unix", str(program.run / "socket")) if kind == "unix" else Address("udp", "127.0.0.1", port)
        answer = ask(where).result
    number, _, targets = answer.rpartition(":")[2].partition(" ")
    assert int(number) > 2 and targets.strip() == str(["/dev/null"] * 2)
    program.finish()


def test_single_requests(start: Start, port: int) -> None:
    """handle_request(), whose caller accepts itself, is no exception."""
    body = f"""
    class Server(prefork.PreforkTCPServer):
        workers = 2

    with Server(("127.0.0.1", {port}), Handler) as server:
        Path("bound").touch()
        for _ in range(3):
            server.handle_request()
    """
    closed = (0, 1, 2)
    files = {"app.py": text(closed, HANDLER) + textwrap.dedent(body)}
    program = start("{work}/app.py", files=files, env=path_of_modules(), closed=closed)
    until((program.work / "bound").exists)
    for _ in range(3):
        number, _, targets = ask(Address("tcp", "127.0.0.1", port)).result.partition(" ")
        assert int(number) > 2 and targets == str(["/dev/null"] * 3)
    assert program.wait_exit().code == 0
    program.finish()


APPLICATIONS = {
    "wsgi": """
        def app(environ, start_response):
            body = json.dumps([connections(), stray()]).encode()
            environ["wsgi.errors"].write("STRAY\\n")
            start_response("200 OK", [("Content-Length", str(len(body)))])
            return [body]
        """,
    "asgi": """
        async def app(scope, receive, send):
            if scope["type"] == "http":
                body = json.dumps([connections(), stray()]).encode()
                headers = [(b"content-length", b"%d" % len(body))]
                await send({"type": "http.response.start", "status": 200, "headers": headers})
                await send({"type": "http.response.body", "body": body})
        """,
}


@pytest.mark.parametrize("kind", APPLICATIONS)
def test_applications(start: Start, kind: str) -> None:
    """Applications are served likewise, also one that closes standard error when it is imported; access lines for a
    standard output that is not there go nowhere."""
    body = """
    import json

    def connections():
        return [fd for fd in range(3) if not os.readlink(f"/proc/self/fd/{fd}") == "/dev/null"]

    sys.stderr.close()
    os.close(2)
    """
    closed = (0, 1)
    whole = textwrap.dedent(body) + textwrap.dedent(APPLICATIONS[kind])
    program = command(start, closed, whole, "--worker-class", kind, "--access-log", "-")
    with Web(Address("unix", str(program.run / "socket"))) as web:
        for _ in range(3):
            assert json.loads(web.get("/").body) == [[], ["/dev/null"] * 2]
    program.finish()


def test_file_of_the_program(start: Start, port: int) -> None:
    """A file of the program that has got the number of standard error gets nothing of the log, in any process."""
    body = """
    data = open("data", "w")
    assert data.fileno() == 2

    class Handler(Handler):
        def answer(self, order):
            print("STRAY", file=sys.stderr)
            raise ValueError("ordered trouble")
    """
    files = {
        "app.py": "from kit import *\nlogging.root.handlers.clear()\n"
        + textwrap.dedent(body)
        + SERVER.format(port=port, first="")
    }
    program = start("{work}/app.py", files=files, env=path_of_modules(), closed=[2])
    victims = program.wait_ready(2, timeout=10)
    with socket.create_connection(("127.0.0.1", port)) as client:
        client.sendall(b"x\n")
        assert client.recv(100) == b""
    program.kill_workers(*victims)
    program.wait_ready(2, without=victims)
    program.finish()
    assert (program.work / "data").read_text() == ""


CODES = {
    2: ["app:Handler", "--nonsense"],
    3: ["app:Handler", "-b", "unix:{run}/socket", "--worker-class", "app:Broken"],
    4: ["app:Missing", "-b", "unix:{run}/socket"],
    0: ["--version"],
}


@pytest.mark.parametrize("code", CODES)
def test_exit_codes(start: Start, code: int) -> None:
    """What the command has to say goes nowhere, and its exit codes are what they always are."""
    body = """
    class Broken(prefork.SyncWorker):
        def setup(self):
            raise ValueError("ordered trouble")
    """
    files = {"app.py": "from kit import *\n" + textwrap.dedent(body)}
    program = start("prefork", *CODES[code], files=files, env=path_of_modules(), closed=(0, 1, 2))
    assert program.wait_exit(10).code == code
    program.finish(code=code)
    assert program.log == "" and program.out_path.read_text() == ""


TESTED = """
import os, socketserver, sys
import prefork.testing as testing

class Handler(socketserver.StreamRequestHandler):
    def handle(self):
        os.write(2, b"STRAY\\n")
        self.wfile.write(b"%d" % self.request.fileno())

with testing.pool(socketserver.TCPServer, Handler, workers=2) as pool:
    with pool.connect() as client:
        assert int(client.makefile().read()) > 2
    assert "STRAY" in pool.log
os._exit(0 if all(os.readlink(f"/proc/self/fd/{fd}") == "/dev/null" for fd in range(3)) else 3)
"""


def test_pool_of_a_test_suite(start: Start) -> None:
    """prefork.testing works in a process without the three, and its pool's log is what it always is."""
    program = start("{work}/suite.py", files={"suite.py": TESTED}, closed=(0, 1, 2))
    assert program.wait_exit(10).code == 0
    program.finish()

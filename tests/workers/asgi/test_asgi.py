"""ASGI applications of every kind are served unchanged, over every kind of listener."""

import contextlib
import signal
import socket
import ssl
from pathlib import Path

import pytest
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import connect

from support import dial, elapse, patterns, until
from support.asgi import APP, FRAMEWORKS, Client, get, pid_of, serve
from support.scripts import Notes, Start, launch

pytestmark = pytest.mark.timeout(60)


@pytest.mark.parametrize("name", ["app", "three", "Two", "make()"])
def test_kinds_of_applications(start: Start, name: str) -> None:
    """A coroutine function, an object, a class of ASGI 2 and a factory are applications."""
    program = serve(start, "-w", 2, name=name)
    workers = program.wait_ready(2)
    assert {pid_of(program) for _ in range(8)} == set(workers)
    assert get(program, "/version") == "one"
    assert program.stop().code == 0
    program.finish()


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_frameworks(start: Start, notes: Notes, framework: str) -> None:
    """Applications of the frameworks run unchanged: lifespan and its state, threads, streams, WebSockets, and
    background tasks, which a worker that leaves waits for."""
    program = serve(start, "-w", 1, text=FRAMEWORKS[framework])
    assert get(program, "/") == "stated"
    assert get(program, "/stream") == "01234"
    with connect(f"ws://127.0.0.1:{program.address.port}/ws") as ws:
        ws.send("well ")
        assert ws.recv(5) == "well stated"
    with contextlib.closing(Client(program.address)) as client:
        assert client.get("/background") == "soon"
        program.begin_stop()
        assert not notes("background")
        program.write("go", "")
        assert program.wait_exit().code == 0
    assert (len(notes("startup")), len(notes("background")), len(notes("shutdown"))) == (1, 1, 1)
    program.finish()


PROGRAM = (
    APP
    + """
async def other(scope, receive, send):
    assert scope["type"] == "http"
    await answer(send, b"other")

class Pool(prefork.PreforkTCPServer):
    workers = 2
    worker_class = "asgi"

    def verify_request(self, request, client_address):
        return client_address[0] != "127.0.0.2"
"""
)


def test_in_a_program(start: Start, notes: Notes) -> None:
    """worker_class = "asgi" on servers whose RequestHandlerClass is the application, each with one of its own; whom
    verify_request() refuses is not served."""
    body = """
with Pool(("127.0.0.1", 0), app) as one, Pool(("127.0.0.1", 0), other) as two:
    prefork.serve(one, two)
"""
    program = launch(start, PROGRAM + body).ready()
    workers = program.wait_ready(2)
    first, second = program.addresses
    for address, path, wanted in ((first, "/version", "one"), (second, "/", "other")) * 4:
        with contextlib.closing(Client(address)) as client:
            assert client.get(path) == wanted
    with socket.create_connection(("127.0.0.1", first.port), source_address=("127.0.0.2", 0)) as refused:
        assert refused.recv(10) == b""
    assert sorted(notes("startup")) == sorted(map(str, workers))
    program.send(signal.SIGTERM, workers[0])
    program.wait_ready(2, without=workers[:1])
    program.finish()


def test_bodies(start: Start) -> None:
    """Long bodies, in one piece and chunked, and long streams arrive whole, on one connection."""
    program = serve(start, "-w", 1)
    long = "x" * 3_000_000
    with contextlib.closing(Client(program.address)) as client:
        assert client.get("/echo", long) == long
        assert client.get("/echo", iter([b"a" * 70_000, b"b" * 70_000])) == "a" * 70_000 + "b" * 70_000
        assert client.get("/stream/300") == "".join(f"{number:05d}" * 1000 for number in range(300))
        assert client.get("/echo", "", Expect="100-continue") == ""
    program.finish()


def test_websocket(start: Start, notes: Notes) -> None:
    """A WebSocket is served, has no deadline, and is closed with 1012 when its worker leaves."""
    program = serve(start, "-w", 1, "--request-timeout", 0.2)
    with connect(f"ws://127.0.0.1:{program.address.port}/chat") as ws:
        ws.send("one")
        assert ws.recv(5) == f"{program.children()[0]}:one"
        elapse(1.6)  # past the deadline of a request, and the master's look at it
        ws.send("two")
        assert str(ws.recv(5)).endswith(":two")
        program.send(signal.SIGTERM)
        with pytest.raises(ConnectionClosed) as closed:
            ws.recv(5)
        assert closed.value.rcvd and closed.value.rcvd.code == 1012
    assert program.wait_exit().code == 0
    assert notes("left") == ["1012"]
    program.finish()


@pytest.mark.parametrize("trusted", ["", "127.0.0.1"])
def test_forwarded_headers(start: Start, trusted: str) -> None:
    """What a client says of another is believed only where the operator has named it."""
    program = serve(start, "-w", 1, env={"FORWARDED_ALLOW_IPS": trusted} if trusted else {})
    told = get(program, "/client", X_Forwarded_For="192.0.2.7", X_Forwarded_Proto="https")
    assert ("192.0.2.7" in told, "https" in told) == (bool(trusted), bool(trusted)), told
    program.finish()


def test_unix(start: Start) -> None:
    """A Unix socket is served, stays through retirements and a reload, and is removed at the end."""
    program = serve(start, "-w", 2, "-b", "unix:{run}/s")
    workers = program.wait_ready(2)
    program.send(signal.SIGTERM, workers[0])
    program.wait_for(patterns.LEFT)
    program.send(signal.SIGHUP)
    program.wait_for(patterns.RELOADED)
    fresh = program.wait_ready(2, without=workers)
    answered: set[int] = set()

    def both_answered() -> bool:
        answered.add(pid_of(program))
        return answered == set(fresh)

    until(both_answered, 5, "both new workers have answered, and no other")
    assert get(program, "/client") == "None http"
    program.finish()


def test_tls(start: Start, certificate: tuple[Path, Path]) -> None:
    """A TLS listener is served; a client that is silent in the handshake holds up nobody, and one that fails in it
    gives its place back."""
    cert, key = certificate
    body = f"""
import ssl

with Pool(("127.0.0.1", 0), app) as server:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain({str(cert)!r}, {str(key)!r})
    server.socket = context.wrap_socket(server.socket, server_side=True)
    server.workers = 1
    server.max_connections = 3
    server.serve_forever()
"""
    program = launch(start, PROGRAM + body).ready()
    context = ssl.create_default_context(cafile=str(cert))
    for _ in range(5):
        with dial(program.address) as failing, contextlib.suppress(ConnectionResetError):
            failing.sendall(b"GET / HTTP/1.1\r\n\r\n")
            while failing.recv(100):
                pass
    with dial(program.address), contextlib.closing(Client(program.address)) as client:
        client.sock = context.wrap_socket(dial(program.address), server_hostname="localhost")
        assert client.get("/client").endswith("https")
        assert client.get("/echo", "x" * 100_000) == "x" * 100_000
    program.finish()

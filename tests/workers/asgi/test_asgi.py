"""ASGI applications: every kind is served unchanged, its lifespan decides about a boot, and nothing is lost when a
worker leaves, whatever is in hand, at rest, or on its way."""

import asyncio
import contextlib
import http.client
import re
import signal
import socket
import socketserver
import ssl
import struct
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import connect

import prefork
from prefork.workers.asgi.application import HeadBufferingTransport
from support import Address, Program, dial, elapse, patterns, state, switches, until
from support.scripts import Notes, Start, launch, noted, path_of_modules

pytestmark = pytest.mark.timeout(60)

TCP = "tcp://127.0.0.1:0"
TROUBLE = [patterns.TRACEBACK, patterns.FAULT, "Exception in ASGI.*", "The above exception was .*"]

APP = """
import asyncio

import prefork.workers.asgi.worker
from kit import *

VERSION = "one"

async def answer(send, body, status=200):
    headers = [(b"content-type", b"text/plain"), (b"content-length", b"%d" % len(body))]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})

async def gate(name):
    note(f"begun {name}")
    while not (HOME / name).exists():
        await asyncio.sleep(0.005)

async def lifespan(scope, receive, send):
    await receive()
    note(f"startup {os.getpid()}")
    scope["state"]["born"] = os.getpid()
    await send({"type": "lifespan.startup.complete"})
    await receive()
    note(f"shutdown {os.getpid()}")
    await send({"type": "lifespan.shutdown.complete"})

async def websocket(scope, receive, send):
    await receive()
    await send({"type": "websocket.accept"})
    while True:
        message = await receive()
        if message["type"] == "websocket.disconnect":
            note(f"left {message['code']}")
            return
        await send({"type": "websocket.send", "text": f"{os.getpid()}:{message['text']}"})

async def body_of(receive):
    parts, more = [], True
    while more:
        message = await receive()
        parts.append(message.get("body", b""))
        more = message.get("more_body", False)
    return b"".join(parts)

async def app(scope, receive, send):
    if scope["type"] != "http":
        return await globals()[scope["type"]](scope, receive, send)
    word, _, rest = scope["path"][1:].partition("/")
    match word:
        case "version":
            await answer(send, VERSION.encode())
        case "client":
            await answer(send, f"{scope['client']} {scope['scheme']}".encode())
        case "state":
            await answer(send, str(scope["state"]["born"]).encode())
        case "echo":
            await answer(send, await body_of(receive))
        case "stream":
            await send({"type": "http.response.start", "status": 200, "headers": []})
            for number in range(int(rest)):
                await send({"type": "http.response.body", "body": b"%05d" % number * 1000, "more_body": True})
            await send({"type": "http.response.body", "body": b""})
        case "head":
            headers = [(b"content-length", b"4")]
            await send({"type": "http.response.start", "status": 200, "headers": headers})
            await gate(rest)
            await send({"type": "http.response.body", "body": b"late"})
        case "gate":
            await gate(rest)
            await answer(send, f"{os.getpid()}:{rest}".encode())
        case "extend":
            seconds, sleep = map(float, rest.split(","))
            scope["state"]["prefork_worker"].extend_deadline(seconds)
            await asyncio.sleep(sleep)
            await answer(send, b"in the end")
        case "late":
            try:
                if rest:
                    await send({"type": "http.response.start", "status": 200, "headers": []})
                note("begun late")
                await asyncio.sleep(60)
            finally:
                note("finally")
        case "big":
            await answer(send, b"x" * 20_000_000)
            note("begun big")
        case "after":
            await answer(send, b"answered")
            await gate(rest)
        case "block":
            note("begun block")
            time.sleep(60)
        case "deaf":
            while not (HOME / rest).exists():
                try:
                    await asyncio.sleep(60)
                except asyncio.CancelledError:
                    note("cancelled")
            await answer(send, b"at last")
        case "raise":
            raise ValueError("ordered trouble")
        case _:
            await answer(send, f"{os.getpid()}:{word}".encode())

class Two:
    def __init__(self, scope):
        self.scope = scope

    async def __call__(self, receive, send):
        assert self.scope["type"] == "http"
        await app(self.scope, receive, send)

class Three:
    async def __call__(self, scope, receive, send):
        assert scope["type"] == "http"
        await app(scope, receive, send)

three = Three()

def make():
    return app

class Plain(prefork.workers.asgi.worker.ASGIWorker):
    uvicorn_options = {"http": "h11", "headers": [("x-own", "yes")]}

    def new_loop(self):
        return asyncio.SelectorEventLoop()

class Hesitates(asyncio.SelectorEventLoop):
    async def connect_accepted_socket(self, protocol_factory, sock, **options):
        await asyncio.sleep(0)
        await asyncio.sleep(0.01)
        if (HOME / "gone").exists():
            raise ConnectionResetError("ordered trouble")
        return await super().connect_accepted_socket(protocol_factory, sock, **options)

class Hesitant(prefork.workers.asgi.worker.ASGIWorker):
    def new_loop(self):
        return Hesitates()
"""


def serve(
    start: Start, *arguments: object, name: str = "app", text: str = APP, kind: str = "asgi", **options: Any
) -> Program:
    """The command over an application, with the class asgi or one that is made of it."""
    argv = [f"app:{name}", "--worker-class", kind, *arguments]
    if "-b" not in arguments:
        argv += ["-b", TCP]
    files = {"app.py": text, **options.pop("files", {})}
    environment = {**path_of_modules(), **options.pop("env", {})}
    return start("prefork", *argv, files=files, env=environment, **options).ready(20)


class Client(http.client.HTTPConnection):
    """One connection; `get()` is checked to have been answered well."""

    def __init__(self, address: Address, timeout: float = 10.0) -> None:
        self.patience = timeout
        super().__init__("localhost", timeout=timeout)
        self.address = address

    def connect(self) -> None:
        self.sock = dial(self.address, self.patience)

    def ask(self, path: str = "/x", body: Any = None, **headers: str) -> http.client.HTTPResponse:
        self.request(
            "GET" if body is None else "POST", path, body, {k.replace("_", "-"): v for k, v in headers.items()}
        )
        return self.getresponse()

    def get(self, path: str = "/x", body: Any = None, **headers: str) -> str:
        answer = self.ask(path, body, **headers)
        text = answer.read().decode()
        assert answer.status == 200, (answer.status, text)
        return text


def get(program: Program, path: str = "/x", body: Any = None, **headers: str) -> str:
    """One request on a connection of its own."""
    with contextlib.closing(Client(program.address)) as client:
        return client.get(path, body, **headers)


def pid_of(program: Program) -> int:
    return int(get(program).split(":")[0])


# -- what is served --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["app", "three", "Two", "make()"])
def test_kinds_of_applications(start: Start, name: str) -> None:
    """A coroutine function, an object, a class of ASGI 2 and a factory are applications."""
    program = serve(start, "-w", 2, name=name)
    workers = program.wait_ready(2)
    assert {pid_of(program) for _ in range(8)} == set(workers)
    assert get(program, "/version") == "one"
    assert program.stop().code == 0
    program.finish()


FRAMEWORKS = {
    "starlette": """
from kit import *
from contextlib import asynccontextmanager
from starlette.applications import Starlette
from starlette.background import BackgroundTask
from starlette.responses import PlainTextResponse, StreamingResponse
from starlette.routing import Route, WebSocketRoute

@asynccontextmanager
async def lifespan(app):
    note("startup")
    yield {"word": "stated"}
    note("shutdown")

def hello(request):
    return PlainTextResponse(request.state.word)

def after():
    pass_gate("go")
    note("background")

def background(request):
    return PlainTextResponse("soon", background=BackgroundTask(after))

def stream(request):
    return StreamingResponse(str(n) for n in range(5))

async def echo(websocket):
    await websocket.accept()
    await websocket.send_text(await websocket.receive_text() + websocket.state.word)
    await websocket.close()

app = Starlette(lifespan=lifespan, routes=[
    Route("/", hello), Route("/background", background), Route("/stream", stream), WebSocketRoute("/ws", echo)])
""",
    "fastapi": """
from kit import *
from contextlib import asynccontextmanager
from fastapi import BackgroundTasks, FastAPI, Request, WebSocket
from fastapi.responses import PlainTextResponse, StreamingResponse

@asynccontextmanager
async def lifespan(app):
    note("startup")
    yield {"word": "stated"}
    note("shutdown")

app = FastAPI(lifespan=lifespan)

@app.get("/", response_class=PlainTextResponse)
def hello(request: Request):
    return request.state.word

def after():
    pass_gate("go")
    note("background")

@app.get("/background", response_class=PlainTextResponse)
async def background(tasks: BackgroundTasks):
    tasks.add_task(after)
    return "soon"

@app.get("/stream")
async def stream():
    return StreamingResponse(str(n) for n in range(5))

@app.websocket("/ws")
async def echo(websocket: WebSocket):
    await websocket.accept()
    await websocket.send_text(await websocket.receive_text() + websocket.state.word)
    await websocket.close()
""",
}


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


def segments(sock: socket.socket) -> int:
    """With data, that have come in: tcpi_data_segs_in."""
    return int(struct.unpack_from("I", sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 160), 152)[0])


@pytest.mark.skipif(sys.platform != "linux", reason="segments are counted by Linux")
@pytest.mark.parametrize("kind", ["asgi", "app:Plain"])
def test_an_answer_is_one_segment(start: Start, kind: str) -> None:
    """Head and body come together, if the application has both; if not, the head does not wait for the body."""
    program = serve(start, "-w", 1, kind=kind)
    with contextlib.closing(Client(program.address)) as client:
        for number in (1, 2, 3):
            client.get()
            assert segments(client.sock) == number
        assert client.ask("/echo", b"x" * 100_000).read() == b"x" * 100_000
        before = segments(client.sock)
        answer = client.ask("/head/go")
        assert (answer.status, segments(client.sock)) == (200, before + 1)
        program.write("go", "")
        assert (answer.read(), segments(client.sock)) == (b"late", before + 2)
    program.finish()


class Recorder(asyncio.Transport):
    """A transport that notes what it is told."""

    def __init__(self) -> None:
        super().__init__()
        self.told: list[object] = []
        self.closing = False

    def is_closing(self) -> bool:
        return self.closing

    def write(self, data: object) -> None:
        self.told.append(bytes(data))  # type: ignore[call-overload]

    def writelines(self, parts: Iterable[object]) -> None:
        self.told.append(parts)

    def write_eof(self) -> None:
        self.told.append("eof")

    def close(self) -> None:
        self.told.append("close")
        self.closing = True

    def pause_reading(self) -> None:
        self.told.append("pause")


HEAD = b"HTTP/1.1 200 OK\r\n\r\n"
LARGE = b"x" * (HeadBufferingTransport.LARGE + 1)


@pytest.mark.parametrize(
    ("orders", "told"),
    [
        ([("write", HEAD), ("write", b"body"), ("write", b"more")], [HEAD + b"body", b"more"]),
        ([("write", HEAD), ("write", b""), ("close",)], [HEAD, "close"]),
        ([("write", HEAD), ("write", memoryview(b"body"))], [HEAD + b"body"]),
        ([("write", bytearray(HEAD)), ("write", bytearray(b"body"))], [HEAD, b"body"]),
        ([("write", HEAD), ("write", LARGE)], [HEAD, LARGE]),
        ([("write", HEAD), ("write", HEAD), ("write", HEAD)], [HEAD + HEAD, HEAD]),
        ([("write", HEAD), ("close",)], [HEAD, "close"]),
        ([("write", HEAD), ("write_eof",)], [HEAD, "eof"]),
        ([("write", HEAD), ("writelines", [b"body"])], [HEAD, [b"body"]]),
        ([("write", HEAD), ("pause_reading",)], ["pause", HEAD]),
        ([("close",), ("write", HEAD)], ["close"]),
    ],
)
def test_a_head_is_kept_and_nothing_overtakes_it(orders: list[tuple[Any, ...]], told: list[object]) -> None:
    """A head leaves with what is written next, or before whatever else is sent, or with the turn of the loop."""

    async def go() -> Recorder:
        recorder = Recorder()
        transport = HeadBufferingTransport(asyncio.get_running_loop(), recorder, [])
        for name, *arguments in orders:
            getattr(transport, name)(*arguments)
        await asyncio.sleep(0)
        return recorder

    assert asyncio.run(go()).told == told


def test_heads_of_several_leave_with_the_turn() -> None:
    """All heads that were written in a turn are sent at its end, and in the next turns as well."""

    async def go() -> list[Recorder]:
        kept: list[HeadBufferingTransport] = []
        recorders = [Recorder() for _ in range(3)]
        one, two, three = (HeadBufferingTransport(asyncio.get_running_loop(), recorder, kept) for recorder in recorders)
        for _ in range(2):
            one.write(HEAD)
            one.write(b"body")
            two.write(HEAD)
            three.write(HEAD)
            three.close()
            await asyncio.sleep(0)
            assert not kept
        return recorders

    one, two, three = asyncio.run(go())
    assert one.told == [HEAD + b"body"] * 2
    assert two.told == [HEAD] * 2
    assert three.told == [HEAD, "close", "close"]


def test_a_head_outlives_a_body_that_is_none() -> None:
    """What is no bytes is refused, and the head that came before it is sent."""

    async def go() -> Recorder:
        recorder = Recorder()
        transport = HeadBufferingTransport(asyncio.get_running_loop(), recorder, [])
        transport.write(HEAD)
        with pytest.raises(TypeError):
            transport.write("text")
        transport.close()
        return recorder

    assert asyncio.run(go()).told == [HEAD, "close"]


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
    assert {pid_of(program) for _ in range(6)} == set(fresh)
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


# -- the lifespan ----------------------------------------------------------------------------------


def test_lifespan(start: Start, notes: Notes) -> None:
    """Each worker starts the application before it is ready, requests see its state, and the end comes after the last
    request."""
    program = serve(start, "-w", 2)
    workers = program.wait_ready(2)
    assert sorted(notes("startup")) == sorted(map(str, workers))
    assert get(program, "/state") in notes("startup")
    with ExitStack() as stack:
        client = stack.enter_context(contextlib.closing(Client(program.address)))
        client.request("GET", "/gate/go")
        noted(notes, "begun")
        program.send(signal.SIGTERM)
        noted(notes, "shutdown", 1)
        program.write("go", "")
        answer = client.getresponse()
        assert answer.status == 200
        last = answer.read().decode().split(":")[0]
    assert program.wait_exit().code == 0
    assert notes("shutdown")[1:] == [last]
    assert sorted(notes("shutdown")) == sorted(map(str, workers))
    program.finish()


BROKEN = {
    "raises": "await receive()\n    raise ValueError('ordered trouble')",
    "says": "await receive()\n    await send({'type': 'lifespan.startup.failed', 'message': 'ordered trouble'})",
    "both": "await receive()\n    await send({'type': 'lifespan.startup.failed', 'message': ''})\n"
    "    raise ValueError('ordered trouble')",
    "hangs": "await receive()\n    await asyncio.sleep(60)",
}


@pytest.mark.parametrize("how", BROKEN)
def test_a_broken_start_keeps_the_old_generation(start: Start, how: str) -> None:
    """A lifespan that fails to start fails the reload, with its own words, and the old workers serve on."""
    program = serve(start, "-w", 1, "--boot-timeout", 2 if how == "hangs" else 20)
    (worker,) = program.wait_ready(1)
    head, _, tail = APP.partition("async def lifespan(scope, receive, send):\n    await receive()")
    program.write("app.py", head + "async def lifespan(scope, receive, send):\n    " + BROKEN[how] + tail)
    program.send(signal.SIGHUP)
    program.wait_for(patterns.RELOAD_FAILED, 10)
    assert ("boot_timeout" if how == "hangs" else "ordered trouble") in program.log
    assert pid_of(program) == worker
    program.finish(allow=[patterns.TRACEBACK, patterns.FAULT])


def test_a_broken_first_start(start: Start) -> None:
    """If the application does not start at all, the command ends with its traceback."""
    text = FRAMEWORKS["starlette"].replace('note("startup")', 'raise ValueError("ordered trouble")')
    program = start(
        "prefork",
        "app:app",
        "--worker-class",
        "asgi",
        "-b",
        TCP,
        "-w",
        1,
        files={"app.py": text},
        env=path_of_modules(),
    )
    assert program.wait_exit(20).code == 3
    assert "ValueError: ordered trouble" in program.log and "in lifespan" in program.log
    program.finish(code=3, allow=[patterns.ANYTHING])


@pytest.mark.parametrize(
    "body",
    [
        "assert scope['type'] == 'http'",
        "await send({'type': 'http.response.start', 'status': 200, 'headers': []})",
        "await receive()\n    await send({'type': 'http.response.start', 'status': 200, 'headers': []})",
        "return",
    ],
)
def test_without_a_lifespan(start: Start, body: str) -> None:
    """An application that knows nothing of lifespans is served."""
    head, _, tail = APP.partition("async def lifespan(scope, receive, send):\n    await receive()")
    text = head + "async def lifespan(scope, receive, send):\n    " + body + tail
    program = serve(start, "-w", 1, text=text)
    assert get(program, "/version") == "one"
    program.finish()


def test_a_broken_end(start: Start) -> None:
    """A lifespan that fails to end is shown, and the worker leaves all the same."""
    text = APP.replace('note(f"shutdown {os.getpid()}")', 'raise ValueError("ordered trouble")')
    program = serve(start, "-w", 1, text=text, allow=[patterns.TRACEBACK])
    assert program.stop().code == 0
    assert "ValueError: ordered trouble" in program.log
    program.finish()


# -- nothing is lost -------------------------------------------------------------------------------


class HTTPLoad:
    """Clients in threads, each a closed loop of requests with paths of their own; not answered well is `lost`."""

    def __init__(self, address: Address, clients: int = 8, keep: bool = True) -> None:
        self.address, self.keep = address, keep
        self.ok: Counter[int] = Counter()
        self.lost: list[str] = []
        self.over = threading.Event()
        self.threads = [threading.Thread(target=self._run, args=(number,), daemon=True) for number in range(clients)]
        for thread in self.threads:
            thread.start()

    def _run(self, number: int) -> None:
        count = 0
        client: Client | None = None
        headers = {} if self.keep else {"Connection": "close"}
        while not self.over.is_set():
            count += 1
            if client is None:
                client = Client(self.address)
                try:
                    client.connect()
                except OSError:  # nobody listens any more
                    client = None
                    continue
            try:
                pid, _, word = client.get(f"/c{number}-{count}", **headers).partition(":")
                assert word == f"c{number}-{count}"
                self.ok[int(pid)] += 1
            except (OSError, http.client.HTTPException, AssertionError) as error:
                self.lost.append(f"c{number}-{count}: {error!r}")
                client.close()
            if client.sock is None:  # the answer said that the connection ends with it
                client = None
        if client is not None:
            client.close()

    def more(self, number: int) -> None:
        aim = self.ok.total() + number
        until(lambda: self.ok.total() >= aim, 20, f"{number} more answers")

    def stop(self) -> "HTTPLoad":
        self.over.set()
        for thread in self.threads:
            thread.join(15)
            assert not thread.is_alive()
        return self


@pytest.fixture
def load() -> Iterator[Callable[..., HTTPLoad]]:
    begun: list[HTTPLoad] = []

    def begin(*arguments: Any, **options: Any) -> HTTPLoad:
        begun.append(HTTPLoad(*arguments, **options))
        return begun[-1]

    yield begin
    for one in begun:
        one.over.set()


@pytest.mark.parametrize(
    ("bind", "keep", "kind"),
    [(TCP, True, "asgi"), (TCP, False, "asgi"), ("unix:{run}/s", True, "app:Plain"), (TCP, False, "app:Plain")],
    ids=["tcp-keep-alive", "tcp-close", "unix-keep-alive-plain", "tcp-close-plain"],
)
def test_no_request_is_lost(start: Start, load: Callable[..., HTTPLoad], bind: str, keep: bool, kind: str) -> None:
    """Retirements, reloads and a stop under load: every request on every connection is answered; on uvloop and
    httptools, and without them."""
    program = serve(start, "-w", 2, "-b", bind, kind=kind)
    clients = load(program.address, keep=keep)
    for _ in range(2):
        clients.more(50)
        workers = program.wait_ready(2)
        program.send(signal.SIGTERM, workers[0])
        program.wait_ready(2, without=workers[:1])
    for number in (1, 2):
        clients.more(50)
        program.send(signal.SIGHUP)
        program.wait_for(patterns.RELOADED, 10, number=number)
    clients.more(100)
    assert program.stop().code == 0
    assert not clients.stop().lost
    program.finish()


@pytest.mark.parametrize("keep", [True, False], ids=["keep-alive", "close"])
def test_recycling_loses_nothing(start: Start, load: Callable[..., HTTPLoad], keep: bool) -> None:
    """Workers that reach max_requests are replaced under load, and every request is answered."""
    program = serve(start, "-w", 2, "--max-requests", 100)
    clients = load(program.address, keep=keep)
    program.wait_for(patterns.LEFT, 20, number=4)
    tally = clients.stop()
    assert not tally.lost
    assert {match[4].split(" (")[0] for match in program.found(patterns.LEFT)} == {"it was recycled"}
    assert max(tally.ok.values()) >= 90
    program.finish()


def test_what_has_arrived_is_answered(start: Start) -> None:
    """A request that lies in the socket of a connection at rest is answered, though the order to leave comes first."""
    program = serve(start, "-w", 1)
    (worker,) = program.wait_ready(1)
    with contextlib.closing(Client(program.address)) as client, contextlib.closing(Client(program.address)) as half:
        assert client.get("/one") == f"{worker}:one"
        half.connect()
        half.sock.sendall(b"GET /half HTTP/1.1\r\nHo")
        elapse(1.3)  # longer than a worker that leaves waits for a silent one
        program.send(signal.SIGSTOP, worker)
        client.request("GET", "/two")
        program.send(signal.SIGTERM, worker)
        program.send(signal.SIGCONT, worker)
        assert client.getresponse().read().decode() == f"{worker}:two"
        last = client.ask("/three")
        assert (last.read().decode(), last.getheader("connection")) == (f"{worker}:three", "close")
        half.sock.sendall(b"st: x\r\n\r\n")
        assert f"{worker}:half".encode() in half.sock.makefile("rb").read()
    program.wait_for(patterns.LEFT)
    program.finish()


def test_an_answer_on_its_way_is_sent_to_its_end(start: Start, notes: Notes) -> None:
    """A client that is slow to read has its whole answer, though its worker was to leave long before."""
    program = serve(start, "-w", 1)
    with contextlib.closing(Client(program.address)) as client:
        client.request("GET", "/big")
        noted(notes, "begun")
        elapse(1.2)  # longer than a worker that leaves waits for a silent one
        program.begin_stop()
        elapse(0.3)
        assert client.getresponse().read() == b"x" * 20_000_000
    assert program.wait_exit().code == 0
    program.finish()


def test_the_queue_is_emptied(start: Start) -> None:
    """Clients that are connected and not accepted when the pool stops are answered."""
    program = serve(start, "-w", 2)
    workers = program.wait_ready(2)
    with ExitStack() as stack:
        clients = [stack.enter_context(contextlib.closing(Client(program.address))) for _ in range(40)]
        for worker in workers:
            program.send(signal.SIGSTOP, worker)
        for client in clients:
            client.request("GET", "/queued")
        program.send(signal.SIGTERM)
        for worker in workers:
            program.send(signal.SIGCONT, worker)
        for client in clients:
            assert client.getresponse().read().endswith(b":queued")
    assert program.wait_exit().code == 0
    program.finish()


def test_a_stop_is_quick_where_nothing_is_on_its_way(start: Start) -> None:
    """Connections that have rested for long, or never spoke, do not hold up a stop."""
    program = serve(start, "-w", 2)
    with contextlib.closing(Client(program.address)) as client, dial(program.address) as silent:
        client.get()
        elapse(1.2)
        assert program.stop().seconds < 0.8
        assert client.sock.recv(1) == b"" == silent.recv(1)
    program.finish()


def test_a_fast_stop_waits_for_nobody(start: Start, notes: Notes) -> None:
    """QUIT ends workers with a connection at rest, a WebSocket or a request at once."""
    program = serve(start, "-w", 2)
    with contextlib.closing(Client(program.address)) as rests, contextlib.closing(Client(program.address)) as asks:
        rests.get()
        asks.request("GET", "/gate/never")
        noted(notes, "begun")
        assert program.stop(signal.SIGQUIT).seconds < 1.5
    program.finish()


def test_the_end_of_graceful_timeout(start: Start, notes: Notes) -> None:
    """What is still in hand shortly before is cancelled: its `finally` and the lifespan's end still run."""
    program = serve(start, "-w", 1, "--graceful-timeout", 1, allow=TROUBLE)
    with contextlib.closing(Client(program.address)) as client:
        client.request("GET", "/late")
        noted(notes, "begun")
        program.send(signal.SIGTERM, program.children()[0])
        assert client.getresponse().status == 500
    program.wait_for(patterns.LEFT)
    assert (notes("finally"), len(notes("shutdown"))) == ([""], 1)
    program.finish()


# -- deadlines -------------------------------------------------------------------------------------


def test_a_late_request_is_cancelled(start: Start, notes: Notes) -> None:
    """Past request_timeout a request is cancelled: its `finally` runs, the client gets a 500 or, in the middle of an
    answer, the end; neighbours and the worker live."""
    program = serve(start, "-w", 1, "--request-timeout", 0.4, allow=TROUBLE)
    (worker,) = program.wait_ready(1)
    with ExitStack() as stack:
        late, begun, near = (stack.enter_context(contextlib.closing(Client(program.address))) for _ in range(3))
        late.request("GET", "/late")
        begun.request("GET", "/late/begun")
        assert near.get("/version") == "one"
        assert late.getresponse().status == 500
        with pytest.raises(http.client.IncompleteRead):
            begun.getresponse().read()
        assert near.get() == f"{worker}:x"
    assert len(notes("finally")) == 2
    assert "RequestTimeout: the request took longer than 0.4 s" in program.log
    elapse(1.2)  # the master's look at the deadline it knows
    assert pid_of(program) == worker
    program.finish()


@pytest.mark.parametrize(("limit", "moved", "sleeps", "status"), [(0.5, 20, 1.0, 200), (20, 0.1, 15, 500)])
def test_a_deadline_that_the_application_moves(
    start: Start, notes: Notes, limit: float, moved: float, sleeps: float, status: int
) -> None:
    """An application finds its worker in the state of the scope, and gives its request another deadline: a later one,
    or an earlier one, past which it is cancelled as well."""
    program = serve(start, "-w", 1, "--request-timeout", limit, allow=TROUBLE)
    (worker,) = program.wait_ready(1)
    with contextlib.closing(Client(program.address)) as client:
        client.request("GET", f"/extend/{moved},{sleeps}")
        assert client.getresponse().status == status
    assert ("RequestTimeout" in program.log and "await asyncio.sleep(sleep)" in program.log) is (status == 500)
    assert pid_of(program) == worker
    program.finish()


def test_what_comes_after_the_answer_has_the_same_deadline(start: Start, notes: Notes) -> None:
    """What an application does after its answer is cancelled at the request's deadline, and the connection, on which
    the next request may run, is spared."""
    program = serve(start, "-w", 1, "--request-timeout", 1.5, allow=TROUBLE)
    with contextlib.closing(Client(program.address)) as client:
        assert client.get("/after/never") == "answered"
        sock = client.sock
        elapse(1.0)
        client.request("GET", "/gate/go")
        program.wait_for("left to be done after its answer")
        program.write("go", "")
        assert client.getresponse().read().endswith(b":go")
        assert client.sock is sock
    program.finish()


def test_a_request_that_blocks_the_loop_is_killed(start: Start, notes: Notes) -> None:
    """A loop that does not turn is found by the master: the worker is killed and replaced, and its report shows where
    it stood."""
    program = serve(start, "-w", 1, "--request-timeout", 0.3, allow=TROUBLE)
    (worker,) = program.wait_ready(1)
    with contextlib.closing(Client(program.address)) as client:
        client.request("GET", "/block")
        with pytest.raises((http.client.RemoteDisconnected, ConnectionResetError)):
            client.getresponse()
    program.wait_ready(1, without=[worker])
    left = program.wait_for(patterns.LEFT)
    assert "request_timeout" in left[4] or "deadline" in left[4], left[4]
    assert "in app" in program.log or "SIGKILL" in left[4], "where it stood"
    assert get(program, "/version") == "one"
    program.finish()


def test_a_request_that_does_not_mind(start: Start, notes: Notes) -> None:
    """One that goes on in spite of its cancellation is cancelled again; its worker is replaced, and serves it out."""
    program = serve(start, "-w", 1, "--request-timeout", 0.2, allow=TROUBLE)
    (worker,) = program.wait_ready(1)
    with contextlib.closing(Client(program.address)) as client:
        client.request("GET", "/deaf/go")
        noted(notes, "cancelled", 2)
        until(lambda: pid_of(program) != worker, 10)
        program.write("go", "")
        assert client.getresponse().read() == b"at last"
    program.wait_for(patterns.LEFT)
    program.finish()


def test_an_exception(start: Start) -> None:
    """An exception of the application is a 500 with a traceback on standard error, and costs nothing else."""
    program = serve(start, "-w", 1, allow=TROUBLE)
    with contextlib.closing(Client(program.address)) as client:
        answer = client.ask("/raise")
        assert (answer.status, answer.read()) == (500, b"Internal Server Error")
    assert "ValueError: ordered trouble" in program.log
    assert get(program, "/version") == "one"
    program.finish()


# -- limits and settings ---------------------------------------------------------------------------


def test_max_connections(start: Start, notes: Notes) -> None:
    """At the limit a worker accepts nobody: who comes then waits, and is served once there is room."""
    program = serve(start, "-w", 1, "--max-connections", 2)
    with ExitStack() as stack:
        one, two, three = (stack.enter_context(contextlib.closing(Client(program.address))) for _ in range(3))
        one.get()
        two.request("GET", "/gate/go")
        noted(notes, "begun")
        three.request("GET", "/three")
        three.sock.settimeout(0.3)
        with pytest.raises(TimeoutError):
            three.sock.recv(1, socket.MSG_PEEK)
        three.sock.settimeout(5)
        one.close()
        assert three.getresponse().read().endswith(b":three")
        program.write("go", "")
        assert two.getresponse().status == 200
    program.finish()


def test_a_websocket_at_max_connections(start: Start, notes: Notes) -> None:
    """A connection that becomes a WebSocket makes no room for another one."""
    program = serve(start, "-w", 1, "--max-connections", 2)
    with ExitStack() as stack:
        one = stack.enter_context(dial(program.address))
        two, three = (stack.enter_context(contextlib.closing(Client(program.address))) for _ in range(2))
        two.get()
        ws = stack.enter_context(connect(f"ws://127.0.0.1:{program.address.port}/chat", sock=one))
        three.request("GET", "/three")
        three.sock.settimeout(0.3)
        with pytest.raises(TimeoutError):
            three.sock.recv(1, socket.MSG_PEEK)
        three.sock.settimeout(5)
        ws.send("one")
        assert str(ws.recv(5)).endswith(":one")
        ws.close()
        assert three.getresponse().read().endswith(b":three")
    program.finish()


@pytest.mark.parametrize("kind", ["asgi", "app:Plain"])
def test_a_burst_within_max_connections(start: Start, notes: Notes, kind: str) -> None:
    """Those who come at once are all accepted up to the limit, and none of them counts twice while he is."""
    program = serve(start, "-w", 1, "--max-connections", 24, kind=kind)
    (worker,) = program.wait_ready(1)
    with ExitStack() as stack:
        program.send(signal.SIGSTOP, worker)
        clients = [stack.enter_context(contextlib.closing(Client(program.address))) for _ in range(20)]
        for client in clients:
            client.request("GET", "/gate/go")
        program.send(signal.SIGCONT, worker)
        noted(notes, "begun", 20)
        program.write("go", "")
        assert {client.getresponse().status for client in clients} == {200}
    program.finish()


def test_one_connection_at_once(start: Start, load: Callable[..., HTTPLoad]) -> None:
    """With room for one, many clients are served one after the other, also by a pool that stops."""
    program = serve(start, "-w", 1, "--max-connections", 1)
    clients = load(program.address, clients=6, keep=False)
    clients.more(200)
    assert program.stop().code == 0
    assert not clients.stop().lost
    program.finish()


@pytest.mark.parametrize("kind", ["asgi", "app:Plain"])
def test_room_for_one_at_two_listeners(start: Start, load: Callable[..., HTTPLoad], kind: str) -> None:
    """A worker that is full and has room again, all the time and at once for two listeners, serves the clients of
    both."""
    program = serve(start, "-b", TCP, "-b", "unix:{run}/s", "-w", 1, "--max-connections", 2, kind=kind)
    loads = [load(address, clients=4, keep=False) for address in program.addresses]
    for clients in loads:
        clients.more(200)
    assert program.stop().code == 0
    for clients in loads:
        assert not clients.stop().lost
    program.finish()


def test_a_loop_that_hesitates(start: Start, notes: Notes) -> None:
    """A loop may wait for what it likes until a connection is one; one that does not become one gives its place
    back."""
    program = serve(start, "-w", 1, "--max-connections", 2, kind="app:Hesitant")
    assert get(program, "/version") == "one"
    program.write("gone", "")
    for _ in range(5):
        with dial(program.address) as gone:
            assert gone.recv(1) == b""
    (program.work / "gone").unlink()
    assert get(program, "/version") == "one"
    program.finish()


@pytest.mark.parametrize("seconds", [0, 0.3])
def test_keepalive_timeout(start: Start, seconds: float) -> None:
    """A connection at rest is closed after keepalive_timeout; 0: each reply says that it is the last."""
    program = serve(start, "-w", 1, "--keepalive-timeout", seconds)
    with contextlib.closing(Client(program.address)) as client:
        client.connect()
        sock = client.sock
        answer = client.ask()
        assert answer.getheader("connection") == (None if seconds else "close")
        answer.read()
        assert sock.recv(1) == b"" if seconds else client.sock is None
    program.finish()


def test_access_log(start: Start, tmp_path: Path) -> None:
    """access_log names a file, which USR1 opens again, or standard output; without it nothing is logged."""
    path = tmp_path / "accesses"
    program = serve(start, "-w", 1, "--access-log", path)
    get(program, "/version?a=b")
    assert re.search(r'127\.0\.0\.1:\d+ - "GET /version\?a=b HTTP/1\.1" 200', until(path.read_text))
    path.rename(tmp_path / "old")
    program.send(signal.SIGUSR1)
    until(path.exists)
    get(program)
    assert '"GET /x HTTP/1.1" 200' in until(path.read_text)
    program.finish()
    program = serve(start, "-w", 1, "--access-log", "-")
    get(program)
    assert '"GET /x HTTP/1.1" 200' in until(program.out_path.read_text)
    program.finish()


def test_everybody_has_a_share_and_nobody_wakes_up_for_nothing(start: Start) -> None:
    """Connections one after the other go round; idle workers sleep."""
    program = serve(start, "-w", 4)
    workers = program.wait_ready(4)
    shares = Counter[int]()
    for _ in range(120):
        # Who still runs would be faster than who is woken, on a machine whose processors others want.
        until(lambda: {state(worker) for worker in workers} == {"S"}, what="all workers sleep")
        shares[pid_of(program)] += 1
    assert set(shares) == set(workers)
    assert max(shares.values()) <= 45 and min(shares.values()) >= 15, shares

    elapse(0.3)
    before = sum(map(switches, workers))
    elapse(1.0)
    assert sum(map(switches, workers)) - before <= 1
    program.finish()


def test_a_class_of_ones_own(start: Start) -> None:
    """A subclass says what loop is used, and what uvicorn is told."""
    program = serve(start, "-w", 1, kind="app:Plain")
    with contextlib.closing(Client(program.address)) as client:
        answer = client.ask()
        assert (answer.getheader("x-own"), answer.getheader("server")) == ("yes", "uvicorn")
        assert answer.getheader("date")
    program.finish()


class Nothing(socketserver.BaseRequestHandler):
    pass


async def asgi(scope: Any, receive: Any, send: Any) -> None:
    pass


def wsgi(environ: Any, start_response: Any) -> None:
    pass


@pytest.mark.parametrize(
    ("kind", "app", "says"),
    [
        (prefork.PreforkUDPServer, asgi, "bind tcp:// or unix:"),
        (prefork.PreforkTCPServer, Nothing, "Nothing is a handler of socketserver"),
        (prefork.PreforkTCPServer, 7, "7 is no ASGI application"),
        (prefork.PreforkTCPServer, wsgi, "takes worker_class wsgi"),
    ],
)
def test_check(kind: Any, app: Any, says: str) -> None:
    """What cannot be served is refused before anything is forked, in one line with the mend."""
    with kind(("127.0.0.1", 0), app) as server:
        server.worker_class = "asgi"
        with pytest.raises(prefork.OptionError, match=re.escape(says)) as refused:
            server.serve_forever()
        assert "\n" not in str(refused.value)


def test_without_uvicorn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without uvicorn the mend is named."""
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    for name in ("worker", "application"):
        monkeypatch.delitem(sys.modules, f"prefork.workers.asgi.{name}")
        monkeypatch.delattr(f"prefork.workers.asgi.{name}")
    with (
        prefork.PreforkTCPServer(("127.0.0.1", 0), asgi) as server,
        pytest.raises(prefork.OptionError, match=r"pip install 'prefork\[asgi\]'"),
    ):
        server.worker_class = "asgi"
        server.serve_forever()


def test_the_command_refuses_what_is_no_application(start: Start) -> None:
    """The command says in one line that NAME cannot be called."""
    program = start(
        "prefork", "app:number", "--worker-class", "asgi", "-b", TCP, files={"app.py": "number = 7"},
    )  # fmt: skip
    assert program.wait_exit(20).code == 4
    assert "app:number is 7, which is no application" in program.log
    program.finish(code=4, allow=["prefork: error: .*"])

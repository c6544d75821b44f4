"""The command over an ASGI application, its client, and a load that counts what it loses."""

import contextlib
import http.client
import threading
from collections import Counter
from typing import Any

from . import Address, Program, dial, patterns, until
from .scripts import Start, path_of_modules

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

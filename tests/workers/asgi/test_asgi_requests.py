"""What the class `asgi` makes of a request that is odd, wrong or endless, beside the class `wsgi`: with httptools and
with h11."""

import contextlib
import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import pytest
from websockets.sync.client import connect

from prefork.workers.asgi.protocols import HEAD_LIMIT, fault_of
from support import Program, private_memory
from support.scripts import Notes, Start, noted, path_of_modules
from support.web import Web

pytestmark = pytest.mark.timeout(60)

APP = """
import asyncio
import json

from kit import *
from prefork.workers.asgi.worker import ASGIWorker

async def chat(receive, send):
    await receive()
    await send({"type": "websocket.accept"})
    while (message := await receive())["type"] == "websocket.receive":
        await send({"type": "websocket.send", "text": message["text"]})

async def parts(receive, send, first):
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": first, "more_body": True})
    while (message := await receive()).get("more_body"):
        await send({"type": "http.response.body", "body": message["body"], "more_body": True})
    await send({"type": "http.response.body", "body": b"end"})

async def app(scope, receive, send):
    if scope["type"] == "websocket":
        return await chat(receive, send)
    assert scope["type"] == "http"
    if scope["path"] == "/parts":
        return await parts(receive, send, b"begun")
    if scope["path"] == "/gate":
        note("begun")
        while not (HOME / "go").exists():
            await asyncio.sleep(0.005)
    body, more = b"", True
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            return
        body += message.get("body", b"")
        more = message.get("more_body", False)
    headers = [[name.decode(), value.decode("latin-1")] for name, value in scope["headers"]]
    told = {"path": scope["path"], "headers": headers, "body": body.decode()}
    told |= {"query": scope["query_string"].decode(), "raw": scope["raw_path"].decode()}
    text = json.dumps(told).encode()
    note("served " + scope["path"])
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"%d" % len(text))]})
    await send({"type": "http.response.body", "body": text})

class H11(ASGIWorker):
    uvicorn_options = {"http": "h11"}

class Below(ASGIWorker):
    uvicorn_options = {"root_path": "/below"}

class BelowH11(ASGIWorker):
    uvicorn_options = {"http": "h11", "root_path": "/below"}

class NoSockets(ASGIWorker):
    uvicorn_options = {"ws": "none"}
"""
KINDS = ["asgi", "app:H11"]
# What uvicorn says of each.
SAID = [r"Invalid HTTP request received\.", r"A request has more than \d+ bytes of headers\."]

HOST = b"Host: test\r\n"
GET = b"GET / HTTP/1.1\r\n" + HOST
POST = b"POST /echo HTTP/1.1\r\n" + HOST
CHUNKED = POST + b"Transfer-Encoding: chunked\r\n\r\n"
H2C = b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABk\r\n"
SOCKET = b"Connection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\n"
SOCKET += b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n"


@pytest.fixture
def serve(start: Start) -> Callable[..., Program]:
    """`serve(kind)`: the command over the application above, with one worker."""

    def begin(kind: str = "asgi", app: str = "app:app", **options: Any) -> Program:
        argv = [app, "--worker-class", kind, "-b", "tcp://127.0.0.1:0", "-w", 1]
        return start("prefork", *argv, files={"app.py": APP}, env=path_of_modules(), **options).ready(20)

    return begin


@pytest.fixture
def web() -> Iterator[Callable[..., Web]]:
    """`web(program)`: a client that is closed with the test."""
    with ExitStack() as stack:
        yield lambda program: stack.enter_context(Web(program.address))


Serve = Callable[..., Program]
Dial = Callable[..., Web]


# -- an upgrade that is not made -------------------------------------------------------------------

UPGRADES = {
    "no body": (GET + H2C + b"\r\n", ""),
    "a length": (POST + H2C + b"Content-Length: 5\r\n\r\nhello", "hello"),
    "no length": (POST + H2C + b"Content-Length: 0\r\n\r\n", ""),
    "chunks": (POST + H2C + b"Transfer-Encoding: chunked\r\n\r\n2\r\nhe\r\n3\r\nllo\r\n0\r\n\r\n", "hello"),
    "http 1.0": (b"POST /echo HTTP/1.0\r\n" + H2C + b"Content-Length: 5\r\n\r\nhello", "hello"),
    "websocket in http 1.0": (b"GET / HTTP/1.0\r\n" + HOST + SOCKET + b"\r\n", ""),
}


@pytest.mark.parametrize("kind", KINDS)
def test_an_upgrade_is_ignored(serve: Serve, web: Dial, kind: str) -> None:
    """A request that would rather be HTTP/2 is served as HTTP/1.1, its body and the next request included, and nobody
    is warned of it."""
    program = serve(kind)
    for name, (request, body) in UPGRADES.items():
        client = web(program).send(request)
        assert json.loads(client.answer().body)["body"] == body, name
        if b"HTTP/1.1" in request:
            assert client.get("/next").status == 200, name
            client.send(request + request + GET + b"\r\n")
            assert [json.loads(client.answer().body)["body"] for _ in range(3)] == [body, body, ""], name
    program.finish()


def test_an_upgrade_in_pieces(serve: Serve, web: Dial) -> None:
    """Wherever the request is cut in two, it is the request that comes whole."""
    program = serve()
    for name in ("a length", "chunks"):
        request, body = UPGRADES[name]
        client = web(program)
        for at in range(1, len(request)):
            assert json.loads(client.send(request[:at], request[at:]).answer().body)["body"] == body, (name, at)
    program.finish()


@pytest.mark.parametrize(("kind", "app"), [("asgi", "app:app"), ("wsgi", "webapp:app")])
def test_many_upgrades_at_once(serve: Serve, web: Dial, kind: str, app: str) -> None:
    """A thousand requests in one segment, each of which would rather be HTTP/2, are answered, and the worker lives."""
    program = serve(kind, app)
    (worker,) = program.wait_ready(1)
    client = web(program).send((b"GET /pid HTTP/1.1\r\n" + HOST + H2C + b"\r\n") * 1200)
    assert {client.answer().status for _ in range(1200)} == {200}
    assert program.wait_ready(1) == [worker]
    program.finish()


def test_without_a_library_for_websockets(serve: Serve, web: Dial) -> None:
    """A WebSocket that cannot be had is said so in the log, and the request is served as HTTP."""
    program = serve("app:NoSockets", allow=["No library for WebSockets: .*"])
    answer = web(program).send(GET + SOCKET + b"Content-Length: 5\r\n\r\nhello").answer()
    assert json.loads(answer.body)["body"] == "hello"
    assert "pip install websockets" in program.log
    program.finish()


@pytest.mark.parametrize("kind", KINDS)
def test_websockets_beside_it(serve: Serve, web: Dial, kind: str) -> None:
    """A WebSocket is one, also on a connection that has served requests; a handshake that its parser gives up is
    answered, and its connection ended."""
    program = serve(kind)
    with connect(f"ws://127.0.0.1:{program.address.port}/") as one:
        one.send("hello")
        assert one.recv(5) == "hello"
    client = web(program)
    assert client.get("/x").status == client.get("/x", *H2C.decode().split("\r\n")[:-1]).status == 200
    assert client.send(GET + SOCKET + b"\r\n").answer().status == 101
    for field in (b"Content-Length: 5\r\n\r\nhello", b"Cookie: " + b"a" * 9000 + b"\r\n\r\n", HOST + b"\r\n"):
        client = web(program).send(GET + SOCKET + field)
        assert (client.answer().status, client.is_over()) == (400, True), field
    program.finish(allow=SAID)


# -- heads -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_trailers_are_no_headers(serve: Serve, web: Dial, kind: str) -> None:
    """What comes behind a body of chunks is not among the headers of the request, nor of the next one."""
    program = serve(kind)
    client = web(program)
    for _ in range(2):
        client.send(CHUNKED + b"5\r\nhello\r\n0\r\nHost: evil.example\r\nX-Role: admin\r\n\r\n")
        told = json.loads(client.answer().body)
        assert (told["body"], told["headers"]) == ("hello", [["host", "test"], ["transfer-encoding", "chunked"]])
    assert json.loads(client.get("/x").body)["headers"] == [["host", "test"]]
    client.send(CHUNKED + b"0\r\nHost: evil.example\r\n\r\n", b"GET / HTTP/1.1\r\n\r\n")
    assert [client.answer().status, client.answer().status] == [200, 400], "a trailer is no Host of the next request"
    program.finish(allow=SAID)


REFUSED = {
    "star": (b"GET * HTTP/1.1\r\n" + HOST + b"\r\n", 400),
    "no path": (b"GET foo HTTP/1.1\r\n" + HOST + b"\r\n", 400),
    "a query alone": (b"GET ?a HTTP/1.1\r\n" + HOST + b"\r\n", 400),
    "fragment": (b"GET /#a HTTP/1.1\r\n" + HOST + b"\r\n", 400),
    "another scheme": (b"GET ftp://test/ HTTP/1.1\r\n" + HOST + b"\r\n", 400),
    "a user in the url": (b"GET http://a@test/ HTTP/1.1\r\n" + HOST + b"\r\n", 400),
    "http 2 over text": (b"GET / HTTP/2.0\r\n" + HOST + b"\r\n", 505),
    "http 0.9": (b"GET / HTTP/0.9\r\n" + HOST + b"\r\n", 505),
    "connect": (b"CONNECT / HTTP/1.1\r\n" + HOST + b"\r\n", 501),
    "no host": (b"GET / HTTP/1.1\r\n\r\n", 400),
    "two hosts": (GET + HOST + b"\r\n", 400),
    "two hosts far apart": (GET + b"X: 1\r\nY: 2\r\nhost: other\r\n\r\n", 400),
    "two hosts in 1.0": (b"GET / HTTP/1.0\r\n" + HOST + HOST + b"\r\n", 400),
    "length, then chunked": (POST + b"Content-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", 400),
    "chunked, then length": (POST + b"Transfer-Encoding: chunked\r\nContent-Length: 1\r\n\r\n0\r\n\r\n", 400),
    "chunked in 1.0": (b"POST / HTTP/1.0\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", 400),
    "chunked not last": (POST + b"Transfer-Encoding: chunked, gzip\r\n\r\n0\r\n\r\n", 400),
    "two lengths": (POST + b"Content-Length: 1\r\nContent-Length: 2\r\n\r\na", 400),
    "bad chunk": (CHUNKED + b"xyz\r\n", 400),
    "space before the colon": (GET + b"X : a\r\n\r\n", 400),
    "NUL in a value": (GET + b"X: a\0b\r\n\r\n", 400),
    "garbage": (b"\x16\x03\x01\x02\x00\x01\x00\r\n\r\n", 400),
}


@pytest.mark.parametrize("kind", KINDS)
def test_refused(serve: Serve, web: Dial, notes: Notes, kind: str) -> None:
    """Each is refused with its status and the end of the connection, the application sees nothing of it nor of what
    follows, and the worker lives."""
    program = serve(kind)
    (worker,) = program.wait_ready(1)
    for name, (request, status) in REFUSED.items():
        client = web(program).send(request, GET + b"\r\n")
        answer = client.answer()
        assert (name, answer.status, answer.closes) == (name, status, True)
        assert client.is_over(), name
    assert not notes("served")
    assert web(program).get("/x").status == 200
    assert program.wait_ready(1) == [worker]
    program.finish(allow=SAID)


def test_another_coding_is_not_implemented(serve: Serve, web: Dial) -> None:
    """A body in another coding than chunks is refused before its application is asked. (h11 says 400.)"""
    program = serve()
    assert web(program).send(POST + b"Transfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n").answer().status == 501
    program.finish(allow=SAID)


@pytest.mark.parametrize("kind", KINDS)
def test_in_order(serve: Serve, web: Dial, notes: Notes, kind: str) -> None:
    """What came before something wrong is answered first; then the refusal, or the end, and never in the middle of
    another answer."""
    program = serve(kind)
    client = web(program).send(GET + b"\r\n" + GET + b"\r\n" + GET + HOST + b"\r\n")
    assert [client.answer().status for _ in range(3)] == [200, 200, 400]
    assert client.is_over()
    slow, bad = (web(program).send(b"GET /gate HTTP/1.1\r\n" + HOST + b"\r\n") for _ in range(2))
    noted(notes, "begun", 2)
    slow.send(CHUNKED + b"5\r\nhello\r\nxyz\r\n")
    bad.send(b"GARBAGE\r\n\r\n")
    program.write("go", "")
    assert [slow.answer().status, slow.answer().status, slow.is_over()] == [200, 400, True]
    assert bad.answer().status == 200
    with contextlib.suppress(Exception):
        assert bad.answer().status == 400
    begun = web(program).send(b"POST /parts HTTP/1.1\r\n" + HOST + b"Transfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n")
    received = b""
    while b"hello" not in received:
        received += begun.sock.recv(1000)
    assert b"HTTP/1.1" not in begun.send(b"xyz\r\n").rest()
    program.finish(allow=SAID)


@pytest.mark.parametrize("kind", ["asgi", "app:H11", "app:Below", "app:BelowH11"])
def test_whole_urls(serve: Serve, web: Dial, kind: str) -> None:
    """Of a whole URL, as to a proxy, the host counts and not the header, and the path is the application's; `*` is for
    OPTIONS."""
    program = serve(kind)
    root = "/below" if "Below" in kind else ""
    client = web(program).send(b"GET http://other:81/a%20b?q=%41 HTTP/1.1\r\nX: 1\r\n" + HOST + b"\r\n")
    told = json.loads(client.answer().body)
    assert told["headers"] == [["x", "1"], ["host", "other:81"]]
    assert (told["path"], told["raw"], told["query"]) == (root + "/a b", root + "/a%20b", "q=%41")
    assert json.loads(client.send(b"OPTIONS * HTTP/1.1\r\n" + HOST + b"\r\n").answer().body)["path"] == root + "*"
    assert json.loads(client.get("//x").body)["path"] == root + "//x"
    program.finish()


def test_old_clients(serve: Serve, web: Dial) -> None:
    """HTTP/1.0 needs no Host, and has no 100 (Continue)."""
    program = serve()
    client = web(program).send(b"POST / HTTP/1.0\r\nExpect: 100-continue\r\nContent-Length: 5\r\n\r\n", b"hello")
    assert json.loads(client.answer().body)["body"] == "hello"
    client = web(program).send(POST + b"Expect: 100-continue\r\nContent-Length: 5\r\n\r\n")
    assert client.answer().status == 100
    assert json.loads(client.send(b"hello").answer().body)["body"] == "hello"
    program.finish()


# -- what does not come to an end ------------------------------------------------------------------


HEADS = (GET + b"X: ", b"GET /")
TRAILERS = (CHUNKED + b"0\r\nX: ", CHUNKED + b"1\r\na\r\n0\r\nX: ")


@pytest.mark.parametrize(("kind", "app"), [("asgi", "app:app"), ("wsgi", "webapp:app")])
def test_endless(serve: Serve, web: Dial, kind: str, app: str) -> None:
    """A header, a target or a trailer that never ends is refused when it is longer than the limit, and the worker does
    not grow."""
    program = serve(kind, app)
    (worker,) = program.wait_ready(1)
    web(program).get("/echo")
    before = private_memory(worker)
    for begin in (*HEADS, *TRAILERS):
        client = web(program).send(begin)
        with contextlib.suppress(ConnectionError):  # the refusal is reset by what still comes, where nobody lingers
            for _ in range(300):
                client.send(b"a" * HEAD_LIMIT)
        with contextlib.suppress(ConnectionError):
            assert client.rest()[8:13] in (b" 414 ", b" 431 ", b"")
        assert private_memory(worker) - before < 8 << 20, begin
    program.finish(allow=SAID)


@pytest.mark.parametrize(("kind", "app"), [("asgi", "app:app"), ("wsgi", "webapp:app")])
def test_long_bodies_have_no_end_to_mind(serve: Serve, web: Dial, kind: str, app: str) -> None:
    """A body of many chunks, or of large ones, is not mistaken for a head, whatever its pieces are."""
    program = serve(kind, app)
    client = web(program)
    for size in (1, 1000, 3 * HEAD_LIMIT):
        chunk = b"%x\r\n%b\r\n" % (size, b"a" * size)
        number = 6 * HEAD_LIMIT // size if size > 1 else 2 * HEAD_LIMIT // len(chunk)
        pieces = [chunk] * number if size > 1 else [piece for _ in range(number) for piece in (b"1\r\n", b"a", b"\r\n")]
        client.send(CHUNKED, *pieces, b"0\r\n\r\n")
        assert len(json.loads(client.answer().body)["body"]) == size * number
    program.finish()


@pytest.mark.parametrize(
    ("line", "headers", "status"),
    [
        (("GET", "1.1", b"/"), [b"host"], 0),
        (("GET", "1.0", b"/"), [], 0),
        (("GET", "1.1", b"HTTPS://a"), [b"host"], 0),
        (("GET", "1.1", b"http:///a"), [b"host"], 400),
        (("GET", "1.1", b""), [b"host"], 400),
        (("OPTIONS", "1.1", b"*"), [b"host"], 0),
        (("GET", "1.2", b"/"), [b"host"], 505),
        (("CONNECT", "1.1", b"a:80"), [b"host"], 501),
        (("GET", "1.1", b"/"), [b"host", b"transfer-encoding"], 501),
    ],
)
def test_fault_of(line: tuple[str, str, bytes], headers: list[bytes], status: int) -> None:
    """The status of a head, by its line and headers."""
    assert fault_of(*line, [(name, b"x") for name in headers]) == status

"""A fast stop takes less than half a second in every class of workers, whatever its clients have sent or not taken."""

import ssl
from contextlib import ExitStack
from pathlib import Path
from signal import SIGINT, SIGTERM, Signals

import pytest

from support import Address, Program, dial, elapse, patterns, until, within
from support.clients import queued
from support.scripts import Start, launch, path_of_modules, rest

pytestmark = pytest.mark.timeout(60)

PROGRAMS = """
import asyncio
import http.server
from kit import *
import prefork.workers.asgi.worker

LARGE = b"x" * 9_000_000

def body_for(path):
    return LARGE if "large" in path else b"small"

def wsgi(environ, start_response):
    environ["wsgi.input"].read()
    start_response("200 OK", [("Content-Type", "text/plain")])
    return [body_for(environ["PATH_INFO"])]

async def asgi(scope, receive, send):
    if scope["type"] == "lifespan":
        raise NotImplementedError
    while (await receive()).get("more_body"):
        pass
    body = body_for(scope["path"])
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"%d" % len(body))]})
    await send({"type": "http.response.body", "body": body})

class Plain(prefork.workers.asgi.worker.ASGIWorker):
    def new_loop(self):
        return asyncio.SelectorEventLoop()

class Kept(prefork.BufferedHTTPMixIn, http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.rfile.read(int(self.headers.get("Content-Length", "0")))
        body = body_for(self.path)
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    do_POST = do_GET

    def log_message(self, *arguments):
        pass

class Filtered(Kept):
    has_request = staticmethod(lambda data: b"\\r\\n\\r\\n" in data)

class Coroutine(prefork.AsyncStreamRequestHandler):
    async def handle(self):
        line = await self.reader.readline()
        while await self.reader.readline() != b"\\r\\n":
            pass
        if line.startswith(b"POST"):
            await self.reader.read()
        self.writer.write(b"HTTP/1.1 200 OK\\r\\n\\r\\n" + body_for(line.decode()))
"""

HEAD = b"GET / HTTP/1.1\r\nHost: test\r\n\r\n"
POST = b"POST / HTTP/1.1\r\nHost: test\r\nContent-Length: %d\r\n"

# What a client sends, and whether it sees the beginning of an answer before the stop. No client takes more than that.
SILENT = (b"", False)
HALF_HEAD = (HEAD[:20], False)
KEPT = (HEAD, True)
KEPT_HALF_HEAD = (HEAD + HEAD[:20], True)
REFUSED = (b"GARBAGE\r\n\r\n", True)
SHORT_HALF_BODY = (POST % 10 + b"\r\nhalf", False)
LONG_HALF_BODY = (POST % 500_000 + b"Expect: 100-continue\r\n\r\nhalf", True)
SLOW = (HEAD.replace(b"/", b"/large", 1), True)

# The class of workers, its flags, NAME of the program, and the clients that wait when the stop comes.
WAITING = (SILENT, HALF_HEAD, KEPT, KEPT_HALF_HEAD)
STOPS = {
    "wsgi, waiting": ("wsgi", (), "wsgi", (*WAITING, REFUSED, SHORT_HALF_BODY)),
    "wsgi, in progress": ("wsgi", (), "wsgi", (SLOW,)),
    "wsgi with threads, waiting": ("wsgi", ("--threads", 3), "wsgi", (*WAITING, REFUSED, SHORT_HALF_BODY)),
    "wsgi with threads, in progress": ("wsgi", ("--threads", 3), "wsgi", (SLOW, LONG_HALF_BODY)),
    "asgi, waiting": ("asgi", (), "asgi", (*WAITING, SLOW)),
    "asgi, in progress": ("asgi", (), "asgi", (LONG_HALF_BODY,)),
    "asgi on asyncio's loop, waiting": ("programs:Plain", (), "asgi", (*WAITING, SLOW)),
    "sync, kept": ("sync", (), "Kept", (KEPT_HALF_HEAD,)),
    "thread, in progress": ("thread", (), "Kept", (*WAITING, SHORT_HALF_BODY, SLOW)),
    "has_request, waiting": ("thread", (), "Filtered", (SILENT, HALF_HEAD)),
    "asyncio, in progress": ("asyncio", (), "Coroutine", (SILENT, HALF_HEAD, SLOW)),
}


def client(address: Address, stack: ExitStack, sent: bytes, answered: bool) -> None:
    """A connection with a small window."""
    sock = stack.enter_context(dial(address, window=4096))
    sock.sendall(sent)
    if answered:
        assert sock.recv(1)


@pytest.mark.parametrize("orders", [(SIGINT,), (SIGTERM, SIGINT)], ids=["INT", "TERM, INT"])
@pytest.mark.parametrize("kind", STOPS)
def test_clients_hold_up_no_fast_stop(start: Start, kind: str, orders: tuple[Signals, ...]) -> None:
    """Clients that are silent, have sent a part, or take nothing do not delay a fast stop, nor a graceful one that
    becomes fast."""
    worker_class, flags, name, clients = STOPS[kind]
    argv = [f"programs:{name}", "-b", "tcp://127.0.0.1:0", "--worker-class", worker_class, "-w", 1, *flags]
    program: Program = start("prefork", *argv, files={"programs.py": PROGRAMS}, env=path_of_modules()).ready()
    with ExitStack() as stack:
        for sent, answered in clients:
            client(program.address, stack, sent, answered)
        until(lambda: not queued(program.address), 5, "all are accepted")
        for order in orders[:-1]:
            program.send(order)
            program.wait_for(patterns.STOPPING)
            elapse(0.1)  # nothing shows that a worker leaves whose clients still have time
        within(program.stop(orders[-1]).seconds, 0.5)
    program.finish()


@pytest.mark.parametrize("name", ["asgi", "Coroutine"])
def test_tls_holds_up_no_fast_stop(start: Start, certificate: tuple[Path, Path], name: str) -> None:
    """Clients of TLS that are silent in the handshake, or at the end of their connection, do not delay a fast stop."""
    cert, key = certificate
    body = f"""
    import ssl
    from programs import {name}

    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain({str(cert)!r}, {str(key)!r})

    class Pool(prefork.PreforkTCPServer):
        worker_class = {"asgi" if name == "asgi" else "asyncio"!r}
        workers = 1

    with Pool(("127.0.0.1", 0), {name}) as server:
        server.socket = context.wrap_socket(server.socket, server_side=True)
        server.serve_forever()
    """
    program = launch(start, body, files={"programs.py": PROGRAMS}).ready()
    context = ssl.create_default_context(cafile=str(cert))
    with ExitStack() as stack:
        if name == "asgi":
            stack.enter_context(dial(program.address))
        else:
            sock = context.wrap_socket(dial(program.address), server_hostname="127.0.0.1")
            stack.enter_context(sock)
            sock.sendall(HEAD)
            assert rest(sock).endswith(b"small")
        until(lambda: not queued(program.address), 5, "it is accepted")
        within(program.stop(SIGINT).seconds, 0.5)
    program.finish()

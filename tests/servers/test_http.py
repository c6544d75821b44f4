"""`http.server` on the pool: replies in one piece, bodies of requests, and other servers than the pool's."""

import functools
import http.client
import http.server
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from prefork.servers.http import BufferedHTTPMixIn, PreforkHTTPServer
from support import elapse
from support.http_pages import SERVER, Client, serve
from support.scripts import Start, launch, path_of_modules

pytestmark = pytest.mark.timeout(60)


# -- replies ---------------------------------------------------------------------------------------


def pieces(handler: Callable[..., object], request: bytes) -> list[bytes]:
    """What a handler sends, by system call: this kind of socket keeps the bounds."""
    near, far = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    found: list[bytes] = []

    def listen() -> None:
        while part := far.recv(1 << 20):
            found.append(part)

    with near, far:
        near.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)
        far.sendall(request)
        far.shutdown(socket.SHUT_WR)
        thread = threading.Thread(target=listen)
        thread.start()
        handler(near, ("", 0), SimpleNamespace())  # it asks nothing of its server
        near.shutdown(socket.SHUT_WR)
        thread.join(5)
    return found


class Page(http.server.BaseHTTPRequestHandler):
    size = 100

    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(self.size))
        self.end_headers()
        for _ in range(self.size // 100):
            self.wfile.write(b"x" * 100)

    def log_message(self, format: str, *arguments: object) -> None:
        """Silence."""


GET = b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"


def test_a_reply_is_one_piece() -> None:
    """Head and body leave in one system call, of a reply as of an error; the bare handler takes two."""
    assert len(pieces(Page, GET)) == 2
    assert len(pieces(type("Kept", (BufferedHTTPMixIn, Page), {}), GET)) == 1
    assert len(pieces(type("Kept", (BufferedHTTPMixIn, Page), {}), GET.replace(b"GET", b"PUT"))) == 1


def test_a_big_body_streams() -> None:
    """No more than the limit is held back, and nothing is lost or out of order."""
    kept: Any = type("Kept", (BufferedHTTPMixIn, Page), {"size": 300_000})
    found = pieces(kept, GET)
    assert max(map(len, found)) <= kept.write_limit + 100
    assert b"".join(found).partition(b"\r\n\r\n")[2] == b"x" * 300_000


def test_what_a_handler_may_write() -> None:
    """Whatever is like bytes, and nothing else; nothing after the end."""
    found: list[Any] = []

    class Writes(BufferedHTTPMixIn, Page):
        def do_GET(self) -> None:
            found.append(self.wfile)
            assert [self.wfile.write(one) for one in (b"ab", bytearray(b"cd"), memoryview(b"ef"))] == [2, 2, 2]
            for wrong in ("text", 5):
                with pytest.raises(TypeError):
                    self.wfile.write(wrong)  # type: ignore[arg-type]

    assert pieces(Writes, GET) == [b"abcdef"]
    with pytest.raises(ValueError):
        found[0].write(b"late")


def test_each_kept_request_is_quick(start: Start) -> None:
    """Fifty requests on one connection take no 44 ms each, in which a client delays its acknowledgement."""
    program = serve(start)
    with ExitStack() as stack:
        client = Client(program, stack)
        assert client.ask("nodelay") == "1"
        begun = time.monotonic()
        for _ in range(50):
            client.ask("done")
        assert time.monotonic() - begun < 1.5
    program.finish()


def test_what_was_written_is_sent_before_a_wait(start: Start) -> None:
    """A handler that flushes and then waits has sent what it wrote; one that reads need not flush."""
    program = serve(start)
    with ExitStack() as stack:
        client = Client(program, stack)
        client.send("stream")
        while client.file.readline() != b"\r\n":
            pass
        assert client.file.read(5) == b"begun"
        program.write("go", "")
        assert client.ended()
        client = Client(program, stack)
        client.sock.sendall(b"POST / HTTP/1.1\r\nExpect: 100-continue\r\nContent-Length: 4\r\n\r\n")
        assert client.file.readline() == b"HTTP/1.1 100 Continue\r\n"
        assert client.file.readline() == b"\r\n"
        client.sock.sendall(b"body")
        status, headers, body = client.hear()
        assert (status, headers["Connection"], body) == (200, None, b"body")
        assert client.ask("done") == "done"
    program.finish()


def test_a_reply_without_an_end_ends_its_connection(start: Start) -> None:
    """A handler that knows nothing of keep-alive is safe: what has no length is ended by the end, and says so."""
    program = serve(start)
    with ExitStack() as stack:
        client = Client(program, stack)
        client.ask("done")
        client.send("", "HEAD")
        assert client.hear(head=True)[1]["Connection"] is None
        client.send("endless")
        status, headers, body = client.hear()
        assert (status, headers["Connection"], body) == (200, "close", b"to the end")
        for path, method in (("", "PUT"), ("a b", "GET")):
            client = Client(program, stack)
            client.send(path, method)
            status, headers, _ = client.hear()
            assert status in (400, 501) and headers["Connection"] == "close"
            assert client.ended()
    program.finish()


def test_the_socket_given_to_a_child(start: Start) -> None:
    """A handler that hands its connection to a child process, as CGI does, is served as it was: whole, then the end."""
    program = serve(start, handler="rbufsize = 0")
    with ExitStack() as stack:
        client = Client(program, stack)
        client.sock.sendall(b"GET /child HTTP/1.1\r\n\r\nall the rest")
        client.sock.shutdown(socket.SHUT_WR)
        status, headers, body = client.hear()
        assert (status, headers["Content-Type"], body) == (200, "text/plain", b"all the rest")
    program.finish()


def test_old_clients_are_told(start: Start) -> None:
    """A client of HTTP/1.0 keeps its connection only where it asked, and is told that it may."""
    program = serve(start)
    with ExitStack() as stack:
        client = Client(program, stack)
        for _ in range(2):
            client.sock.sendall(b"GET /done HTTP/1.0\r\nConnection: keep-alive\r\n\r\n")
            assert client.hear()[1]["Connection"] == "keep-alive"
        client.sock.sendall(b"GET /done HTTP/1.0\r\n\r\n")
        client.hear()
        assert client.ended()
    program.finish()


# -- bodies of requests ----------------------------------------------------------------------------


def test_pipelined_requests(start: Start) -> None:
    """Requests that come in one piece are answered one by one, and in order; one that has begun is awaited."""
    program = serve(start, keepalive_timeout=0.2)
    with ExitStack() as stack:
        client = Client(program, stack)
        bodies = [b"one", b"two" * 5000, b"three"]
        for body in bodies:
            client.send("", "POST", body)
        assert [client.hear()[2] for _ in bodies] == bodies
        client.sock.sendall(GET + b"GET /done HT")
        client.hear()
        elapse(0.5)  # longer than an idle connection may wait
        client.sock.sendall(b"TP/1.1\r\n\r\n")
        assert client.hear()[0] == 200
    program.finish()


@pytest.mark.parametrize(
    ("body", "headers", "kept"),
    [
        (b"GET /leave_3 HTTP/1.1\r\n\r\n", {}, True),
        (b"x" * 60_000, {}, True),
        (b"x" * 70_000, {}, False),
        (b"4\r\nGET \r\n0\r\n\r\n", {"Transfer_Encoding": "chunked"}, False),
        (b"", {"Expect": "100-continue", "Content_Length": "4"}, False),
    ],
)
def test_a_body_that_nobody_reads(start: Start, body: bytes, headers: dict[str, str], kept: bool) -> None:
    """What a handler leaves of a request's body is never taken for a request."""
    program = serve(start)
    with ExitStack() as stack:
        client = Client(program, stack)
        client.send("ignore", "POST", body, **headers)
        if "Expect" in headers:
            assert client.file.readline() + client.file.readline() == b"HTTP/1.1 100 Continue\r\n\r\n"
        status, _, text = client.hear()
        assert (status, text) == (200, b"ignored")
        if kept:
            assert client.ask("done") == "done"
        else:
            assert client.ended()
            assert Client(program, stack).ask("done") == "done"
    program.finish()


def test_a_refused_upload_is_told(start: Start) -> None:
    """A client that sends a big body nobody wants still gets to read the reply, and no reset in its place."""
    program = serve(start)
    with ExitStack() as stack:
        client = Client(program, stack)
        client.sock.sendall(b"GET /" + b"x" * 3_000_000 + b" HTTP/1.1\r\n\r\n")
        assert client.hear()[0] == 414 and client.ended()
        client = Client(program, stack)
        client.send("", "PUT", Content_Length="3000000")
        client.sock.sendall(b"x" * 3_000_000)
        assert client.hear()[0] == 501 and client.ended()
        client = Client(program, stack)
        client.send("ignore", "POST", b"x" * 3_000_000)
        assert client.hear()[2] == b"ignored" and client.ended()
    program.finish()


# -- odd requests ----------------------------------------------------------------------------------

LONG = b"x" * 70_000
ODD = {
    "long line": (b"GET /" + LONG + b" HTTP/1.1\r\n\r\n", 414),
    "long header": (b"GET / HTTP/1.1\r\nA: " + LONG + b"\r\n\r\n", 431),
    "many headers": (b"GET / HTTP/1.1\r\n" + b"A: b\r\n" * 200 + b"\r\n", 431),
    "one word": (b"GET\r\n\r\n", 400),
    "four words": (b"GET /a b HTTP/1.1\r\n\r\n", 400),
    "another protocol": (b"GET / HTTX/1.1\r\n\r\n", 400),
    "no minor version": (b"GET / HTTP/1\r\n\r\n", 400),
    "a later version": (b"GET / HTTP/2.0\r\n\r\n", 505),
    "POST of HTTP/0.9": (b"POST /\r\n\r\n", 400),
}


@pytest.mark.parametrize("before", [b"", GET.replace(b" / ", b" /done ")], ids=["first", "kept"])
def test_a_head_that_cannot_be_parsed(start: Start, before: bytes) -> None:
    """The error has a status and headers and ends the connection, on every version of Python."""
    program = serve(start)
    with ExitStack() as stack:
        for request, code in ODD.values():
            client = Client(program, stack)
            client.sock.sendall(before + request)
            if before:
                assert client.hear()[0] == 200
            status, headers, body = client.hear()
            assert (status, headers["Connection"], len(body)) == (code, "close", int(headers["Content-Length"]))
            assert client.ended()
    program.finish()


@pytest.mark.parametrize("more", [b"", b"\r\n", b"A: b\r\n\r\n"])
def test_a_request_without_a_version(start: Start, more: bytes) -> None:
    """HTTP/0.9: the line alone is a request, whatever may follow; the reply has no head, and the connection ends."""
    program = serve(start)
    with ExitStack() as stack:
        client = Client(program, stack)
        client.sock.sendall(b"GET /done\r\n" + more)
        assert client.file.read() == b"%d done" % program.children()[0]
    program.finish()


def test_blanks_that_are_not_ascii(start: Start) -> None:
    """The standard library splits a request at them: such a request has a version, and its headers are headers."""
    program = serve(start)
    with ExitStack() as stack:
        client = Client(program, stack)
        client.sock.sendall(b"POST\xa0/ HTTP/1.1\r\nContent-Length: 4\r\n\r\nbody")
        assert client.hear()[2] == b"body"
        assert client.ask("done") == "done"
    program.finish()


@pytest.mark.skipif(sys.version_info < (3, 15), reason="extra_response_headers is Python 3.15's")
def test_extra_headers(tmp_path: Path) -> None:
    """The headers that a server of files adds to its replies are sent."""
    (tmp_path / "index.html").write_text("text")
    kept: Any = type(
        "Kept", (BufferedHTTPMixIn, http.server.SimpleHTTPRequestHandler), {"log_message": Page.log_message}
    )
    extra = functools.partial(kept, directory=str(tmp_path), extra_response_headers=[("X-More", "one")])
    (reply,) = pieces(extra, GET)
    assert b"\r\nX-More: one\r\n" in reply and reply.endswith(b"\r\n\r\ntext")


# -- with other servers ----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["HTTPServer", "ThreadingHTTPServer"])
def test_without_a_pool(kind: str) -> None:
    """The mix-in serves with the standard library's servers too."""
    handler = type("Kept", (BufferedHTTPMixIn, Page), {})
    with getattr(http.server, kind)(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        connection = http.client.HTTPConnection("127.0.0.1", server.server_address[1], timeout=5)
        for _ in range(2):
            connection.request("GET", "/")
            assert connection.getresponse().read() == b"x" * 100
        connection.close()
        server.shutdown()
        thread.join(5)


def test_threads_in_each_worker(start: Start) -> None:
    """With ThreadingMixIn a worker keeps many connections, and leaves all of them when it is told to."""
    body = SERVER.replace(
        "(PreforkHTTPServer)", "(prefork.PreforkMixIn, socketserver.ThreadingMixIn, http.server.HTTPServer)"
    )
    program = launch(start, body.replace("CLASS", "pass").replace("SETTINGS", "")).ready()
    with ExitStack() as stack:
        clients = [Client(program, stack) for _ in range(8)]
        for _ in range(3):
            for client in clients:
                assert client.ask("done") == "done"
        assert program.stop().seconds < 5.0
        assert all(client.ended() for client in clients)
    program.finish()


@pytest.mark.skipif(sys.version_info < (3, 14), reason="HTTPSServer is Python 3.14's")
def test_the_standard_server_of_https(start: Start, certificate: tuple[Path, Path]) -> None:
    """HTTPSServer, whose listener is an SSLSocket, is served by the pool, and keeps its connections."""
    path, key = certificate
    body = SERVER.replace("(PreforkHTTPServer)", "(prefork.PreforkMixIn, http.server.HTTPSServer)")
    body = body.replace("Kept) as", f"Kept, certfile={str(path)!r}, keyfile={str(key)!r}) as")
    program = launch(start, body.replace("CLASS", "pass").replace("SETTINGS", "")).ready()
    context = ssl.create_default_context(cafile=str(path))
    with ExitStack() as stack:
        client = Client(program, stack, context)
        assert client.ask("done") == client.ask("done") == "done"
        assert program.stop().seconds < 5.0
        assert client.ended()
    program.finish()


@pytest.mark.parametrize("what", ["app:Server", "app:Kept", "http.server:SimpleHTTPRequestHandler"])
def test_the_command_serves_http(start: Start, what: str) -> None:
    """The command takes the server class, a handler class, and the standard library's own."""
    app = "from kit import *\n" + SERVER.replace("CLASS", "pass").replace("SETTINGS", "RequestHandlerClass = Kept")
    files = {"app.py": app, "done": "1 done"}
    access = r'127\.0\.0\.1 - - \[.*\] "GET /done HTTP/1.1" 200 -'
    program = start(
        "prefork", what, "-b", "tcp://127.0.0.1:0", "-w", 1, files=files, env=path_of_modules(), allow=[access]
    )
    program.ready()
    with ExitStack() as stack:
        assert Client(program, stack).ask("done") == "done"
    program.finish()


def test_its_name_is_looked_up_for_whoever_asks(monkeypatch: pytest.MonkeyPatch) -> None:
    """A bind waits for no name server; the names of HTTPServer are there all the same, and may be set."""
    asked: list[str] = []

    def look_up(host: str) -> str:
        asked.append(host)
        return "here.test"

    monkeypatch.setattr(socket, "getfqdn", look_up)
    with PreforkHTTPServer(("127.0.0.1", 0), Page) as server:
        assert not asked
        assert (server.server_name, server.server_port) == ("here.test", server.server_address[1])
        assert (server.server_name, asked) == ("here.test", ["127.0.0.1"])
        server.server_name = "mine.test"
        assert server.server_name == "mine.test"


def test_it_is_imported_only_where_it_is_used() -> None:
    """`import prefork` does not import http.server, which takes 30 ms; its names are there all the same."""
    code = """
import sys, prefork
assert not {"http.server", "http.client", "email"} & sys.modules.keys()
from prefork import BufferedHTTPMixIn, PreforkHTTPServer
assert PreforkHTTPServer.__mro__[1] is prefork.PreforkMixIn
try: prefork.NoSuchThing
except AttributeError as error: print(error)
"""
    done = subprocess.run([sys.executable, "-I", "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr, done.stdout) == (0, "", "module 'prefork' has no attribute 'NoSuchThing'\n")

"""`http.server` on the pool: replies in one piece, connections that are kept, and how those end."""

import http.client
import http.server
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import ExitStack
from types import SimpleNamespace
from typing import Any

import pytest

from prefork.servers.http import BufferedHTTPMixIn
from support import Program, dial, elapse, patterns, until
from support.scripts import Notes, Start, launch, noted, path_of_modules

pytestmark = pytest.mark.timeout(60)

SERVER = """
import http.server
from prefork import BufferedHTTPMixIn, PreforkHTTPServer

class Pages(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        order = self.path[1:].replace("_", " ")
        if order == "nodelay":
            text = str(self.connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY))
        elif order == "endless":
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b"to the end")
            return
        elif order == "stream":
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b"begun")
            self.wfile.flush()
            pass_gate("go")
            text = None
        elif order == "leaving":
            note("begun")
            while not self.server.worker.draining:
                select.select([], [], [], 0.005)
            text = "done"
        elif order == "child":
            self.send_response(200)
            self.flush_headers()
            self.wfile.flush()
            line = "printf 'Content-Type: text/plain\\\\r\\\\n\\\\r\\\\n'; cat"
            subprocess.run(["/bin/sh", "-c", line], stdin=self.rfile, stdout=self.wfile, check=True)
            return
        else:
            text = perform(order)
        if text is not None:
            self.reply(f"{os.getpid()} {text}".encode())

    def do_HEAD(self):
        self.send_response(200)
        self.end_headers()

    def do_POST(self):
        size = int(self.headers["Content-Length"] or 0)
        self.reply(b"ignored" if self.path == "/ignore" else self.rfile.read(size))

    def reply(self, body):
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *arguments):
        pass

class Kept(BufferedHTTPMixIn, Pages):
    CLASS

class Server(PreforkHTTPServer):
    workers = 1
    keepalive_timeout = 30
    SETTINGS

if __name__ == "__main__":
    with Server(("127.0.0.1", 0), Kept) as server:
        server.serve_forever()
"""


def serve(start: Start, handler: str = "pass", allow: tuple[str, ...] = (), **settings: object) -> Program:
    text = "; ".join(f"{name} = {value!r}" for name, value in settings.items())
    return launch(start, SERVER.replace("CLASS", handler).replace("SETTINGS", text), allow=allow).ready()


class Client:
    """One connection, of which every byte is told to the reply it belongs to."""

    def __init__(self, program: Program, stack: ExitStack) -> None:
        self.sock = stack.enter_context(dial(program.address, 10.0))
        self.file = stack.enter_context(self.sock.makefile("rb"))

    def send(self, path: str, method: str = "GET", body: bytes = b"", **headers: str) -> None:
        lines = [f"{method} /{path} HTTP/1.1", "Host: x", *(f"{k.replace('_', '-')}: {v}" for k, v in headers.items())]
        if method == "POST" and not headers.keys() & {"Transfer_Encoding", "Content_Length"}:
            lines.append(f"Content-Length: {len(body)}")
        self.sock.sendall("\r\n".join([*lines, "", ""]).encode() + body)

    def hear(self, head: bool = False) -> tuple[int, Any, bytes]:
        """Status, headers and body of the next reply."""
        line = self.file.readline()
        if not line:
            raise EOFError
        headers = http.client.parse_headers(self.file)
        length = headers["Content-Length"]
        body = b"" if head else self.file.read(None if length is None else int(length))
        return int(line.split()[1]), headers, body

    def ask(self, path: str, method: str = "GET", body: bytes = b"", **headers: str) -> str:
        """Ask for something that must succeed; the reply's text behind the pid."""
        self.send(path, method, body, **headers)
        status, _, text = self.hear()
        assert status == 200
        return text.decode().partition(" ")[2] or text.decode()

    def ended(self) -> bool:
        """Whether nothing but the end comes now."""
        return self.file.read() == b""


# -- replies ---------------------------------------------------------------------------------------


def pieces(handler: type[http.server.BaseHTTPRequestHandler], request: bytes) -> list[bytes]:
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
        handler(near, ("", 0), SimpleNamespace())  # type: ignore[arg-type]  # it asks nothing of its server
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
        client.send("", "PUT", Content_Length="3000000")
        client.sock.sendall(b"x" * 3_000_000)
        assert client.hear()[0] == 501 and client.ended()
        client = Client(program, stack)
        client.send("ignore", "POST", b"x" * 3_000_000)
        assert client.hear()[2] == b"ignored" and client.ended()
    program.finish()


# -- the end of a connection -----------------------------------------------------------------------


def test_an_idle_connection_ends(start: Start) -> None:
    """After `keepalive_timeout` without a word; with 0 after each reply, which says so."""
    program = serve(start, keepalive_timeout=0.3)
    with ExitStack() as stack:
        client = Client(program, stack)
        client.ask("done")
        begun = time.monotonic()
        assert client.ended()
        assert 0.2 < time.monotonic() - begun < 10
        Client(program, stack).ask("done")
    program.finish()
    program = serve(start, keepalive_timeout=0)
    with ExitStack() as stack:
        client = Client(program, stack)
        client.send("done")
        assert client.hear()[1]["Connection"] == "close" and client.ended()
    program.finish()


@pytest.mark.parametrize("whole", [False, True])
def test_a_worker_that_leaves_ends_its_idle_connections(start: Start, whole: bool) -> None:
    """Neither the stop of the pool nor that of one worker waits for a connection on which nothing is asked."""
    program = serve(start, workers=2)
    with ExitStack() as stack:
        clients = [Client(program, stack) for _ in range(2)]
        for client in clients:
            client.ask("done")
        if whole:
            assert program.stop().seconds < 5.0
        else:
            before = program.wait_ready(2)
            program.send(signal.SIGHUP)
            program.wait_for(patterns.RELOADED)
            program.wait_ready(2, without=before)
        assert all(client.ended() for client in clients)
    program.finish()


def test_a_reply_tells_that_the_worker_leaves(start: Start, notes: Notes) -> None:
    """A request in hand is answered, and its client told that nothing more is: it cannot lose a request."""
    program = serve(start)
    with ExitStack() as stack:
        client = Client(program, stack)
        client.ask("done")
        client.send("leaving")
        noted(notes, "begun")
        program.send(signal.SIGTERM)
        status, headers, _ = client.hear()
        assert (status, headers["Connection"]) == (200, "close") and client.ended()
    assert program.wait_exit().code == 0
    program.finish()


def test_a_connection_that_has_not_asked_yet(start: Start) -> None:
    """One that was accepted, and says what it wants only after the worker was told to leave, is answered."""
    program = serve(start)
    with ExitStack() as stack:
        client = Client(program, stack)
        client.sock.sendall(b"GET /done ")
        elapse(0.1)
        program.send(signal.SIGTERM)
        program.wait_for(patterns.STOPPING)
        elapse(0.2)
        client.sock.sendall(b"HTTP/1.1\r\n\r\n")
        status, headers, _ = client.hear()
        assert (status, headers["Connection"]) == (200, "close")
    assert program.wait_exit().code == 0
    program.finish()


def test_nothing_is_lost_by_reloads(start: Start) -> None:
    """Clients that keep their connections, more of them than workers, lose no request in ten reloads and a resize."""
    program = serve(start, workers=2, max_surge=2)
    stop, lost, done = threading.Event(), list[str](), [0] * 5

    def run(number: int) -> None:
        while not stop.is_set():
            with ExitStack() as stack:
                client = Client(program, stack)
                while not stop.is_set():
                    try:
                        client.send("done")
                        _, headers, body = client.hear()
                    except (OSError, EOFError) as error:
                        lost.append(f"{number}: {error!r} after {done[number]}")
                        break
                    assert body.endswith(b" done")
                    done[number] += 1
                    if headers["Connection"] == "close":
                        break

    threads = [threading.Thread(target=run, args=(number,)) for number in range(5)]
    for thread in threads:
        thread.start()
    try:
        for round_ in range(10):
            program.send(signal.SIGHUP)
            program.wait_for(patterns.RELOADED, 20, number=round_ + 1)
        program.send(signal.SIGTTIN)
        program.wait_ready(3, 10)
        before = list(done)
        until(lambda: all(now > then + 20 for now, then in zip(done, before, strict=True)), 20, "everybody has turns")
    finally:
        stop.set()
        for thread in threads:
            thread.join(10)
    assert not lost
    program.finish()


def test_a_connection_has_its_number_of_requests(start: Start) -> None:
    """After so many requests a connection ends, by a reply that says so."""
    program = serve(start, handler="most_requests = 3")
    with ExitStack() as stack:
        client = Client(program, stack)
        for told in (None, None, "close"):
            client.send("done")
            assert client.hear()[1]["Connection"] == told
        assert client.ended()
    program.finish()


def test_others_have_their_turn(start: Start) -> None:
    """Where the only worker has a connection, another client waits for a turn and not for `keepalive_timeout`: when the
    first is idle, and when it is busy."""
    program = serve(start)
    with ExitStack() as stack:
        idle = Client(program, stack)
        idle.ask("done")
        begun = time.monotonic()
        busy = Client(program, stack)
        assert busy.ask("done") == "done"
        assert idle.ended()
        other = Client(program, stack)
        other.send("done")
        told = None
        while told is None:
            busy.send("done")
            told = busy.hear()[1]["Connection"]
        assert told == "close" and busy.ended()
        assert other.hear()[0] == 200
        assert time.monotonic() - begun < 15
    program.finish()


def test_each_request_has_its_deadline(start: Start) -> None:
    """`request_timeout` counts from a request's first byte, not from the connection's, and still interrupts one."""
    program = serve(start, request_timeout=1.0, allow=(patterns.HANDLER_ERROR, patterns.TRACEBACK))
    with ExitStack() as stack:
        client = Client(program, stack)
        for _ in range(3):
            client.ask("done")
            elapse(0.4)
        elapse(0.8)
        assert client.ask("done") == "done"
        begun = time.monotonic()
        client.send("hang")
        assert client.ended()
        assert time.monotonic() - begun < 10
    program.wait_for("RequestTimeout")
    program.finish()


def test_a_client_that_goes_is_no_error(start: Start) -> None:
    """A kept connection that is reset between two requests is not worth a line."""
    program = serve(start)
    with ExitStack() as stack:
        client = Client(program, stack)
        client.ask("done")
        client.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        client.file.close()
        client.sock.close()
        Client(program, stack).ask("done")
    program.finish()


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

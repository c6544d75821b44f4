"""The worker class `wsgi` in its pool: who holds a worker and who does not, threads, changes under load, frameworks."""

import re
import select
import signal
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from support import Program, elapse, patterns, until
from support.scripts import Notes, Start, launch, noted, path_of_modules
from support.web import KeepAlive, Unanswered, Web

pytestmark = pytest.mark.timeout(60)

TCP = "tcp://127.0.0.1:0"
GET = b"GET /pid HTTP/1.1\r\nHost: test\r\n\r\n"


def serve(start: Start, *flags: object, app: str = "webapp:app", bind: str = TCP, **options: Any) -> Program:
    """The command over an application, with the class wsgi and one worker if no flag says otherwise."""
    flags = (*flags, *([] if "-w" in flags else ["-w", 1]))
    program: Program = start(
        "prefork", app, "-b", bind, "--worker-class", "wsgi", *flags, env=path_of_modules(), **options
    )
    return program.ready()


# -- who holds a worker ----------------------------------------------------------------------------


@pytest.mark.parametrize("threads", [1, 3])
def test_waiting_clients_hold_nobody(start: Start, threads: int) -> None:
    """Clients that idle between requests, or send a head or short body slowly, leave the only worker to the others."""
    program = serve(start, "--threads", threads)
    with ExitStack() as stack:
        idle, slow, slower, mute = [stack.enter_context(Web(program.address)) for _ in range(4)]
        assert idle.get().status == 200
        slow.send(b"GET / HT")
        slower.send(b"POST /echo HTTP/1.1\r\nHost: test\r\nContent-Length: 2\r\n\r\nh")
        assert mute.sock.fileno() >= 0
        for _ in range(50):
            assert stack.enter_context(Web(program.address)).get().status == 200
        assert [idle.get().status, slower.send(b"i").answer().status] == [200, 200]
        assert slow.send(b"TP/1.1\r\nHost: test\r\n\r\n").answer().status == 200
        assert mute.get().status == 200
    program.finish()


@pytest.mark.parametrize("threads", [1, 2])
def test_long_requests_are_served_in_turn(start: Start, threads: int) -> None:
    """Of clients that ask again at once for what takes long, and outnumber the threads, each is served as often."""
    program = serve(start, "--threads", threads)
    ask = b"GET /sleep/0.01 HTTP/1.1\r\nHost: test\r\n\r\n"
    with ExitStack() as stack, select.epoll() as epoll:
        clients = {}
        for _ in range(4):
            client = stack.enter_context(Web(program.address)).send(ask)
            clients[client.sock.fileno()] = client
            epoll.register(client.sock, select.EPOLLIN)
        served = dict.fromkeys(clients, 0)
        while sum(served.values()) < 120:
            ready = epoll.poll(10)
            assert ready, "nobody is answered"
            for fd, _ in ready:
                assert clients[fd].answer().body == b"slept"
                clients[fd].send(ask)
                served[fd] += 1
    assert min(served.values()) >= 26, served  # 20 where all are fetched at once
    assert program.stop().code == 0


def test_threads(start: Start, notes: Notes) -> None:
    """With threads, slow applications of one worker run beside each other; when all are busy the next waits."""
    program = serve(start, "--threads", 3)
    with ExitStack() as stack:
        clients = [stack.enter_context(Web(program.address)) for _ in range(5)]
        clients[0].get()
        for client in clients[:3]:
            client.send(b"GET /gate/go HTTP/1.1\r\nHost: test\r\n\r\n")
        noted(notes, "begun", 3)
        for client in clients[3:]:
            client.send(GET)
        elapse(0.2)
        program.write("go", "")
        assert [client.answer().body for client in clients[:3]] == [b"through"] * 3
        assert [client.answer().status for client in clients[3:]] == [200] * 2
    program.finish()


def test_threads_under_load(start: Start) -> None:
    """Kept connections are answered in threads without a loss, also through a stop."""
    program = serve(start, "-w", 2, "--threads", 4)
    load = KeepAlive(program.address, clients=12)
    until(lambda: load.counts["sum"] > 500, 20)
    program.send(signal.SIGHUP)
    program.wait_for(patterns.RELOADED)
    counts = load.stop()
    assert counts["lost"] == 0
    assert program.stop().code == 0
    program.finish()


def test_stuck_thread(start: Start, notes: Notes) -> None:
    """A request in a thread that is past its deadline has its worker replaced."""
    allow = [patterns.FAULT, patterns.TRACEBACK]
    program = serve(start, "--threads", 2, "--request-timeout", 0.4, "--graceful-timeout", 2, allow=allow)
    (worker,) = program.wait_ready(1)
    with Web(program.address) as stuck, Web(program.address) as other:
        stuck.send(b"GET /hang HTTP/1.1\r\nHost: test\r\n\r\n")
        assert other.get().status == 200
        program.wait_ready(1, without=[worker], timeout=10)
        with Web(program.address) as fresh:
            assert fresh.get().status == 200
    program.finish()


def test_a_deadline_that_the_application_moves(start: Start) -> None:
    """An application finds its worker in the environment, and gives its request more time."""
    program = serve(start, "--request-timeout", 0.5, allow=[patterns.TRACEBACK])
    with Web(program.address) as client:
        assert client.get("/extend/20,1.2").status == 200
    with Web(program.address) as client:
        assert client.get("/extend/0.6,15").status == 503
    program.finish()


def test_child_of_the_application(start: Start) -> None:
    """A process that the application forks holds copies of its connections; they end all the same, and only once."""
    program = serve(start)
    with Web(program.address) as kept, Web(program.address) as last:
        assert kept.get().status == 200
        child = kept.get("/fork/go").body.decode()
        assert last.get("/pid", "Connection: close").status == 200
        assert last.is_over()
        assert kept.get("/pid", "Connection: close").status == 200
        assert kept.is_over()
        program.write("go", "")
        with Web(program.address) as other:
            assert other.get(f"/reap/{child}").status == 200
    program.finish()


LATE = """
import prefork.workers.wsgi.worker
from kit import *
from webapp import app

class Late(prefork.workers.wsgi.worker.WSGIWorker):
    def run(self):
        if self.generation == 1 and self.slot == 0:
            note("begun run")
            pass_gate("go")
        super().run()
"""


@pytest.mark.parametrize("order", ["retire", "stop"])
def test_told_to_leave_before_it_accepts(start: Start, notes: Notes, order: str) -> None:
    """TERM between ready and the first wait: the worker leaves as if it had served, and a stop takes the queue."""
    argv = ["late:app", "-b", TCP, "--worker-class", "late:Late", "-w", 1]
    program: Program = start("prefork", *argv, files={"late.py": LATE}, env=path_of_modules()).ready()
    (first,) = program.wait_ready(1)
    noted(notes, "begun")
    with Web(program.address) as queued:
        if order == "stop":
            queued.send(GET)
            program.send(signal.SIGTERM)
            program.wait_for(patterns.STOPPING)
            elapse(0.3)
            program.write("go", "")
            assert queued.answer().status == 200
            assert program.wait_exit().code == 0
        else:
            program.send(signal.SIGTERM, first)
            program.wait_ready(2)
            program.write("go", "")
            program.wait_ready(1, without=[first])
            assert queued.get().status == 200
    program.finish()


# -- changes under load ----------------------------------------------------------------------------


def test_nothing_is_lost_on_kept_connections(start: Start) -> None:
    """Reload, recycling, resizing and stop lose no request that was sent on a kept connection."""
    program = serve(start, "-w", 2, "--max-requests", 300)
    load = KeepAlive(program.address, clients=8)
    until(lambda: load.counts["sum"] > 400, 20)
    program.send(signal.SIGHUP)
    program.wait_for(patterns.RELOADED)
    seen = load.counts["sum"]
    until(lambda: load.counts["sum"] > seen + 1500, 20)
    program.send(signal.SIGTTIN)
    seen = load.counts["sum"]
    until(lambda: load.counts["sum"] > seen + 300, 20)
    stopped = program.stop()
    counts = load.stop()
    assert (stopped.code, counts["lost"]) == (0, 0)
    assert counts["closed"] >= 8
    assert len(program.found(patterns.LEFT)) > 4
    program.finish()


def test_stop_answers_what_was_sent(start: Start, notes: Notes) -> None:
    """On a stop, what is in progress, half sent, pipelined or queued is answered; idle clients see the stream's end."""
    program = serve(start)
    with ExitStack() as stack:
        idle, half, pipelined, held, queued = [stack.enter_context(Web(program.address)) for _ in range(5)]
        for one in (idle, half, pipelined):
            one.get()
        half.send(GET[:20])
        held.send(b"GET /gate/go HTTP/1.1\r\nHost: test\r\n\r\n")
        noted(notes, "begun")
        pipelined.send(GET + GET)
        queued.send(GET)
        program.send(signal.SIGTERM)
        program.wait_for(patterns.STOPPING)
        program.write("go", "")
        assert held.answer().body == b"through"
        assert queued.answer().status == 200
        assert half.send(GET[20:]).answer().status == 200
        assert pipelined.answer().status == 200
        assert all(one.is_over() for one in (half, held, queued, idle))
    program.wait_exit()
    program.finish()


def test_idle_pool_stops_at_once(start: Start) -> None:
    """Without clients a stop takes no time."""
    program = serve(start, "-w", 2)
    assert program.stop().seconds < 1
    program.finish()


# -- what is served --------------------------------------------------------------------------------

FLASK = """
from flask import Flask, request

app = Flask(__name__)

@app.post("/sum")
def total():
    return {"sum": sum(request.get_json()), "from": request.remote_addr}

@app.get("/stream")
def stream():
    return (f"{number}\\n" for number in range(3))
"""

DJANGO = """
import os

from django.conf import settings
from django.core.wsgi import get_wsgi_application
from django.http import HttpResponse, StreamingHttpResponse
from django.urls import path

settings.configure(SECRET_KEY="test", ROOT_URLCONF=__name__, ALLOWED_HOSTS=["*"], DEBUG=False)

def hello(request, name):
    return HttpResponse(f"Hello, {name}! {request.method} {len(request.body)}")

def stream(request):
    return StreamingHttpResponse(str(number).encode() for number in range(3))

urlpatterns = [path("hello/<str:name>", hello), path("stream", stream)]
application = get_wsgi_application()
"""


def test_flask(start: Start) -> None:
    """A Flask application is served as it is."""
    program = serve(start, app="shop:app", files={"shop.py": FLASK})
    with Web(program.address) as client:
        answer = client.get("/sum", "Content-Type: application/json", method="POST", body=b"[1, 2, 3]")
        assert answer.body.strip() == b'{"from":"127.0.0.1","sum":6}'
        assert client.get("/stream").body == b"0\n1\n2\n"
        assert client.get("/nowhere").status == 404
        assert client.get("/sum", method="HEAD").status == 405
    program.finish()


def test_django(start: Start) -> None:
    """A Django project is served as it is, to http.client too."""
    import http.client

    program = serve(start, app="site1:application", files={"site1.py": DJANGO})
    connection = http.client.HTTPConnection("127.0.0.1", program.address.port, timeout=10)
    for name, body in (("W%C3%B6rld", None), ("you", b"x" * 100_000)):
        connection.request("POST" if body else "GET", f"/hello/{name}", body=body)
        answer = connection.getresponse()
        text = answer.read().decode()
        assert answer.status == 200
        assert text in ("Hello, W\xf6rld! GET 0", "Hello, you! POST 100000")
    connection.request("GET", "/stream")
    assert connection.getresponse().read() == b"012"
    connection.close()
    program.finish()


@pytest.mark.parametrize("where", ["in the class", "on the server"])
def test_program_of_ones_own(start: Start, where: str) -> None:
    """In a program the application stands where the handler class does; verify_request() is asked, wherever it is."""
    program = launch(
        start,
        """
        from webapp import app

        class ApplicationServer(prefork.PreforkTCPServer):
            worker_class = "wsgi"
            workers = 2
            keepalive_timeout = 1

        def verify_request(*arguments):
            return not (HOME / "shut").exists()

        if WHERE == "in the class":
            ApplicationServer.verify_request = verify_request
        with ApplicationServer(("127.0.0.1", 0), app) as server:
            if WHERE == "on the server":
                server.verify_request = verify_request
            server.serve_forever()
        """.replace("WHERE", repr(where)),
    ).ready()
    with Web(program.address) as client:
        assert client.get().status == 200
    program.write("shut", "")
    with Web(program.address) as client, pytest.raises((Unanswered, ConnectionResetError)):
        client.get()
    program.finish()


def test_several_addresses(start: Start) -> None:
    """TCP and Unix listeners of one pool: each client is answered, and one of a Unix socket has no address."""
    program = serve(start, "-b", "unix:{run}/web", "-w", 2)
    first, second = program.addresses
    for address in (first, second, first, second):
        with Web(address) as client:
            assert client.get().status == 200
            body = client.get("/echo").body
            assert (b'"REMOTE_ADDR": ""' in body) == (address.kind == "unix")
    load, other = KeepAlive(first, clients=4), KeepAlive(second, clients=4)
    until(lambda: min(load.counts["sum"], other.counts["sum"]) > 200, 20)
    assert program.stop().code == 0
    assert (load.stop()["lost"], other.stop()["lost"]) == (0, 0)
    program.finish()


# -- what is refused before anything is forked -----------------------------------------------------


def complaint(tmp_path: Path, text: str, *flags: str, isolate: str = "pass") -> str:
    """The last line of a command that must fail."""
    (tmp_path / "app.py").write_text(text)
    run = "from prefork.command.cli import main; sys.exit(main())"
    code = f"import sys; {isolate}; sys.argv = ['prefork', *sys.argv[1:]]; {run}"
    done = subprocess.run(
        [sys.executable, "-c", code, "app:app", "--worker-class", "wsgi", *flags],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=20,
        check=False,
    )
    assert done.returncode in (2, 4), done.stderr
    lines = [line for line in done.stderr.splitlines() if not patterns.LOG_LINE.match(line)]
    assert len(lines) == 1, done.stderr
    return lines[0]


GOOD = "def app(environ, start_response):\n    return []\n"
THREADING = """
import socketserver, prefork
class app(prefork.PreforkMixIn, socketserver.ThreadingMixIn, socketserver.TCPServer):
    RequestHandlerClass = print
"""
SECURE = """
import socketserver, ssl, prefork
class app(prefork.PreforkTCPServer):
    RequestHandlerClass = print
    def server_activate(self):
        self.socket = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH).wrap_socket(self.socket, server_side=True)
        super().server_activate()
"""


@pytest.mark.parametrize(
    ("text", "flags", "isolate", "expected"),
    [
        (GOOD, ("-b", "udp://127.0.0.1:0"), "pass", r".*datagrams.*tcp://.*"),
        ("app = 7\n", ("-b", TCP), "pass", r".*no application.*"),
        (THREADING, ("-b", TCP), "pass", r".*process_request.*threads.*"),
        (SECURE, ("-b", TCP), "pass", r".*TLS.*proxy.*"),
        (GOOD, ("-b", TCP), "sys.modules['httptools'] = None", r".*pip install 'prefork\[wsgi\]'.*"),
    ],
)
def test_refusals(tmp_path: Path, text: str, flags: tuple[str, ...], isolate: str, expected: str) -> None:
    """What the class cannot serve, or lacks, is said in one line with the mend, before anything is forked."""
    assert re.fullmatch(expected, complaint(tmp_path, text, *flags, isolate=isolate))

"""The first command of a user of another server: it works, or says in one line what to type."""

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest

from support import Address, Program, patterns, until
from support.clients import dial, has_ipv6
from support.scripts import Start, path_of_modules, rest
from support.web import Web

pytestmark = pytest.mark.timeout(60)

FLASK = """
from flask import Flask

app = Flask(__name__)

@app.get("/")
def index():
    return "done"
"""
FLASK_FACTORY = """
from flask import Flask

def create_app(config=None):
    app = Flask(__name__)
    app.add_url_rule("/", view_func=lambda: "done")
    return app
"""
FASTAPI = """
from fastapi import FastAPI
from fastapi.responses import PlainTextResponse

app = FastAPI()

@app.get("/", response_class=PlainTextResponse)
async def index():
    return "done"

def create_app():
    return app
"""
DJANGO = """
import django.conf, django.core.wsgi, django.http, django.urls

def index(request):
    return django.http.HttpResponse("done")

urlpatterns = [django.urls.path("", index)]
django.conf.settings.configure(ROOT_URLCONF=__name__, ALLOWED_HOSTS=["*"], SECRET_KEY="x")
application = django.core.wsgi.get_wsgi_application()
"""
WSGI = """
def app(environ, start_response):
    start_response("200 OK", [("Content-Type", "text/plain"), ("Content-Length", "4")])
    return [b"done"]
"""
ASGI = """
class Application:
    async def __call__(self, scope, receive, send):
        assert scope["type"] == "http"
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"4")]})
        await send({"type": "http.response.body", "body": b"done"})

app = Application()
"""
HTTP_HANDLER = """
from http.server import BaseHTTPRequestHandler

class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.send_header("Content-Length", "4")
        self.end_headers()
        self.wfile.write(b"done")
"""
HANDLER = """
import socketserver

class Handler(socketserver.StreamRequestHandler):
    def handle(self):
        self.wfile.write(b"done")

class Datagrams(socketserver.DatagramRequestHandler):
    def handle(self):
        self.wfile.write(b"done")

class Server(socketserver.ThreadingTCPServer):
    RequestHandlerClass = Handler

    def __init__(self, address, handler=Handler):
        super().__init__(address, handler)

class UDP(socketserver.UDPServer):
    def __init__(self, address):
        super().__init__(address, Datagrams)
"""
SERVER = (
    HANDLER
    + """
import prefork

server = prefork.PreforkTCPServer(("127.0.0.1", 0), Handler)
"""
)
SERVER_FACTORY = (
    HANDLER
    + """
import prefork

def make(address):
    return prefork.PreforkTCPServer(address, Handler)
"""
)
ASYNC_HANDLER = """
import prefork

class Handler(prefork.AsyncStreamRequestHandler):
    async def handle(self):
        self.writer.write(b"done")
"""

HTTP_LOG = r'(127\.0\.0\.1|unix) - - \[.*\] "GET .*" 200 -'


def http(address: Address) -> bytes:
    with Web(address) as web:
        return web.send(b"GET / HTTP/1.1\r\nHost: test\r\nConnection: close\r\n\r\n").answer().body


def http_1_0(address: Address) -> bytes:
    """As `http.server` answers."""
    with dial(address) as sock:
        sock.sendall(b"GET / HTTP/1.0\r\n\r\n")
        answer = rest(sock)
    assert answer.startswith(b"HTTP/1.0 200 "), answer
    return bytes(answer.partition(b"\r\n\r\n")[2])


def stream(address: Address) -> bytes:
    with dial(address) as sock:
        return bytes(rest(sock))


def datagram(address: Address) -> bytes:
    with dial(address) as sock:
        sock.sendall(b"x")
        return bytes(sock.recv(100))


class Row(NamedTuple):
    """A first command that works: the text of app.py, the words, how it is asked, and what it is taken for."""

    app: str
    words: str
    asks: Callable[[Address], bytes]
    taken: str


WSGI_TAKEN = "is a WSGI application; worker class wsgi"
ASGI_TAKEN = "is an ASGI application; worker class asgi"

# PORT is 0 for all of them: without -b the kernel chooses the port.
WORKS = {
    "gunicorn, flask": Row(FLASK, "app:app", http, f"app:app {WSGI_TAKEN}"),
    "gunicorn, options": Row(
        WSGI, "-w 2 -k wsgi -b 127.0.0.1:0 --threads 2 --max-requests 100 --max-requests-jitter 10 --keep-alive 2 "
        "--graceful-timeout 5 --access-logfile {run}/../access app:app", http, f"app:app {WSGI_TAKEN}",
    ),
    "gunicorn, factory": Row(FLASK_FACTORY, "app:create_app() -b :0", http, f"app:create_app() {WSGI_TAKEN}"),
    "gunicorn, django": Row(DJANGO, "app -b 0", http, f"app:application {WSGI_TAKEN}"),
    "gunicorn, unix": Row(WSGI, "app:app --bind unix:{run}/s", http, f"app:app {WSGI_TAKEN}"),
    "uvicorn, fastapi": Row(FASTAPI, "app:app", http, f"app:app {ASGI_TAKEN}"),
    "uvicorn, factory": Row(FASTAPI, "app:create_app", http, f"app:create_app() {ASGI_TAKEN}"),
    "uvicorn, an object": Row(ASGI, "app:app -b localhost:0 --workers 2", http, f"app:app {ASGI_TAKEN}"),
    "uvicorn, a class": Row(ASGI, "app:Application", http, f"app:Application() {ASGI_TAKEN}"),
    "uvicorn, a path": Row(ASGI, "app:app -b {run}/s", http, f"app:app {ASGI_TAKEN}"),
    "flask run": Row(FLASK, "app", http, f"app:app {WSGI_TAKEN}"),
    "flask run, factory": Row(FLASK_FACTORY, "app", http, f"app:create_app() {WSGI_TAKEN}"),
    "uwsgi": Row(WSGI.replace("def app", "def application"), "app", http, f"app:application {WSGI_TAKEN}"),
    "http.server, files": Row(
        "", "http.server:SimpleHTTPRequestHandler", lambda address: http_1_0(address) and b"done",
        "http.server:SimpleHTTPRequestHandler is a handler class of http.server; worker class sync",
    ),
    "http.server, a handler": Row(
        HTTP_HANDLER, "app:Handler -b 127.0.0.1:0", http_1_0,
        "app:Handler is a handler class of http.server; worker class sync",
    ),
    "http.server, a path": Row(
        HTTP_HANDLER, "app -b {run}/s", http_1_0, "app:Handler is a handler class of http.server; worker class sync"
    ),
    "socketserver, a handler": Row(HANDLER, "app", stream, "app:Handler is a handler class; worker class sync"),
    "socketserver, threads": Row(
        HANDLER, "app:Handler -k thread -b 0", stream, "app:Handler is a handler class; worker class thread"
    ),
    "socketserver, datagrams": Row(
        HANDLER, "app:Datagrams -b 127.0.0.1:0", datagram, "app:Datagrams is a handler class; worker class sync"
    ),
    "socketserver, a server class": Row(
        HANDLER, "app:Server", stream, "app:Server is a server class; worker class sync"
    ),
    "socketserver, a udp server": Row(HANDLER, "app:UDP", datagram, "app:UDP is a server class; worker class sync"),
    "socketserver, a server": Row(SERVER, "app:server", stream, "app:server is a server; worker class sync"),
    "socketserver, a factory": Row(
        SERVER_FACTORY, "app:make", stream, "app:make is a factory of servers that takes an address; worker class sync"
    ),
    "socketserver, a factory of several": Row(
        SERVER_FACTORY + "\ndef both():\n    return [make(('127.0.0.1', 0)), make(('127.0.0.1', 0))]\n", "app:both",
        stream, "app:both is a factory of servers; worker class sync",
    ),
    "asyncio, a handler": Row(
        ASYNC_HANDLER, "app:Handler", stream, "app:Handler is an asynchronous handler class; worker class asyncio"
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", WORKS)
def test_works(start: Start, name: str) -> None:
    """A first command serves without an option that only prefork has, and says what it took the program for."""
    row = WORKS[name]
    program: Program = start("prefork", *row.words.split(), files={"app.py": row.app}, env={"PORT": "0"}).ready()
    address = program.address
    assert row.asks(address) == b"done"
    lines = [line.partition(": ")[2] for line in program.log.splitlines()]
    assert lines[0].startswith(row.taken), lines
    workers = int(re.findall(r"\b(\d+) workers?\b", lines[0])[0])
    assert len(program.wait_ready(workers)) == workers
    speaks_http = row.asks not in (stream, datagram) and not address.is_unix
    assert lines[0].endswith(f"; open http://127.0.0.1:{address.port}") is speaks_http
    assert f"kill -TERM {program.pid}" in lines[1] and f"kill -HUP {program.pid}" in lines[1]
    assert program.stop(signal.SIGINT).code == 0
    program.finish(allow=[HTTP_LOG])


class Refused(NamedTuple):
    """A first command that says what to type: the words, the exit code, and a part of the line."""

    words: str
    code: int
    says: str
    app: str = FLASK


REFUSED = {
    "gunicorn, gthread": Refused("-k gthread app:app", 2, "-k wsgi --threads N"),
    "gunicorn, gevent": Refused("-k gevent app:app", 2, "-k wsgi --threads N"),
    "gunicorn, sync": Refused("-k sync app:app", 2, "leave -k out, or type -k wsgi"),
    "gunicorn, uvicorn": Refused("-k uvicorn.workers.UvicornWorker app:app", 2, "-k asgi", FASTAPI),
    "gunicorn, timeout": Refused("--timeout 30 app:app", 2, "--request-timeout"),
    "gunicorn, daemon": Refused("-D app:app", 2, "systemd"),
    "gunicorn, arguments": Refused("app:create_app('x')", 2, "write a function"),
    "uvicorn, host": Refused("app:app --host 0.0.0.0 --port 80", 2, "-b HOST:PORT"),
    "uvicorn, reload": Refused("app:app --reload", 2, "kill -HUP PID"),
    "uvicorn, factory": Refused("--factory app:create_app", 2, "a factory is called"),
    "uvicorn, url": Refused("app:app -b http://0.0.0.0:80", 2, "-b 0.0.0.0:80"),
    "flask run, app": Refused("--app app", 2, "prefork MODULE:NAME"),
    "flask run, debug": Refused("app --debug", 2, "--log-level debug"),
    "uwsgi, http": Refused("--http :8000 --module app:app", 2, "-b HOST:PORT"),
    "uwsgi, file": Refused("--wsgi-file app.py", 2, "prefork MODULE"),
    "http.server, port": Refused("http.server:SimpleHTTPRequestHandler 8000", 2, "-b 8000"),
    "http.server, bind": Refused("http.server:SimpleHTTPRequestHandler --bind 127.0.0.1", 2, "127.0.0.1:8000"),
    "a file": Refused("app.py", 2, "type the module: prefork app"),
    "a file here": Refused("./app.py", 2, "type the module: prefork app"),
    "a file elsewhere": Refused("src/app.py:app", 2, "prefork --chdir src/ app:app"),
    "a name that does not resolve": Refused("app -b no.such.name.invalid:0", 1, "no name of this machine"),
    "a folder that is not there": Refused("app -b ./run/s", 1, "make its directory first"),
    "a class in capitals": Refused("app -k WSGI", 2, "did you mean 'wsgi'?"),
    "a dot for a colon": Refused("app.app", 4, "did you mean app:app?"),
    "a script": Refused("app", 4, "type prefork app:Lines", HTTP_HANDLER.replace("class Handler", "class Lines")),
    "a script that serves": Refused(
        "app --boot-timeout 0.5", 4, "__main__", "import threading\nthreading.Event().wait()\n"
    ),
    "asgi for wsgi": Refused("app:app -k wsgi", 2, "leave -k out, or type -k asgi", ASGI),
    "wsgi for asgi": Refused("app:app -k asgi", 2, "worker_class wsgi"),
    "a coroutine": Refused("app", 2, "a factory is a plain function", "async def create_app(): ...\n"),
    "a server class without a handler": Refused(
        "http.server:ThreadingHTTPServer", 2, "RequestHandlerClass in it, or name the handler class"
    ),
    "another server": Refused("app:Handler", 4, "is not the only server", SERVER),
    "a factory of one argument": Refused("app", 4, "takes nothing", "def create_app(name):\n    return name.title()\n"),
    "a factory that raises": Refused("app", 4, "app:create_app() raised", "def create_app():\n    1 / 0\n"),
    "a wrong name": Refused("app:ap", 4, "did you mean 'app'?"),
    "a wrong module": Refused("apq:app", 4, "did you mean 'app'?"),
    "no usual name": Refused("app", 4, "type prefork app:NAME", "number = 7\n"),
    "no program": Refused("app:number", 4, "app:number is 7", "number = 7\n"),
    "a module": Refused("app:os", 4, "type prefork os", "import os\n"),
    "anything": Refused("app:app", 2, "type -k wsgi or -k asgi", "def app(*arguments): ...\n"),
    "asgi 2": Refused("app:App", 2, "type -k asgi", "class App:\n    def __init__(self, scope): ...\n"),
    "a view": Refused("app:index", 2, "app:index is a function (request)", "def index(request): ...\n"),
    "a factory of nothing": Refused("app", 4, "app:create_app() returned 7", "def create_app():\n    return 7\n"),
    "a server and an address": Refused("app:server -b 0", 2, "leave -b out", SERVER),
    "datagrams of a stream": Refused("app:Datagrams -b tcp://127.0.0.1:0", 2, "datagrams", HANDLER),
}


@pytest.mark.parametrize("name", REFUSED)
def test_says_what_to_type(start: Start, name: str) -> None:
    """What cannot work ends with its exit code and one line, which says what to type instead."""
    row = REFUSED[name]
    program: Program = start("prefork", *row.words.split(" "), files={"app.py": row.app}, env={"PORT": "0"})
    program.wait_exit(20)
    program.finish(code=row.code, allow=["prefork: error: .*", patterns.TRACEBACK])
    line, *own_traceback = program.log.splitlines()
    assert row.says in line and (not own_traceback or own_traceback[0].startswith("Traceback ")), program.log


def test_nothing_at_all(start: Start) -> None:
    """The command alone shows the three commonest uses, and is a usage error."""
    program = start("prefork")
    program.wait_exit(20)
    program.finish(code=2, allow=[patterns.ANYTHING])
    assert "prefork app:app " in program.log and len(program.log.splitlines()) == 8


def test_wrong_port_of_the_environment(start: Start) -> None:
    """A wrong PORT is a usage error that names it; who has an address does not need it."""
    program = start("prefork", "app", files={"app.py": FLASK}, env={"PORT": "x"})
    program.wait_exit(20)
    program.finish(code=2, allow=["prefork: error: PORT in the environment is 'x'.*"])
    served = start("prefork", "app:server", files={"app.py": SERVER}, env={"PORT": "x"}).ready()
    assert stream(served.address) == b"done"
    served.finish()


def test_default_address(start: Start) -> None:
    """Without -b and without PORT the address is 127.0.0.1:8000, as the error says where that is taken."""
    with socket.socket() as taken:
        taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            taken.bind(("127.0.0.1", 8000))
            taken.listen()
        except OSError:
            pytest.skip("somebody else has port 8000, and might give it back meanwhile")
        program = start("prefork", "app", files={"app.py": WSGI}, env={"PORT": ""})
        program.wait_exit(20)
    program.finish(
        code=1, allow=[r"prefork: error: cannot listen on 127.0.0.1:8000: Address already in use; .* \[PF0401\]"]
    )


@pytest.mark.skipif(not has_ipv6(), reason="needs IPv6")
def test_dual_stack(start: Start) -> None:
    """`[::]:PORT` serves clients of IPv4 and of IPv6."""
    program = start("prefork", "app", "-b", "[::]:0", files={"app.py": WSGI}).ready()
    port = program.address.port
    assert f"; open http://[::1]:{port}" in program.log
    for host in ("127.0.0.1", "::1"):
        assert http(Address("tcp", host, port)) == b"done"
    program.finish()


UNSHARE = ["unshare", "--net"]
NAMESPACE = (
    shutil.which("unshare") and not subprocess.run([*UNSHARE, "true"], capture_output=True, check=False).returncode
)
ASKS_BOTH = """
import re, socket, subprocess, sys

command = [sys.executable, "-m", "prefork", "app", "-b", "[::]:0", "-w", "1"]
with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as master:
    log = ""
    while "pool ready" not in log:
        log += master.stderr.readline()
    for host in ("127.0.0.1", "::1"):
        with socket.create_connection((host, int(re.search(r"://\\[::\\]:(\\d+)", log)[1]))) as sock:
            sock.sendall(b"GET / HTTP/1.0\\r\\n\\r\\n")
            print(sock.makefile("rb").read().endswith(b"done"))
    master.terminate()
    master.communicate()
    sys.exit(master.returncode)
"""


@pytest.mark.skipif(not NAMESPACE or not has_ipv6(), reason="needs a network namespace of its own, and IPv6")
def test_dual_stack_where_the_system_has_it_otherwise(tmp_path: Path) -> None:
    """So it is on a system whose sockets of IPv6 take IPv6 alone by default."""
    (tmp_path / "app.py").write_text(WSGI)
    (tmp_path / "asks.py").write_text(ASKS_BOTH)
    alone = "echo 1 > /proc/sys/net/ipv6/bindv6only && ip link set lo up || exit 77; exec "
    words = [*UNSHARE, "sh", "-c", f"{alone} {sys.executable} asks.py"]
    done = subprocess.run(
        words,
        cwd=tmp_path,
        env={**os.environ, **path_of_modules()},
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    if done.returncode == 77:
        pytest.skip("needs the right to change a namespace's settings")
    assert (done.returncode, done.stdout, done.stderr) == (0, "True\nTrue\n", "")


@pytest.mark.parametrize(("extra", "library", "app"), [("wsgi", "httptools", WSGI), ("asgi", "uvicorn", ASGI)])
def test_a_missing_extra(start: Start, tmp_path: Path, extra: str, library: str, app: str) -> None:
    """A library that is not installed: a usage error that says what to install."""
    (tmp_path / "sitecustomize.py").write_text(f"import sys\nsys.modules[{library!r}] = None\n")
    path = os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])])
    program = start("prefork", "app", files={"app.py": app}, env={"PORT": "0", "PYTHONPATH": path})
    program.wait_exit(20)
    program.finish(code=2, allow=[f"prefork: error: .*pip install 'prefork\\[{extra}\\]'.*"])
    assert len(program.log.splitlines()) == 1


def test_the_master_has_the_class_and_not_the_program(start: Start) -> None:
    """The class of workers that the program needs is imported once, by the master; the program only by its children."""
    text = f"import os\nwith open('imports', 'a') as file:\n    print(os.getpid(), file=file)\n{WSGI}"
    program = start("prefork", "app", "-w", 2, files={"app.py": text}, env={"PORT": "0"}).ready()
    workers = set(program.wait_ready(2))
    noted = program.work / "imports"
    until(lambda: len(noted.read_text().split()) == 3, 10, "the probe and two workers have imported the program")
    pids = set(map(int, noted.read_text().split()))
    assert workers < pids and program.pid not in pids
    assert "httptools" in Path(f"/proc/{program.pid}/maps").read_text()
    program.finish()

"""Host and port as one text, wherever the two meet: URLs that applications build, names of listeners and of clients."""

import socket
from contextlib import ExitStack
from typing import Any

import pytest

import prefork.kernel.host_port as host_port
import prefork.kernel.listener as listener
from prefork.link.scoreboard import Scoreboard
from support import Address, Program, patterns
from support.clients import has_ipv6
from support.scripts import Start, path_of_modules
from support.web import Web

pytestmark = pytest.mark.timeout(60)

APP = """
import json
from wsgiref.util import request_uri
from flask import Flask, request

flask = Flask(__name__)

@flask.get("/flask")
def url():
    return request.url

def app(environ, start_response):
    if environ["PATH_INFO"] == "/flask":
        return flask(environ, start_response)
    said = [request_uri(environ), environ["SERVER_NAME"], environ["SERVER_PORT"], environ.get("HTTP_HOST")]
    start_response("200 OK", [])
    return [json.dumps(said).encode()]

async def asgi(scope, receive, send):
    assert scope["type"] == "http"
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": json.dumps([scope["server"], scope["client"][0]]).encode()})
"""


six = pytest.mark.skipif(not has_ipv6(), reason="there is no IPv6 here")


def serve(start: Start, *binds: str, name: str = "app", kind: str = "wsgi") -> Program:
    argv = [f"app:{name}", "--worker-class", kind, "-w", 1]
    for bind in binds:
        argv += ["-b", bind]
    program: Program = start("prefork", *argv, files={"app.py": APP}, env=path_of_modules())
    return program.ready()


def asked(address: Address, raw: str) -> Any:
    """What the application says about a request."""
    import json

    with Web(address) as client:
        answer = client.send(raw.encode()).answer()
    assert answer.status == 200
    return answer.body.decode() if "/flask" in raw else json.loads(answer.body)


@pytest.mark.parametrize("bind", ["tcp://127.0.0.1:0", pytest.param("tcp://[::1]:0", marks=six)])
def test_urls(start: Start, bind: str) -> None:
    """The URL of a request is right without Host, with an empty one, and with a target that is a whole URL; IPv6 is in
    brackets, in the name of the server too."""
    program = serve(start, bind)
    address = program.address
    name, _, port = str(address).removeprefix("tcp://").rpartition(":")
    here = f"http://{name}:{port}/x?q"
    for head in ("GET /x?q HTTP/1.0\r\n", "GET /x?q HTTP/1.0\r\nHost:\r\n", "GET /x?q HTTP/1.1\r\nHost: \r\n"):
        assert asked(address, f"{head}\r\n") == [here, name, port, None], head
    for version, host in (("1.0", ""), ("1.1", "Host: other:1\r\n"), ("1.1", "Host:\r\n")):
        head = f"GET {here} HTTP/{version}\r\n{host}\r\n"
        assert asked(address, head) == [here, name, port, f"{name}:{port}"], head
        head = f"GET http://{name}/x HTTP/{version}\r\n{host}\r\n"
        assert asked(address, head) == [f"http://{name}/x", name, port, name], head
    head = f"GET /x HTTP/1.1\r\nHost: {name}:1\r\n\r\n"
    assert asked(address, head) == [f"http://{name}:1/x", name, port, f"{name}:1"]
    for head in ("GET /flask HTTP/1.0\r\n\r\n", "GET /flask HTTP/1.1\r\nHost:\r\n\r\n"):
        assert asked(address, head) == f"http://{name}:{port}/flask"
    program.finish()


def test_urls_of_a_listener_for_all_addresses(start: Start) -> None:
    """Behind a wildcard, and where nothing else is said, the server is called by the address that its client took."""
    binds = ["tcp://0.0.0.0:0", *(["tcp://[::]:0"] if has_ipv6() else [])]
    program = serve(start, *binds)
    for address, name in zip(program.addresses, ("127.0.0.1", "[::1]"), strict=False):
        near = Address(address.kind, name.strip("[]"), address.port)
        url, *said = asked(near, "GET /x HTTP/1.0\r\n\r\n")
        assert (url, said) == (f"http://{name}:{near.port}/x", [name, str(near.port), None])
    program.finish()


def test_urls_of_a_unix_socket(start: Start) -> None:
    """A Unix socket has no host and no port: the server is called localhost."""
    program = serve(start, "unix:{run}/web")
    assert asked(program.address, "GET /x HTTP/1.0\r\n\r\n") == ["http://localhost/x", "localhost", "80", None]
    program.finish()


@six
def test_addresses_of_asgi(start: Start) -> None:
    """ASGI tells host and port apart: there IPv6 has no brackets."""
    program = serve(start, "tcp://[::1]:0", name="asgi", kind="asgi")
    address = program.address
    assert asked(address, "GET /x HTTP/1.0\r\n\r\n") == [["::1", address.port], "::1"]
    program.finish()


@six
def test_a_client_in_the_report(start: Start) -> None:
    """The report of a worker that died names its client, an IPv6 one in brackets."""
    files = {"app.py": "import os\n\ndef app(environ, start_response):\n    os.kill(os.getpid(), 9)\n"}
    program: Program = start("prefork", "app:app", "-b", "tcp://[::1]:0", "--worker-class", "wsgi", files=files).ready()
    with ExitStack() as stack:
        client = stack.enter_context(Web(program.address))
        port = client.sock.getsockname()[1]
        client.send(b"GET / HTTP/1.0\r\n\r\n")
        assert f"[::1]:{port}" in program.wait_for(patterns.LEFT)[0]
    program.finish()


@pytest.mark.parametrize(
    ("host", "text"),
    [("127.0.0.1", "127.0.0.1:80"), ("::1", "[::1]:80"), ("fe80::1%lo", "[fe80::1%lo]:80"), ("web", "web:80")],
)
def test_every_name_is_the_same(host: str, text: str) -> None:
    """A listener, a client on the scoreboard, and a client in the log are called alike."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    assert listener.describe_address(family, socket.SOCK_STREAM, (host, 80)) == f"tcp://{text}"
    board = Scoreboard()
    slot = board.slot(0)
    slot.set_peer((host, 80, 0, 0))
    slot.floats[1] = 1.0
    assert board.read(0, 2.0).peer == text
    assert host_port.of_peer((host, 80)) == text

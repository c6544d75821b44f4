"""socketserver's contract: every kind of server and every standard server works with the mix-in in front of it.

The programs are a few lines each and stand in their tests. They are real processes, asked by real clients.
"""

import contextlib
import http.client
import signal
import socketserver
import ssl
import xmlrpc.client
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

import prefork
from support import ask, children, dial, elapse, patterns, pids_serving
from support.clients import hear
from support.contract import KINDS, simple
from support.scripts import TCP, Notes, Start, hold, launch, noted, rest

pytestmark = pytest.mark.timeout(60)


# -- servers ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_socket(start: Start, kind: str) -> None:
    """Each of the four servers, over IPv4 and IPv6, answers from its workers and leaves nothing behind."""
    program = launch(start, simple(kind)).ready()
    workers = set(program.wait_ready(2))
    assert pids_serving(program.address, 2) <= workers
    assert program.stop().code == 0
    program.finish()


def test_handlers_are_the_standard_ones() -> None:
    """The handlers that prefork exports are socketserver's own, the same objects."""
    for name in ("BaseRequestHandler", "StreamRequestHandler", "DatagramRequestHandler"):
        assert getattr(prefork, name) is getattr(socketserver, name)


HTTP = """
    import http.server

    class Page(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self):
            body = self.rfile.read(int(self.headers["Content-Length"]))
            if body == b"raise":
                raise ValueError("ordered trouble")
            answer = f"{os.getpid()} {body.decode()}".encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(answer)))
            self.end_headers()
            self.wfile.write(answer)

        def log_message(self, *arguments):
            pass

    class Server(prefork.PreforkMixIn, http.server.HTTPServer):
        workers = 2

    with Server(("127.0.0.1", 0), Page) as server:
        server.serve_forever()
"""


def test_http_server(start: Start) -> None:
    """http.server on the pool: several requests on a connection, and a handler that raises costs nobody else."""
    program = launch(start, HTTP, allow=[patterns.HANDLER_ERROR]).ready()
    workers = program.wait_ready(2)
    connection = http.client.HTTPConnection("127.0.0.1", program.address.port, timeout=5)
    with contextlib.closing(connection):
        seen = set()
        for number in range(5):
            connection.request("POST", "/", body=f"n{number}")
            answer = connection.getresponse()
            pid, text = answer.read().decode().split()
            assert (answer.status, text) == (200, f"n{number}")
            seen.add(int(pid))
        assert len(seen) == 1 and seen <= set(workers)
        connection.request("POST", "/", body="raise")
        with pytest.raises(http.client.RemoteDisconnected):
            connection.getresponse()
        connection.close()
        connection.request("POST", "/", body="again")
        assert connection.getresponse().read().endswith(b"again")
    assert program.children() == workers
    program.finish()


def test_xmlrpc_server(start: Start) -> None:
    """xmlrpc.server on the pool: functions and faults travel."""
    program = launch(
        start,
        """
        import xmlrpc.server

        class Server(prefork.PreforkMixIn, xmlrpc.server.SimpleXMLRPCServer):
            workers = 2

        with Server(("127.0.0.1", 0), logRequests=False, allow_none=True) as server:
            server.register_function(lambda a, b: [os.getpid(), a * b], "multiply")
            server.register_function(lambda: 1 // 0, "fail")
            server.register_introspection_functions()
            server.serve_forever()
        """,
    ).ready()
    workers = program.wait_ready(2)
    with xmlrpc.client.ServerProxy(f"http://127.0.0.1:{program.address.port}", allow_none=True) as proxy:
        answer: Any = proxy.multiply(6, 7)
        assert answer[0] in workers and answer[1] == 42
        with pytest.raises(xmlrpc.client.Fault, match="ZeroDivisionError"):
            proxy.fail()
        listed: Any = proxy.system.listMethods()
        assert "multiply" in listed
    program.finish()


def test_wsgiref_server(start: Start) -> None:
    """wsgiref's server on the pool: its own server_bind and its environment are intact in the workers."""
    program = launch(
        start,
        """
        from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

        class Silent(WSGIRequestHandler):
            def log_message(self, *arguments):
                pass

        class Server(prefork.PreforkMixIn, WSGIServer):
            workers = 2

        def app(environ, start_response):
            start_response("200 OK", [("Content-Type", "text/plain")])
            length = int(environ.get("CONTENT_LENGTH") or 0)
            return [f"{os.getpid()} {environ['SERVER_PORT']} ".encode(), environ["wsgi.input"].read(length)]

        with make_server("127.0.0.1", 0, app, server_class=Server, handler_class=Silent) as server:
            server.serve_forever()
        """,
    ).ready()
    workers = program.wait_ready(2)
    connection = http.client.HTTPConnection("127.0.0.1", program.address.port, timeout=5)
    with contextlib.closing(connection):
        connection.request("POST", "/", body="hello")
        pid, port, text = connection.getresponse().read().decode().split()
    assert (int(pid) in workers, int(port), text) == (True, program.address.port, "hello")
    program.finish()


THREADS = """
    class Server(prefork.PreforkMixIn, socketserver.ThreadingMixIn, socketserver.{base}):
        workers = 1
        daemon_threads = {daemon}

    with Server({address}, {handler}) as server:
        server.serve_forever()
"""


@pytest.mark.parametrize("daemon", [False, True], ids=["threads", "daemons"])
@pytest.mark.parametrize("kind", ["tcp", "udp"])
def test_threads_inside_a_worker(start: Start, notes: Notes, kind: str, daemon: bool) -> None:
    """In front of ThreadingMixIn a worker serves several at once, and leaving it answers what its threads have in
    hand."""
    base, handler = {"tcp": ("TCPServer", "Handler"), "udp": ("UDPServer", "Datagrams")}[kind]
    program = launch(start, THREADS.format(base=base, handler=handler, address=TCP, daemon=daemon)).ready()
    address = program.address
    (worker,) = program.wait_ready(1)
    with ExitStack() as stack:
        clients = [hold(address, stack, "gate go", f"c{number}") for number in range(3)]
        noted(notes, "begun", 3)
        assert ask(address, "thread").result.startswith("Thread-")
        program.send(signal.SIGTERM)
        program.wait_for(patterns.STOPPING)
        elapse(0.05)
        assert program.running and children(program.pid) == [worker]
        program.write("go", "")
        for number, sock in enumerate(clients):
            assert hear(sock, address) == f"{worker}:c{number}:done\n".encode()
    assert program.wait_exit().code == 0
    program.finish()


def test_thread_that_raises(start: Start) -> None:
    """An exception in a worker's thread is the server's handle_error, and the worker lives."""
    body = THREADS.format(base="TCPServer", handler="Handler", address=TCP, daemon=False)
    program = launch(start, body, allow=[patterns.HANDLER_ERROR]).ready()
    before = program.wait_ready(1)
    with dial(program.address) as sock:
        sock.sendall(b"x raise\n")
        assert rest(sock) == b""
    assert [ask(program.address).pid] == before
    assert "ordered trouble" in program.log
    program.finish()


# -- TLS -------------------------------------------------------------------------------------------


def test_tls_listener(start: Start, certificate: tuple[Path, Path], notes: Notes) -> None:
    """A listener wrapped in TLS serves, survives clients that speak no TLS, and loses nobody in a stop."""
    cert, key = certificate
    program = launch(
        start,
        f"""
        import ssl

        class Server(prefork.PreforkTCPServer):
            workers = 2

        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain({str(cert)!r}, {str(key)!r})
        with Server(("127.0.0.1", 0), Handler) as server:
            server.socket = context.wrap_socket(server.socket, server_side=True)
            server.serve_forever()
        """,
    ).ready()
    workers = program.wait_ready(2)
    context = ssl.create_default_context(cafile=str(cert))

    def secure(stack: ExitStack) -> ssl.SSLSocket:
        sock = stack.enter_context(dial(program.address))
        return stack.enter_context(context.wrap_socket(sock, server_hostname="127.0.0.1"))

    for _ in range(4):
        with dial(program.address) as garbage:
            garbage.sendall(b"this is no TLS at all, but it is long enough\n")
            with contextlib.suppress(ConnectionError):
                rest(garbage)
        with ExitStack() as stack:
            sock = secure(stack)
            sock.sendall(b"x\n")
            assert int(rest(sock).split(b":")[0]) in workers
    with ExitStack() as stack:
        held = secure(stack)
        held.sendall(b"x gate go\n")
        noted(notes, "begun")
        program.send(signal.SIGTERM)
        program.wait_for(patterns.STOPPING)
        program.write("go", "")
        assert rest(held).endswith(b":x:done\n")
    assert program.wait_exit().code == 0
    program.finish()

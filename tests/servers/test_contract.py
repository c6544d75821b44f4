"""socketserver's contract, cell by cell: whatever works with a plain server works with the mix-in in front of it.

The programs are a few lines each and stand in their tests. They are real processes, asked by real clients.
"""

import contextlib
import http.client
import os
import signal
import socket
import socketserver
import ssl
import struct
import xmlrpc.client
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

import prefork
from support import Address, ask, children, descriptors, dial, elapse, patterns, pids_serving, switches, title, until
from support.clients import hear
from support.processes import alive
from support.scripts import TCP, Notes, Start, hold, launch, noted, rest

pytestmark = pytest.mark.timeout(60)

KINDS = {
    "tcp": ("PreforkTCPServer", "Handler", TCP, ""),
    "tcp6": ("PreforkTCPServer", "Handler", '("::1", 0)', "address_family = socket.AF_INET6"),
    "udp": ("PreforkUDPServer", "Datagrams", TCP, ""),
    "udp6": ("PreforkUDPServer", "Datagrams", '("::1", 0)', "address_family = socket.AF_INET6"),
    "unix": ("PreforkUnixStreamServer", "Handler", 'str(RUN / "s")', ""),
    "unixgram": ("PreforkUnixDatagramServer", "Datagrams", 'str(RUN / "s")', ""),
}


def simple(kind: str = "tcp", extra: str = "", use: str = "server.serve_forever()", workers: int = 2) -> str:
    """A program with one server; `extra` is one more line of its class, `use` what is done with it."""
    base, handler, address, family = KINDS[kind]
    lines = [family, extra, f"workers = {workers}"]
    body = "\n".join(f"    {line}" for part in lines if part for line in part.splitlines())
    uses = "\n".join(f"    {line}" for line in use.splitlines())
    return f"class Server(prefork.{base}):\n{body}\n\nwith Server({address}, {handler}) as server:\n{uses}\n"


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


# -- construction ----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_bind_and_activate_by_hand(start: Start, kind: str) -> None:
    """With bind_and_activate=False nothing is bound until server_bind() and server_activate() are called."""
    base, handler, address, family = KINDS[kind]
    program = launch(
        start,
        f"""
        class Server(prefork.{base}):
            {family or "pass"}

        server = Server({address}, {handler}, False)
        assert server.server_address == {address}, server.server_address
        server.server_bind()
        server.server_activate()
        assert server.server_address == server.socket.getsockname() and server.server_address != ("127.0.0.1", 0)
        assert server.fileno() == server.socket.fileno()
        try:
            server.serve_forever()
        finally:
            server.server_close()
        assert server.fileno() == -1
        """,
    ).ready()
    ask(program.address)
    program.finish()


@pytest.fixture
def flat() -> Iterator[None]:
    """This process has no descriptor more after the test than before it."""
    before = descriptors(os.getpid())
    yield
    assert not descriptors(os.getpid()) - before


@pytest.mark.parametrize("server_class", [prefork.PreforkTCPServer, prefork.PreforkUDPServer])
def test_failed_bind_leaks_nothing(flat: None, server_class: Any) -> None:
    """A bind that fails raises its own OSError and leaves no descriptor."""
    kind = server_class.socket_type
    with socket.socket(socket.AF_INET, kind) as taken:
        taken.bind(("127.0.0.1", 0))
        if kind == socket.SOCK_STREAM:
            taken.listen()
        for _ in range(20):
            with pytest.raises(OSError, match="in use"):
                type("Once", (server_class,), {"allow_reuse_address": False})(
                    taken.getsockname(), socketserver.BaseRequestHandler
                )


@pytest.mark.parametrize("server_class", [prefork.PreforkUnixStreamServer, prefork.PreforkUnixDatagramServer])
def test_failed_unix_bind_leaks_nothing(flat: None, tmp_path: Path, server_class: Any) -> None:
    """A Unix bind that fails leaves no descriptor, no lock and no file, wherever it failed."""
    with pytest.raises(FileNotFoundError):
        server_class(str(tmp_path / "no" / "where"), socketserver.BaseRequestHandler)
    with pytest.raises(OSError, match="path too long"):
        server_class(str(tmp_path / ("x" * 120)), socketserver.BaseRequestHandler)

    class Refuses(server_class):  # type: ignore[misc]
        def server_activate(self) -> None:
            raise RuntimeError("ordered trouble")

    with pytest.raises(RuntimeError, match="ordered"):
        Refuses(str(tmp_path / "s"), socketserver.BaseRequestHandler)
    assert os.listdir(tmp_path) == []


def test_leaving_the_block_closes(flat: None, tmp_path: Path) -> None:
    """Leaving the `with` block closes the listener, and a second close is harmless, pool or no pool."""
    path = tmp_path / "s"
    with prefork.PreforkUnixStreamServer(str(path), socketserver.BaseRequestHandler) as server:
        assert path.is_socket()
        assert server.active_children == set()
    assert server.fileno() == -1 and os.listdir(tmp_path) == []
    server.server_close()


def test_serving_a_closed_server() -> None:
    """A server that was closed says so instead of forking workers around nothing."""
    server = prefork.PreforkTCPServer(("127.0.0.1", 0), socketserver.BaseRequestHandler)
    server.server_close()
    with pytest.raises(prefork.OptionError, match="closed"):
        server.serve_forever()


# -- attributes ------------------------------------------------------------------------------------


def backlog_of(sock: socket.socket) -> int:
    """What the kernel keeps as the backlog of a TCP listener (tcp(7), TCP_INFO: tcpi_sacked)."""
    return int(struct.unpack_from("I", sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 104), 28)[0])


def test_request_queue_size_reaches_listen() -> None:
    """`request_queue_size` is the kernel's backlog: 1024 by default, what the class says otherwise."""
    limit = int(Path("/proc/sys/net/core/somaxconn").read_text())
    for size in (None, 7, 300):
        attributes = {} if size is None else {"request_queue_size": size}
        server_class = type("Sized", (prefork.PreforkTCPServer,), attributes)
        with server_class(("127.0.0.1", 0), socketserver.BaseRequestHandler) as server:
            assert backlog_of(server.socket) == min(size or 1024, limit)


@pytest.mark.parametrize("name", ["allow_reuse_address", "allow_reuse_port"])
@pytest.mark.parametrize("value", [True, False])
def test_reuse(name: str, value: bool) -> None:
    """`allow_reuse_address` and `allow_reuse_port` set the socket's options before the bind, or do not."""
    option = {"allow_reuse_address": socket.SO_REUSEADDR, "allow_reuse_port": socket.SO_REUSEPORT}[name]
    server_class = type("Reusing", (prefork.PreforkTCPServer,), {name: value})
    with server_class(("127.0.0.1", 0), socketserver.BaseRequestHandler) as server:
        assert bool(server.socket.getsockopt(socket.SOL_SOCKET, option)) is value


def test_attributes_of_a_server() -> None:
    """`address_family`, `socket_type`, `server_address` and `RequestHandlerClass` are what socketserver makes of
    them."""

    class Six(prefork.PreforkUDPServer):
        address_family = socket.AF_INET6

    with Six(("::1", 0), socketserver.DatagramRequestHandler) as server:
        assert (server.address_family, server.socket_type) == (socket.AF_INET6, socket.SOCK_DGRAM)
        assert server.server_address[0] == "::1" and server.server_address[1] != 0
        assert server.RequestHandlerClass is socketserver.DatagramRequestHandler
        assert (server.timeout, server.max_packet_size) == (None, socketserver.UDPServer.max_packet_size)


@pytest.mark.parametrize("kind", ["udp", "unixgram"])
def test_max_packet_size(start: Start, kind: str) -> None:
    """`max_packet_size` bounds what a worker takes of a datagram."""
    program = launch(start, simple(kind, "max_packet_size = 8")).ready()
    with dial(program.address) as sock:
        sock.sendall(b"12345678-and-more\n")
        assert hear(sock, program.address).split(b":")[1] == b"12345678"
    program.finish()


# -- handlers --------------------------------------------------------------------------------------


def test_life_of_a_handler(start: Start) -> None:
    """setup, handle and finish run in this order, finish also when handle raises; timeout, Nagle and buffers are as
    set."""
    program = launch(
        start,
        """
        class Careful(socketserver.StreamRequestHandler):
            timeout = 7.5
            disable_nagle_algorithm = True
            rbufsize = 1
            wbufsize = 4096

            def setup(self):
                super().setup()
                self.steps = ["setup"]

            def handle(self):
                self.steps.append(self.rfile.readline().decode().split()[0])
                nagle = self.connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
                self.wfile.write(f"{self.connection.gettimeout()} {nagle} ".encode())
                if self.steps[-1] == "raise":
                    raise ValueError("ordered trouble")

            def finish(self):
                self.wfile.write(f"{self.steps} {self.client_address[1]} {self.server.server_address[1]}".encode())
                super().finish()

        with prefork.PreforkTCPServer(("127.0.0.1", 0), Careful) as server:
            server.serve_forever()
        """,
        allow=[patterns.HANDLER_ERROR],
    ).ready()
    for word in ("quiet", "raise"):
        with dial(program.address) as sock:
            port = sock.getsockname()[1]
            sock.sendall(f"{word}\n".encode())
            assert rest(sock).decode() == f"7.5 1 ['setup', '{word}'] {port} {program.address.port}"
    program.finish()


def test_timeout_of_a_handler(start: Start) -> None:
    """A StreamRequestHandler's `timeout` frees the worker from a client that sends nothing."""
    program = launch(
        start,
        """
        class Impatient(Handler):
            timeout = 0.2

        class One(prefork.PreforkTCPServer):
            workers = 1

        with One(("127.0.0.1", 0), Impatient) as server:
            server.serve_forever()
        """,
        allow=[patterns.HANDLER_ERROR],
    ).ready()
    before = program.wait_ready(1)
    with dial(program.address) as silent:
        assert [ask(program.address).pid] == before
        assert rest(silent) == b""
    assert "TimeoutError" in program.log
    program.finish()


# -- overrides, in the worker ----------------------------------------------------------------------

CHAIN = """
    def noting(name):
        def method(self, *arguments):
            note(f"{name} {os.getpid()} {os.getppid()}")
            return getattr(socketserver.TCPServer, name)(self, *arguments)
        return method

    names = ["get_request", "verify_request", "process_request", "finish_request", "shutdown_request", "close_request"]

    class Server(prefork.PreforkTCPServer):
        workers = 1
        locals().update({name: noting(name) for name in names})

        def handle_error(self, request, client_address):
            note(f"handle_error {os.getpid()} {sys.exc_info()[0].__name__} {client_address[1]}")

    with Server(("127.0.0.1", 0), Handler) as server:
        server.serve_forever()
"""
LINKS = ["verify_request", "process_request", "finish_request", "shutdown_request", "close_request"]


def test_the_chain_is_overridable(start: Start, notes: Notes) -> None:
    """Each link of the chain may be overridden, and runs once a request, in the worker."""
    program = launch(start, CHAIN).ready()
    (worker,) = program.wait_ready(1)
    for _ in range(3):
        assert ask(program.address).pid == worker
    until(lambda: len(notes("close_request")) == 3)
    for name in LINKS:
        assert notes(name) == [f"{worker} {program.pid}"] * 3, name
    assert len(notes("get_request")) in (3, 4) and set(notes("get_request")) == {f"{worker} {program.pid}"}
    assert notes("handle_error") == []
    program.finish()


ONE_LINK = """
    NAME, WHERE = sys.argv[1:]

    def noting(server, *arguments):
        note(f"{NAME} {os.getpid()}")
        return getattr(socketserver.TCPServer, NAME)(server, *arguments)

    class Server(prefork.PreforkTCPServer):
        workers = 1
        if WHERE == "class":
            locals()[NAME] = noting

    with Server(("127.0.0.1", 0), Handler) as server:
        if WHERE == "server":
            setattr(server, NAME, noting.__get__(server))
        server.serve_forever()
"""


@pytest.mark.parametrize("where", ["class", "server"])
@pytest.mark.parametrize("name", LINKS)
def test_one_link_is_overridable(start: Start, notes: Notes, name: str, where: str) -> None:
    """A link that alone is overridden, on the class or on the server, runs once a request as well."""
    program = launch(start, ONE_LINK, name, where).ready()
    (worker,) = program.wait_ready(1)
    for _ in range(3):
        assert ask(program.address).pid == worker
    until(lambda: notes(name) == [str(worker)] * 3)
    program.finish()


def test_handle_error_sees_exceptions_only(start: Start, notes: Notes) -> None:
    """An Exception is for handle_error and costs nothing; SystemExit and KeyboardInterrupt pass it by, and cost the
    worker."""
    program = launch(start, CHAIN, allow=[patterns.TRACEBACK]).ready()
    (worker,) = program.wait_ready(1)
    with dial(program.address) as sock:
        port = sock.getsockname()[1]
        sock.sendall(b"x raise\n")
        assert rest(sock) == b""
    assert ask(program.address).pid == worker
    assert notes("handle_error") == [f"{worker} ValueError {port}"]
    for number, (order, code) in enumerate([("leave 3", 3), ("leave 0", 0), ("interrupt", 1)]):
        (worker,) = program.wait_ready(1)
        with dial(program.address) as sock:
            sock.sendall(f"x {order}\n".encode())
            assert rest(sock) == b""
        left = program.wait_for(patterns.LEFT, number=number + 1)
        assert int(left[2]) == worker and f"exit code {code}" in left[4], left[0]
        program.wait_ready(1, without=[worker])
    assert len(notes("handle_error")) == 1
    program.finish()


def test_refused_by_verify_request(start: Start) -> None:
    """A request that verify_request refuses is closed without a word, and the next one is served."""
    program = launch(
        start,
        """
        class Server(prefork.PreforkTCPServer):
            workers = 1
            served = 0

            def verify_request(self, request, client_address):
                self.served += 1
                return self.served % 2 == 0

        with Server(("127.0.0.1", 0), Handler) as server:
            server.serve_forever()
        """,
    ).ready()
    for _ in range(3):
        with dial(program.address) as sock:
            assert sock.recv(10) == b""
        assert ask(program.address).result == "done"
    program.finish()


def test_get_request_of_ones_own(start: Start) -> None:
    """What an overridden get_request returns is what the handler gets; an OSError from it costs nobody else."""
    program = launch(
        start,
        """
        class Server(prefork.PreforkTCPServer):
            workers = 1
            count = 0

            def get_request(self):
                request, address = super().get_request()
                self.count += 1
                if self.count % 3 == 0:
                    request.close()
                    raise OSError("a handshake that failed")
                request.settimeout(3.5)
                return request, ("somebody", self.count)

        class Asks(Handler):
            def answer(self, order):
                return f"{self.request.gettimeout()} {self.client_address}"

        with Server(("127.0.0.1", 0), Asks) as server:
            server.serve_forever()
        """,
    ).ready()
    (worker,) = program.wait_ready(1)
    answers = []
    for _ in range(6):
        with dial(program.address) as sock, contextlib.suppress(ConnectionError):
            sock.sendall(b"x\n")
            answers.append(rest(sock))
    good = [answer.decode().split(":", 2)[2].strip() for answer in answers if answer]
    assert good == [f"3.5 ('somebody', {number})" for number in (1, 2, 4, 5)]
    assert program.wait_ready(1) == [worker]
    program.finish()


def test_process_request_of_ones_own(start: Start, notes: Notes) -> None:
    """A process_request that answers by itself replaces the rest of the chain."""
    program = launch(
        start,
        """
        class Server(prefork.PreforkTCPServer):
            def process_request(self, request, client_address):
                request.sendall(f"{os.getpid()}:ask:mine\\n".encode())
                self.shutdown_request(request)

        with Server(("127.0.0.1", 0), Handler) as server:
            server.serve_forever()
        """,
    ).ready()
    with dial(program.address) as sock:
        assert sock.recv(100).endswith(b":ask:mine\n")
    program.finish()


@pytest.mark.parametrize("kind", ["tcp", "udp", "unix", "unixgram"])
def test_handler_that_raises_costs_nothing(start: Start, kind: str) -> None:
    """On every kind of socket an exception is reported as socketserver does, and the worker lives."""
    program = launch(start, simple(kind, workers=1), allow=[patterns.HANDLER_ERROR]).ready()
    before = program.wait_ready(1)
    with dial(program.address) as sock:
        sock.sendall(b"x raise\n")
        assert hear(sock, program.address) == b""
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


# -- the loop --------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_serve_forever_again(start: Start, kind: str) -> None:
    """A server whose loop was stopped serves again, at the same address, three times over."""
    use = "for _ in range(3):\n    server.serve_forever()"
    program = launch(start, simple(kind, use=use)).ready()
    addresses = set()
    for number in (1, 2, 3):
        program.wait_for(patterns.READY, number=number)
        addresses.add(str(program.addresses[-1]))
        ask(program.address)
        program.send(signal.SIGTERM)
        program.wait_for(patterns.STOPPED, number=number)
    assert program.wait_exit().code == 0
    assert len(addresses) == 1
    program.finish()


def test_shutdown_from_another_thread(start: Start, notes: Notes) -> None:
    """shutdown() waits until serve_forever() has returned, from several threads at once; after it, it returns at
    once."""
    use = (
        "for number in range(3):\n"
        "    when('stop', server.shutdown)\n"
        "server.serve_forever()\n"
        "note('returned ' + str(sorted(server.active_children)))\n"
        "server.shutdown()\n"
        "note('again')"
    )
    program = launch(start, simple(use=use)).ready()
    ask(program.address)
    program.write("stop", "")
    assert program.wait_exit().code == 0
    assert notes("returned") == ["[]"]
    assert notes("again") == [""]
    program.finish()


def test_shutdown_before_the_loop(start: Start, notes: Notes) -> None:
    """A shutdown() that comes before serve_forever() makes it return at once, and the next one serve."""
    use = (
        "(HOME / 'stop').touch()\n"
        "thread = when('stop', server.shutdown)\n"
        "while not server._pool or not server._pool._stop_requested:\n"
        "    select.select([], [], [], 0.001)\n"
        "server.serve_forever()\n"
        "thread.join()\n"
        "note('returned')\n"
        "server.serve_forever()"
    )
    program = launch(start, simple(use=use)).ready()
    assert notes("returned") == [""]
    assert len(program.found(patterns.READY)) == 1
    ask(program.address)
    program.finish()


def test_off_the_main_thread(start: Start, notes: Notes) -> None:
    """Off the main thread no signal is touched; reload(), scale() and shutdown() steer the pool."""
    program = launch(
        start,
        """
        before = {one: signal.getsignal(one) for one in signal.valid_signals()}

        class Server(prefork.PreforkTCPServer):
            workers = 2

        with Server(("127.0.0.1", 0), Handler) as server:
            thread = threading.Thread(target=server.serve_forever)
            thread.start()
            when("more", lambda: server.scale(4))
            when("fewer", lambda: server.scale(1))
            when("reload", server.reload)
            try:
                server.scale(0)
            except prefork.OptionError as error:
                note(f"refused {error}")
            pass_gate("stop")
            assert before == {one: signal.getsignal(one) for one in signal.valid_signals()}
            server.shutdown()
            thread.join()
        note("end")
        """,
    ).ready()
    first = program.wait_ready(2)
    assert "workers" in noted(notes, "refused")[0]
    program.write("more", "")
    assert set(first) <= set(program.wait_ready(4))
    program.write("reload", "")
    second = program.wait_ready(4, without=first)
    program.write("fewer", "")
    assert set(program.wait_children(1)) <= set(second)
    ask(program.address)
    program.write("stop", "")
    assert program.wait_exit().code == 0
    assert notes("end") == [""]
    program.finish()


def test_service_actions(start: Start, notes: Notes) -> None:
    """service_actions() runs in the master about every poll_interval; what it raises is logged and changes nothing."""
    program = launch(
        start,
        """
        class Server(prefork.PreforkTCPServer):
            def service_actions(self):
                note(f"tick {os.getpid()} {time.monotonic()}")
                if (HOME / "raise").exists():
                    raise ValueError("ordered trouble")

        with Server(("127.0.0.1", 0), Handler) as server:
            server.serve_forever(poll_interval=0.1)
        """,
        allow=[patterns.TRACEBACK],
    ).ready()
    already = len(notes("tick"))
    noted(notes, "tick", already + 10)
    rows = [row.split() for row in notes("tick")]
    assert {int(pid) for pid, _ in rows} == {program.pid}
    times = [float(at) for _, at in rows]
    assert times[-1] - times[already] >= 0.1 * (len(times) - already - 1) * 0.5
    program.write("raise", "")
    program.wait_for("service_actions\\(\\) raised", number=2)
    ask(program.address)
    program.finish()


def test_no_wake_ups(start: Start) -> None:
    """Where service_actions() is not overridden an idle master does not wake up at all, nor does a worker."""
    program = launch(start, simple()).ready()
    everybody = [program.pid, *program.wait_ready(2)]
    until(lambda: "State:\tS" in Path(f"/proc/{program.pid}/status").read_text())
    elapse(0.5)
    before = [switches(pid) for pid in everybody]
    elapse(1.5)
    assert [switches(pid) for pid in everybody] == before
    program.finish()


# -- closing ---------------------------------------------------------------------------------------

CLOSING = """
    class Server(prefork.PreforkTCPServer):
        workers = 2
        block_on_close = {block}
        graceful_timeout = {graceful}

    with Server(("127.0.0.1", 0), Handler) as server:
        when("stop", server.shutdown)
        server.serve_forever()
        note(f"returned {{len(server.active_children)}}")
    note(f"closed {{len(server.active_children)}}")
"""


def test_block_on_close(start: Start, notes: Notes) -> None:
    """With block_on_close the drain is waited for: nobody is left when shutdown() and server_close() are back."""
    program = launch(start, CLOSING.format(block=True, graceful=20)).ready()
    with ExitStack() as stack:
        held = hold(program.address, stack, "gate go")
        noted(notes, "begun")
        program.write("stop", "")
        program.wait_for(patterns.STOPPING)
        program.wait_children(1)
        assert not notes("returned")
        program.write("go", "")
        assert rest(held).endswith(b":held:done\n")
    assert program.wait_exit().code == 0
    assert (notes("returned"), notes("closed")) == (["0"], ["0"])
    program.finish()


def test_no_block_on_close(start: Start, notes: Notes) -> None:
    """Without block_on_close the drain is ordered and goes on behind: the request in hand is answered, all are
    reaped."""
    program = launch(start, CLOSING.format(block=False, graceful=20)).ready()
    with ExitStack() as stack:
        held = hold(program.address, stack, "gate go")
        noted(notes, "begun")
        program.write("stop", "")
        noted(notes, "closed")
        program.wait_children(1)
        program.check_no_zombie()
        program.write("go", "")
        assert rest(held).endswith(b":held:done\n")
    assert program.wait_exit().code == 0
    program.finish()


@pytest.mark.parametrize("block", [True, False])
def test_close_kills_at_last(start: Start, notes: Notes, block: bool) -> None:
    """Who does not drain within graceful_timeout is killed, whether the closing waits for it or not."""
    program = launch(start, CLOSING.format(block=block, graceful=0.3), allow=[patterns.FAULT]).ready()
    with ExitStack() as stack:
        hold(program.address, stack, "deaf")
        noted(notes, "begun")
        program.write("stop", "")
        assert program.wait_exit(10).code == 0
    assert "graceful_timeout" in program.wait_for(patterns.LEFT, number=2)[0] + program.found(patterns.LEFT)[0][0]
    program.finish()


def test_close_without_shutdown(start: Start, notes: Notes) -> None:
    """server_close() from another thread ends a loop that nobody shut down, and leaves nobody."""
    program = launch(
        start,
        """
        server = prefork.PreforkTCPServer(("127.0.0.1", 0), Handler)
        when("close", server.server_close)
        server.serve_forever()
        note(f"returned {len(server.active_children)}")
        server.server_close()
        """,
    ).ready()
    ask(program.address)
    program.write("close", "")
    assert program.wait_exit().code == 0
    assert notes("returned") == ["0"]
    program.finish()


def test_active_children(start: Start, notes: Notes) -> None:
    """`active_children` are the pids of the workers, while there are any."""
    use = "when('look', lambda: note(f'children {sorted(server.active_children)}'))\nserver.serve_forever()"
    program = launch(start, simple(use=use, workers=3)).ready()
    workers = program.wait_ready(3)
    program.write("look", "")
    assert noted(notes, "children") == [str(sorted(workers))]
    program.finish()


# -- several ---------------------------------------------------------------------------------------


def test_several_listeners(start: Start, notes: Notes) -> None:
    """serve() with TCP, Unix and UDP: one pool whose workers answer at all of them, through reload, retirement and
    stop."""
    program = launch(
        start,
        """
        class First(prefork.PreforkTCPServer):
            workers = 2

        with (
            First(("127.0.0.1", 0), Handler) as one,
            prefork.PreforkUnixStreamServer(str(RUN / "s"), Handler) as two,
            prefork.PreforkUDPServer(("127.0.0.1", 0), Datagrams) as three,
        ):
            for _ in range(2):
                prefork.serve(one, two, three)
        """,
    ).ready()
    workers = program.wait_ready(2)
    assert [address.kind for address in program.addresses] == ["tcp", "unix", "udp"]
    for address in program.addresses:
        assert ask(address).pid in workers
    program.send(signal.SIGHUP)
    program.wait_for(patterns.RELOADED)
    again = program.wait_ready(2, without=workers)
    program.send(signal.SIGTERM, again[0])
    program.wait_ready(2, without=again[:1])
    for address in program.addresses:
        assert ask(address).pid not in (*workers, again[0])
    with ExitStack() as stack:
        held = [hold(address, stack, "gate go") for address in program.addresses[:2]]
        noted(notes, "begun", 2)
        program.send(signal.SIGTERM)
        program.wait_for(patterns.STOPPING)
        program.write("go", "")
        for sock in held:
            assert rest(sock).endswith(b":held:done\n")
    program.wait_for(patterns.READY, number=2)
    for address in program.addresses[3:]:
        ask(address)
    assert list(map(str, program.addresses[:3])) == list(map(str, program.addresses[3:]))
    program.finish()


def test_connections_at_once_wake_as_many_workers(start: Start, notes: Notes) -> None:
    """Of two that arrive together at two listeners, none waits for the request of the other while a worker is idle."""
    program = launch(
        start,
        """
        class First(prefork.PreforkTCPServer):
            workers = 2

        with (
            First(("127.0.0.1", 0), Handler) as one,
            prefork.PreforkUnixStreamServer(str(RUN / "s"), Handler) as two,
        ):
            prefork.serve(one, two)
        """,
    ).ready()
    program.wait_ready(2)
    everywhere = os.sched_getaffinity(0)
    one = {min(everywhere)}  # on one core both have arrived before a worker runs
    try:
        for pid in (0, *program.children()):
            os.sched_setaffinity(pid, one)
        for turn in range(20):
            with ExitStack() as stack:
                clients = [stack.enter_context(dial(address, 20)) for address in program.addresses]
                for client in clients:
                    client.sendall(f"x gate go-{turn}\n".encode())
                noted(notes, "begun", 2 * (turn + 1))
                program.write(f"go-{turn}", "")
                assert all(rest(client).endswith(b":x:done\n") for client in clients)
    finally:
        os.sched_setaffinity(0, everywhere)
    program.stop()
    program.finish()


def test_a_worker_of_several_listeners_that_leaves_takes_no_queue_with_it(start: Start, notes: Notes) -> None:
    """A retired worker takes one more from each listener at most, for which it may have been woken alone: a long queue
    would keep it past graceful_timeout."""
    program = launch(
        start,
        """
        class First(prefork.PreforkTCPServer):
            workers = 1

        with First(("127.0.0.1", 0), Handler) as one, First(("127.0.0.1", 0), Handler) as two:
            prefork.serve(one, two)
        """,
    ).ready()
    (old,) = program.wait_ready(1)
    with ExitStack() as stack:
        first = hold(program.address, stack, "gate a")
        noted(notes, "begun", 1)
        second = hold(program.address, stack, "gate b")
        queue = [hold(program.address, stack, "") for _ in range(10)]
        program.send(signal.SIGTERM, old)
        noted(notes, "begun", 2)  # by its replacement
        program.write("a", "")
        until(lambda: not alive(old), 5.0, "the old worker left")
        program.write("b", "")
        pids = [int(rest(client).split(b":")[0]) for client in (first, second, *queue)]
    assert pids[0] == old != pids[1]
    assert pids[2:].count(old) <= 1
    program.stop()
    program.finish()


def test_two_pools_in_one_process(start: Start, notes: Notes) -> None:
    """Two servers in two threads are two pools: each has its own workers, and one stops without the other."""
    program = launch(
        start,
        """
        class Server(prefork.PreforkTCPServer):
            workers = 2

        threads = []
        for name in ("one", "two"):
            server = Server(("127.0.0.1", 0), Handler)
            thread = threading.Thread(target=server.serve_forever)
            thread.start()
            when(f"stop-{name}", server.shutdown)
            when(f"close-{name}", server.server_close)
            when("look", lambda server=server: note(f"pool {sorted(server.active_children)}"))
            threads.append(thread)
        for thread in threads:
            thread.join()
        pass_gate("end")
        """,
    )
    program.wait_for(patterns.READY, number=2)
    workers = program.wait_ready(4)
    first, second = program.addresses
    pools = [pids_serving(address, 2) for address in (first, second)]
    assert not pools[0] & pools[1] and pools[0] | pools[1] == set(workers)
    program.write("look", "")
    assert sorted(noted(notes, "pool", 2)) == sorted(str(sorted(pool)) for pool in pools)
    program.write("stop-one", "")
    program.wait_for(patterns.STOPPED)
    left = set(program.wait_ready(2))
    assert left in pools
    stopped, alive = (first, second) if left == pools[1] else (second, first)
    for _ in range(4):
        assert ask(alive).pid in left
    with pytest.raises((ConnectionRefusedError, TimeoutError)):
        ask(stopped, timeout=0.3)
    program.kill_workers(*left)
    pids_serving(alive, 2, without=left)
    program.write("stop-two", "")
    program.wait_for(patterns.STOPPED, number=2)
    program.write("close-one", "")
    program.write("close-two", "")
    noted(notes, "done", 5)
    program.write("end", "")
    assert program.wait_exit().code == 0
    program.finish()


@pytest.mark.parametrize("kind", ["tcp", "unix"])
def test_shutdown_in_a_handler(start: Start, kind: str) -> None:
    """server.shutdown() called by a handler stops the whole pool, and that handler's answer still arrives."""
    base, _, address, _ = KINDS[kind]
    program = launch(
        start,
        f"""
        class Stops(Handler):
            def answer(self, order):
                if order == "stop":
                    self.server.shutdown()
                return "done"

        with prefork.{base}({address}, Stops) as server:
            server.serve_forever()
        """,
    ).ready()
    ask(program.address)
    assert ask(program.address, "stop").result == "done"
    assert program.wait_exit().code == 0
    program.finish()


# -- a guest in somebody else's process ------------------------------------------------------------


def test_children_of_others(start: Start, notes: Notes) -> None:
    """A subprocess of the program's own keeps its exit status, in the master and in a handler."""
    program = launch(
        start,
        """
        def strangers():
            for code in range(1, 21):
                child = subprocess.Popen(["/bin/sh", "-c", f"exit {code}"])
                note(f"stranger {code} {child.wait()}")

        when("go", strangers)
        with prefork.PreforkTCPServer(("127.0.0.1", 0), Handler) as server:
            server.serve_forever()
        """,
    ).ready()
    program.write("go", "")
    for code in range(1, 8):
        assert ask(program.address, f"run {code}").result == str(code)
        workers = [pid for pid in program.children() if patterns.TITLE_READY.search(title(pid))]
        program.kill_workers(*workers[:1])  # and no stranger
    noted(notes, "done")
    assert notes("stranger") == [f"{code} {code}" for code in range(1, 21)]
    program.finish(allow=[r".*DeprecationWarning: This process .* is multi-threaded.*", r"  .*"])


def test_signals_are_given_back(start: Start, notes: Notes) -> None:
    """After serve_forever() the program's own handlers and its set_wakeup_fd are in force again."""
    program = launch(
        start,
        """
        heard = []
        numbers = [signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGTTIN, signal.SIGINT]
        for number in numbers:
            signal.signal(number, lambda number, frame: heard.append(number))
        signal.signal(signal.SIGQUIT, signal.SIG_IGN)
        every = {one: signal.getsignal(one) for one in signal.valid_signals()}
        mine, theirs = socket.socketpair()
        theirs.setblocking(False)
        signal.set_wakeup_fd(theirs.fileno())
        with prefork.PreforkTCPServer(("127.0.0.1", 0), Handler) as server:
            server.serve_forever()
        assert {one: signal.getsignal(one) for one in signal.valid_signals()} == every
        assert signal.set_wakeup_fd(-1) == theirs.fileno()
        assert heard == []
        for number in numbers:
            os.kill(os.getpid(), number)
        note(f"heard {heard == numbers}")
        mine.close()
        theirs.close()
        """,
    ).ready()
    ask(program.address)
    assert program.stop().code == 0
    assert notes("heard") == ["True"]
    program.finish()


def test_program_with_other_threads(start: Start) -> None:
    """A program whose other threads hold locks all the time, logging's among them, is served by workers that do not
    hang."""
    program = launch(
        start,
        """
        def chatter():
            while True:
                logging.getLogger("other").info("%s", "x" * 100)
                select.select([], [], [], 0.0005)

        for _ in range(3):
            threading.Thread(target=chatter, daemon=True).start()

        class Chatty(Handler):
            def answer(self, order):
                logging.getLogger("worker").info("answering")
                print("also answering", flush=True)
                return str(threading.active_count())

        class Server(prefork.PreforkTCPServer):
            workers = 3

        with Server(("127.0.0.1", 0), Chatty) as server:
            server.serve_forever()
        """,
    ).ready()
    for _ in range(10):
        workers = program.wait_ready(3)
        assert ask(program.address).result == "1"
        program.kill_workers(*workers[:2])
    pids_serving(program.address, 3)
    program.finish()


@pytest.mark.parametrize("kind", ["tcp", "udp", "unix"])
def test_default_timeout(start: Start, kind: str) -> None:
    """socket.setdefaulttimeout() of the program reaches the handlers' sockets, and does not disturb the pool."""
    base, handler, address, _ = KINDS[kind]
    program = launch(
        start,
        f"""
        socket.setdefaulttimeout(0.4)

        class Asks({handler}):
            def answer(self, order):
                return str(self.request.gettimeout() if hasattr(self.request, "gettimeout") else "")

        class Server(prefork.{base}):
            workers = 2

        with Server({address}, Asks) as server:
            server.serve_forever()
        """,
    ).ready()
    workers = program.wait_ready(2)
    elapse(0.6)
    assert ask(program.address).result == ("" if kind == "udp" else "0.4")
    assert program.wait_ready(2) == workers
    assert not program.found(patterns.LEFT)
    program.send(signal.SIGHUP)
    program.wait_for(patterns.RELOADED)
    ask(program.address)
    program.finish()


def test_address_is_free_after_the_stop(start: Start) -> None:
    """After a stop the port can be bound at once, although clients have just been served on it."""
    program = launch(start, simple()).ready()
    address: Address = program.address
    for _ in range(5):
        ask(address)
    program.finish()
    with prefork.PreforkTCPServer((address.where, address.port), socketserver.BaseRequestHandler):
        pass

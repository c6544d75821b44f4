"""socketserver's contract: the life of a handler, and the methods that a subclass overrides, in the worker."""

import contextlib

import pytest

from support import ask, dial, patterns, until
from support.clients import hear
from support.contract import simple
from support.scripts import Notes, Start, launch, rest

pytestmark = pytest.mark.timeout(60)


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
        assert int(left[1]) == worker and f"exit code {code}" in left[4], left[0]
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

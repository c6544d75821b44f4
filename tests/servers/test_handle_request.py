"""handle_request() without a running pool: one request, one worker, and the caller goes on."""

import contextlib
import signal
import ssl
from contextlib import ExitStack
from pathlib import Path

import pytest

from prefork import OptionError, PreforkTCPServer
from support import Address, Program, ask, children, dial, elapse, patterns, until
from support.clients import hear
from support.scripts import TCP, Notes, Start, hold, launch, noted, rest

pytestmark = pytest.mark.timeout(60)

PROGRAM = """
log = logging.getLogger("prefork")

class Server({bases}):
    workers = 2
    {extra}

    def handle_timeout(self):
        super().handle_timeout()
        note(f"timeout {{sorted(self.active_children)}}")

with Server({address}, {handler}) as server:
    from prefork.kernel.listener import describe
    log.info("listening on %s", describe(server.socket))
    {loop}
    note(f"last {{sorted(server.active_children)}}")
note(f"closed {{sorted(server.active_children)}}")
"""
UNTIL_STOP = """
    while not (HOME / "stop").exists():
        server.handle_request()
        note(f"returned {sorted(server.active_children)}")
"""


def begin(
    start: Start,
    bases: str = "prefork.PreforkTCPServer",
    handler: str = "Handler",
    address: str = TCP,
    extra: str = "timeout = 0.1",
    loop: str = UNTIL_STOP,
    allow: tuple[str, ...] = (),
) -> Program:
    body = PROGRAM.format(bases=bases, handler=handler, address=address, extra=extra, loop=loop.strip())
    program = launch(start, body, allow=allow)
    program.wait_for(patterns.LISTENING)
    return program


def end(program: Program) -> None:
    """Let the program leave its loop; nobody may be left then."""
    program.write("stop", "")
    assert program.wait_exit().code == 0
    program.finish()


KINDS = {
    "tcp": ("prefork.PreforkTCPServer", "Handler", TCP),
    "udp": ("prefork.PreforkUDPServer", "Datagrams", TCP),
    "unix": ("prefork.PreforkUnixStreamServer", "Handler", 'str(RUN / "s")'),
    "unixgram": ("prefork.PreforkUnixDatagramServer", "Datagrams", 'str(RUN / "s")'),
    "threads": ("prefork.PreforkMixIn, socketserver.ThreadingMixIn, socketserver.TCPServer", "Handler", TCP),
    "udp-threads": ("prefork.PreforkMixIn, socketserver.ThreadingMixIn, socketserver.UDPServer", "Datagrams", TCP),
}


@pytest.mark.parametrize("kind", KINDS)
def test_one_worker_a_request(start: Start, notes: Notes, kind: str) -> None:
    """Each request is served by a new worker that is gone after it, on every kind of server."""
    program = begin(start, *KINDS[kind])
    pids = {ask(program.address).pid for _ in range(8)}
    assert len(pids) == 8 and program.pid not in pids
    until(lambda: not children(program.pid), 5, "the workers are gone")
    program.check_no_zombie()
    end(program)
    assert notes("closed") == ["[]"]


def test_timeout(start: Start, notes: Notes) -> None:
    """Without a request handle_request() returns after `timeout` seconds, having called handle_timeout() once."""
    loop = """
    for _ in range(3):
        begun = time.monotonic()
        server.handle_request()
        note(f"took {time.monotonic() - begun}")
    """
    program = begin(start, extra="timeout = 0.3", loop=loop)
    program.wait_exit()
    assert all(0.29 <= float(seconds) < 2 for seconds in notes("took"))
    assert notes("timeout") == ["[]"] * 3
    program.finish()


def test_the_shorter_timeout_counts(start: Start, notes: Notes) -> None:
    """As with socketserver, the socket's own timeout counts where it is the shorter one."""
    loop = """
    server.socket.settimeout(0.2)
    begun = time.monotonic()
    server.handle_request()
    note(f"took {time.monotonic() - begun}")
    """
    program = begin(start, extra="timeout = 30", loop=loop)
    program.wait_exit()
    assert 0.19 <= float(notes("took")[0]) < 5
    program.finish()


def test_without_timeout_it_waits(start: Start, notes: Notes) -> None:
    """Without a timeout handle_request() waits for the request, and does not wait for its end."""
    program = begin(start, extra="timeout = None", loop="server.handle_request()\n    pass_gate('stop')")
    elapse(0.3)
    with ExitStack() as stack:
        held = hold(program.address, stack, "gate go")
        noted(notes, "begun")
        program.write("go", "")
        assert rest(held).endswith(b":held:done\n")
    end(program)
    assert notes("timeout") == []


def test_never_more_than_workers(start: Start, notes: Notes) -> None:
    """With `workers` requests in progress the next one waits, and is served when one of them is done."""
    program = begin(start)
    with ExitStack() as stack:
        held = [hold(program.address, stack, f"gate go-{number}", f"c{number}") for number in range(5)]
        noted(notes, "begun", 2)
        elapse(0.4)
        assert len(notes("begun")) == 2 and len(children(program.pid)) == 2
        for number in range(5):
            program.write(f"go-{number}", "")
            assert len(children(program.pid)) <= 2
        for number, sock in enumerate(held):
            assert rest(sock).endswith(f":c{number}:done\n".encode())
    end(program)


def test_handle_timeout_reaps(start: Start, notes: Notes) -> None:
    """Between two requests handle_timeout() collects the workers that are done."""
    program = begin(start)
    for _ in range(2):
        ask(program.address)
    count = len(notes("timeout"))
    rows = noted(notes, "timeout", count + 3)
    assert rows[-1] == "[]"
    program.check_no_zombie()
    end(program)


@pytest.mark.parametrize("order", ["raise", "leave 3", "exit 4", "interrupt"])
def test_a_request_that_fails(start: Start, notes: Notes, order: str) -> None:
    """Whatever becomes of a request, the caller goes on and the client's connection is closed."""
    program = begin(start, allow=(patterns.HANDLER_ERROR,))
    for _ in range(3):
        with dial(program.address) as sock:
            sock.sendall(f"x {order}\n".encode())
            assert rest(sock) == b""
    ask(program.address)
    end(program)


def test_a_request_that_is_refused(start: Start) -> None:
    """verify_request() is asked, and who is refused is closed."""
    extra = "timeout = 0.1\n\n    def verify_request(self, request, client_address):\n        return False"
    program = begin(start, extra=extra)
    with dial(program.address) as sock:
        assert sock.recv(10) == b""
    end(program)


def test_a_subprocess_of_the_program(start: Start, notes: Notes) -> None:
    """Children of the program itself are not collected by handle_request() or handle_timeout()."""
    loop = """
    child = subprocess.Popen(["/bin/sh", "-c", "exit 7"])
    while not (HOME / "stop").exists():
        server.handle_request()
    note(f"child {child.wait()}")
    """
    program = begin(start, loop=loop)
    for _ in range(3):
        ask(program.address)
    end(program)
    assert notes("child") == ["7"]


def test_close_waits_for_the_last(start: Start, notes: Notes) -> None:
    """server_close() with block_on_close waits for the worker that has a request in progress."""
    program = begin(start, loop="server.handle_request()\n    when('go', lambda: None)")
    with ExitStack() as stack:
        held = hold(program.address, stack, "gate go")
        noted(notes, "begun")
        noted(notes, "last")
        elapse(0.2)
        assert not notes("closed")
        program.write("go", "")
        assert rest(held).endswith(b":held:done\n")
    assert program.wait_exit().code == 0
    assert notes("closed") == ["[]"]
    program.finish()


@pytest.mark.parametrize("order", ["hang", "deaf"])
def test_close_kills_at_last(start: Start, notes: Notes, order: str) -> None:
    """server_close() waits at most graceful_timeout for such a worker; then it is killed."""
    program = begin(
        start,
        extra="timeout, graceful_timeout = 5, 0.3",
        loop="server.handle_request()",
        allow=(patterns.HANDLER_ERROR, patterns.FAULT),
    )
    with ExitStack() as stack:
        hold(program.address, stack, order)
        noted(notes, "begun")
        assert program.wait_exit(10).code == 0
    assert notes("closed") == ["[]"]
    program.finish()


def test_close_without_waiting(start: Start, notes: Notes) -> None:
    """Without block_on_close server_close() returns at once; the request is answered, the worker is not left
    unreaped."""
    program = begin(
        start, extra="timeout = 5\n    block_on_close = False", loop="server.handle_request()\n    when('x', print)"
    )
    program.process.poll()
    with ExitStack() as stack:
        held = hold(program.address, stack, "gate go")
        noted(notes, "closed")
        program.write("go", "")
        assert rest(held).endswith(b":held:done\n")
    assert program.wait_exit().code == 0
    program.finish()


@pytest.mark.parametrize("kind", ["tcp", "udp", "unix", "unixgram"])
def test_after_serve_forever(start: Start, notes: Notes, kind: str) -> None:
    """A server whose loop was stopped still handles single requests, and the loop can begin again."""
    loop = """
    server.serve_forever()
    (HOME / "single").touch()
    while not (HOME / "again").exists():
        server.handle_request()
    server.serve_forever()
    """
    program = begin(start, *KINDS[kind], loop=loop)
    program.ready()
    address: Address = program.address
    ask(address)
    program.send(signal.SIGTERM)
    until(lambda: (program.work / "single").exists(), 5)

    def answered() -> int:
        # Until the listener is opened again: a Unix path is bound anew, a datagram may be dropped.
        with contextlib.suppress(ConnectionError, FileNotFoundError, TimeoutError):
            return ask(address, timeout=0.5).pid
        return 0

    first = until(answered, 5, "a single request is served")
    assert ask(address).pid != first
    program.write("again", "")
    if address.is_stream:
        ask(address)  # handle_request() waits for one more
    else:
        until(lambda: ask(address).pid and program.found(patterns.READY)[1:], 5)
    program.wait_for(patterns.READY, number=2)
    ask(address)
    # The worker of the last single request may have ended since: it is collected when the server is closed.
    assert program.stop().code == 0
    program.finish()


def test_a_late_single_request(start: Start, notes: Notes) -> None:
    """A client that says nothing holds one worker only; the others are served."""
    program = begin(start)
    with dial(program.address) as silent:
        for _ in range(4):
            ask(program.address)
        silent.sendall(b"late\n")
        assert hear(silent, program.address).endswith(b":late:done\n")
    end(program)


@pytest.mark.parametrize("kind", ["tcp", "threads"])
def test_a_silent_tls_client(start: Start, notes: Notes, certificate: tuple[Path, Path], kind: str) -> None:
    """The handshake is the worker's: a client that is silent in it does not keep the caller, nor the next client."""
    cert, key = certificate
    extra = f"""timeout = 0.1

    def server_activate(self):
        super().server_activate()
        import ssl
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain({str(cert)!r}, {str(key)!r})
        self.socket = context.wrap_socket(self.socket, server_side=True)
"""
    program = begin(start, *KINDS[kind], extra=extra)
    context = ssl.create_default_context(cafile=str(cert))
    with dial(program.address):
        noted(notes, "returned")
        for _ in range(3):
            with context.wrap_socket(dial(program.address), server_hostname="127.0.0.1") as sock:
                sock.sendall(b"x\n")
                assert rest(sock).endswith(b":x:done\n")
    end(program)


@pytest.mark.parametrize("kind", ["wsgi", "asgi"])
def test_an_application_is_refused(kind: str) -> None:
    """A single request has a handler, not an application: one line says what to call instead."""

    class ApplicationServer(PreforkTCPServer):
        worker_class = kind

    def application(environ: object, start_response: object) -> list[bytes]:
        return []

    with (
        ApplicationServer(("127.0.0.1", 0), application) as server,
        pytest.raises(OptionError, match=r"handle_request\(\).*serve_forever\(\)"),
    ):
        server.handle_request()

"""Handlers that say when a request is there: until it is, a connection holds no thread."""

import signal
import socket
import ssl
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import pytest

from support import Program, ask, descriptors, dial, elapse, patterns, switches, threads_of, until
from support.clients import reset
from support.filters import LINE, NONE, POOL, Slow, answers, pool, unix
from support.scripts import TCP, Notes, Start, launch, noted, rest

pytestmark = pytest.mark.timeout(90)


# -- who waits holds no thread ---------------------------------------------------------------------


@pytest.mark.parametrize("begin", [pool, unix])
def test_slow_clients_hold_no_thread(start: Start, begin: Callable[..., Program]) -> None:
    """Forty clients with half a request beside two threads: others are served, no thread is started for them, the
    worker sleeps; and each of them is answered when its request is whole."""
    program = begin(start)
    (worker,) = program.wait_ready(1)
    with ExitStack() as stack:
        slow = Slow(program, worker, stack, 40)
        for _ in range(20):
            assert ask(program.address).pid == worker
        assert threads_of(worker) <= 3
        elapse(0.2)
        before = switches(worker)
        elapse(1.0)
        assert switches(worker) <= before + 1
        assert slow.finish() == answers(worker, 40)
    program.finish()


def test_handlers_run_unchanged(start: Start) -> None:
    """What was looked at is still there for the handler, however it came: at once, in bytes, and more than one line."""
    handler = f"""{LINE}

    def echo(self):
        self.request.sendall(repr(list(self.rfile)).encode())
"""
    program = pool(start, handler=handler, before="Lines.handle = Lines.echo")
    with ExitStack() as stack:
        for text in (b"one\n", b"one\ntwo\nrest", b"\n"):
            sock = stack.enter_context(dial(program.address))
            for number in range(len(text)):
                sock.sendall(text[number : number + 1])
            sock.shutdown(socket.SHUT_WR)
            assert rest(sock) == repr(text.splitlines(keepends=True)).encode()
    program.finish()


@pytest.mark.parametrize("part", [b"", b"half"])
@pytest.mark.parametrize("end", ["half-close", "close", "reset"])
def test_an_end_is_for_the_handler(start: Start, notes: Notes, part: bytes, end: str) -> None:
    """A client that ends before its request is whole is given to the handler, which finds what it always found."""
    program = pool(start, allow=[patterns.HANDLER_ERROR])
    (worker,) = program.wait_ready(1)
    for number in range(1, 4):
        with ExitStack() as stack:
            sock = Slow(program, worker, stack, 1, part).socks[0]
            if end == "half-close":
                sock.shutdown(socket.SHUT_WR)
                assert rest(sock) == (b"%d:half-0:done\n" % worker if part else b"")
            elif end == "close":
                sock.close()
            else:
                reset(sock)
            noted(notes, "handled", number)
    until(lambda: descriptors(worker)["socket"] == 1, 5, "it is closed")
    ask(program.address)
    program.finish()


def test_the_end_came_with_the_request(start: Start, notes: Notes) -> None:
    """Who sends all, or nothing, and ends at once is served."""
    program = pool(start)
    (worker,) = program.wait_ready(1)
    for number in range(30):
        with dial(program.address) as sock:
            if number % 2:
                sock.sendall(b"x\n")
            sock.shutdown(socket.SHUT_WR)
            assert rest(sock) == (b"%d:x:done\n" % worker if number % 2 else b"")
    assert len(notes("handled")) == 30
    program.finish()


@pytest.mark.parametrize("buffer", [0, 4096])
def test_a_request_that_cannot_be_looked_at_whole(start: Start, buffer: int) -> None:
    """One longer than the look, or than the kernel takes before somebody reads, goes to the handler."""
    settings = [
        "def server_bind(self):",
        f"    self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, {buffer})" if buffer else "    pass",
        "    super().server_bind()",
    ]
    program = pool(start, *settings)
    (worker,) = program.wait_ready(1)
    for size in (100, 20000, 200000):
        with dial(program.address) as sock:
            sock.sendall(b"x" * size + b"\n")
            assert rest(sock) == b"%d:%s:done\n" % (worker, b"x" * size)
    program.finish()


def test_single_bytes_over_a_unix_stream(start: Start) -> None:
    """A client whose many small writes nobody takes is stopped by its kernel: the handler takes them before that."""
    program = unix(start)
    (worker,) = program.wait_ready(1)
    with dial(program.address) as sock:
        for _ in range(2000):
            sock.sendall(b"x")
        sock.sendall(b"\n")
        assert rest(sock) == b"%d:%s:done\n" % (worker, b"x" * 2000)
    program.finish()


# -- how it is declared ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "handler",
    [
        LINE,
        "@classmethod\n    def has_request(cls, data):\n        return cls.END in data\n\n    END = b'\\n'",
        "has_request = __import__('re').compile(rb'\\n').search",
    ],
    ids=["static", "class", "callable"],
)
def test_forms(start: Start, handler: str) -> None:
    """A static method, a class method and whatever can be called with bytes are asked."""
    program = pool(start, handler=handler)
    (worker,) = program.wait_ready(1)
    with ExitStack() as stack:
        slow = Slow(program, worker, stack, 5)
        assert ask(program.address).pid == worker
        assert slow.finish() == answers(worker, 5)
    program.finish()


@pytest.mark.parametrize("handler", ["def has_request(self, data):\n        return True", "has_request = 3"])
def test_a_method_is_refused(start: Start, handler: str) -> None:
    """What needs a handler to be called, or cannot be called, is refused before anything is forked, with the mend."""
    text = POOL.replace("HANDLER", handler).replace("BASE", "prefork.PreforkTCPServer").replace("ADDRESS", TCP)
    program = launch(start, text.replace("CLASS", NONE).replace("BEFORE", "").replace("SETTINGS", ""))
    program.wait_exit(10)
    assert (
        "OptionError: RequestHandlerClass: Lines.has_request is called before there is a handler; make it"
        in program.log
    )
    program.finish(code=1, check_log=False)


def test_none_is_no_declaration(start: Start, notes: Notes) -> None:
    """A subclass that sets it to None is served as if there had never been one."""
    program = pool(start, handler="has_request = None")
    (worker,) = program.wait_ready(1)
    with ExitStack() as stack:
        slow = Slow(program, worker, stack, 1)
        noted(notes, "handled")
        assert ask(program.address).pid == worker
        assert slow.finish() == answers(worker, 1)
    program.finish()


def test_one_that_raises(start: Start) -> None:
    """An exception in it is logged, the handler is given the connection, and the worker lives."""
    handler = """@staticmethod
    def has_request(data):
        if data.startswith(b"bad"):
            raise ValueError("not mine")
        return b"\\n" in data
"""
    program = pool(start, handler=handler, allow=[patterns.TRACEBACK])
    (worker,) = program.wait_ready(1)
    with dial(program.address) as sock:
        sock.sendall(b"bad")
        program.wait_for(
            r"ERROR: worker \d+ \(slot 0, .*\): Lines.has_request\(\) raised; the handler gets the connection \[PF0610"
        )
        sock.sendall(b"\n")
        assert rest(sock) == b"%d:bad:done\n" % worker
    assert ask(program.address).pid == worker
    assert program.log.count("ValueError: not mine") == 1
    program.finish()


def test_where_nothing_can_be_looked_at(start: Start, certificate: tuple[Path, Path]) -> None:
    """Datagrams, TLS and the class sync are served as if nothing had been declared; beside them others are not."""
    cert, key = certificate
    program = launch(
        start,
        f"""
        import ssl
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain({str(cert)!r}, {str(key)!r})

        class Lines(Handler):
            {LINE}

        class Grams(Datagrams):
            {LINE}

        class Secure(prefork.PreforkTCPServer):
            def server_activate(self):
                super().server_activate()
                self.socket = context.wrap_socket(self.socket, server_side=True)

        class Plain(prefork.PreforkTCPServer):
            worker_class = "thread"
            workers = 1
            threads = 2

        with (
            Plain({TCP}, Lines) as one,
            prefork.PreforkUDPServer({TCP}, Grams) as two,
            Secure({TCP}, Lines) as three,
            Plain({TCP}, Handler) as four,
        ):
            prefork.serve(one, two, three, four)
        """,
    ).ready()
    (worker,) = program.wait_ready(1)
    tls = ssl.create_default_context(cafile=str(cert))
    with ExitStack() as stack:
        slow = Slow(program, worker, stack, 10, beside=5)
        for _ in range(10):
            for address in (*program.addresses[:2], program.addresses[3]):
                assert ask(address).pid == worker
            sock = stack.enter_context(dial(program.addresses[2]))
            sock = stack.enter_context(tls.wrap_socket(sock, server_hostname="127.0.0.1"))
            sock.sendall(b"x")
            sock.sendall(b"\n")
            assert rest(sock) == b"%d:x:done\n" % worker
        assert slow.finish() == answers(worker, 10)
        slow = Slow(program, worker, stack, 10, beside=5)
        program.send(signal.SIGTERM)
        program.wait_for(patterns.STOPPING)
        assert slow.finish() == answers(worker, 10)
    assert program.wait_exit().code == 0
    program.finish()


def test_sync_runs_the_handler_as_it_is(start: Start, notes: Notes) -> None:
    """The class sync asks nobody: its handler reads from the first moment."""
    program = pool(start, "worker_class = 'sync'")
    (worker,) = program.wait_ready(1)
    with dial(program.address) as sock:
        sock.sendall(b"x")
        noted(notes, "handled")
        sock.sendall(b"\n")
        assert rest(sock) == b"%d:x:done\n" % worker
    program.finish()


def test_sockets_with_a_timeout(start: Start) -> None:
    """A program's default timeout does not hold the accepting thread at a client that says nothing."""
    program = pool(start, before="socket.setdefaulttimeout(20.0)")
    (worker,) = program.wait_ready(1)
    with ExitStack() as stack:
        slow = Slow(program, worker, stack, 10, b"")
        assert ask(program.address, timeout=5).pid == worker
        for sock in slow.socks:
            sock.sendall(b"x")
        assert ask(program.address, timeout=5).pid == worker
        assert slow.finish() == [b"%d:x:done\n" % worker] * 10
    program.finish()

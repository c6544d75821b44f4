"""The worker for coroutines: every kind of server, many requests in progress, and which classes fit together."""

import functools
import socketserver
import ssl
import subprocess
import sys
import textwrap
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import pytest

import prefork
from support import ask, dial, elapse, patterns, pids_serving
from support.coroutines import LOOPS, PROGRAM, SERVE, begin, both_loops
from support.scripts import Notes, Start, hold, noted, path_of_modules, rest

pytestmark = pytest.mark.timeout(60)


# -- serving ---------------------------------------------------------------------------------------


@both_loops
@pytest.mark.parametrize("kind", ["tcp", "udp", "unix", "unixgram"])
def test_every_kind_of_server(start: Start, notes: Notes, loop: str, kind: str) -> None:
    """Streams and datagrams of both families are answered, on the loop that was asked for, by every worker."""
    program = begin(start, loop, kind)
    assert pids_serving(program.address, 2) == set(program.wait_ready(2))
    assert ask(program.address, "loop").result.startswith(loop)
    program.finish()


@both_loops
def test_many_at_once(start: Start, notes: Notes, loop: str) -> None:
    """One worker has 200 requests in progress, answers others meanwhile, and a stop waits for all of them."""
    program = begin(start, loop, workers=1)
    with ExitStack() as stack:
        held = [hold(program.address, stack, "gate go", f"held-{number}") for number in range(200)]
        noted(notes, "begun", 200)
        assert ask(program.address).result == "done"
        program.begin_stop()
        program.write("go", "")
        for number, sock in enumerate(held):
            assert rest(sock).endswith(f":held-{number}:done\n".encode())
    assert program.wait_exit().code == 0
    program.finish()


def test_several_servers(start: Start, notes: Notes) -> None:
    """One pool of workers serves a stream and a datagram server, through a reload and a stop."""
    serve = """
    with make("tcp") as one, make("udp") as other:
        prefork.serve(one, other)
    """
    program = begin(start, LOOPS[-1], serve=textwrap.dedent(serve))
    for _ in range(2):
        for address in program.addresses[:2]:
            pids_serving(address, 2)
        program.reload()
    program.finish()


def test_errors_go_to_handle_error(start: Start, notes: Notes) -> None:
    """handle_error() gets what a handler raises, also a cancellation of its own; the worker lives."""
    program = begin(start, workers=1)
    (worker,) = program.wait_ready(1)
    for number, order in enumerate(("raise", "cancel"), 1):
        with ExitStack() as stack:
            assert rest(hold(program.address, stack, order)) == b""
        noted(notes, "error", number)
    assert notes("error") == ["ValueError", "CancelledError"]
    assert ask(program.address).pid == worker
    program.finish()


def test_verify_request(start: Start, notes: Notes) -> None:
    """A request that verify_request() does not like is closed unserved."""
    serve = SERVE.replace("**SETTINGS", "verify_request=lambda self, request, peer: (HOME / 'open').exists()")
    program = begin(start, serve=serve)
    with dial(program.address) as sock:
        assert rest(sock) == b""
    program.write("open", "")
    assert ask(program.address).result == "done"
    program.finish()


def test_a_system_exit_costs_one_worker(start: Start, notes: Notes) -> None:
    """sys.exit() in a handler ends its worker, which is replaced, and what its neighbours have open is cleaned up."""
    program = begin(start, workers=1)
    (worker,) = program.wait_ready(1)
    with ExitStack() as stack:
        hold(program.address, stack, "hang")
        noted(notes, "begun")
        assert rest(hold(program.address, stack, "leave 3")) == b""
        noted(notes, "cleaned")
    program.wait_ready(1, without=[worker])
    ask(program.address)
    assert "exit code 3" in program.log
    program.finish()


def test_setup_and_finish(start: Start, notes: Notes) -> None:
    """setup() and finish() of a handler may be coroutines or not; finish() runs after an exception."""
    serve = """
    class Both(Stream):
        def setup(self):
            note("setup")

        async def finish(self):
            await asyncio.sleep(0)
            note("finish")

    class Awaited(Stream):
        async def setup(self):
            await asyncio.sleep(0)
            note("setup")

        def finish(self):
            note("finish")

    SERVERS["tcp"] = (prefork.PreforkTCPServer, functools.partial(CLASS), ("127.0.0.1", 0))
    """
    for kind in ("Both", "Awaited"):
        before = len(notes("finish"))
        text = "import functools\n" + textwrap.dedent(serve).replace("CLASS", kind) + SERVE
        program = begin(start, serve=text)
        ask(program.address)
        with ExitStack() as stack:
            assert rest(hold(program.address, stack, "raise")) == b""
        noted(notes, "finish", before + 2)
        assert len(notes("setup")) == before + 2
        program.finish()


# -- TLS and datagrams -----------------------------------------------------------------------------


@both_loops
def test_tls(start: Start, notes: Notes, certificate: tuple[Path, Path], loop: str) -> None:
    """A listener wrapped in TLS serves; silent and foreign clients hold nobody; a stop loses nobody."""
    cert, key = certificate
    serve = f"""
    import ssl

    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain({str(cert)!r}, {str(key)!r})
    with make(KIND, **SETTINGS) as server:
        server.socket = context.wrap_socket(server.socket, server_side=True)
        server.serve_forever()
    """
    text = textwrap.dedent(serve)
    program = begin(start, loop, serve=text, workers=1, request_timeout=2.0)
    context = ssl.create_default_context(cafile=str(cert))

    def secure(stack: ExitStack) -> ssl.SSLSocket:
        sock = stack.enter_context(dial(program.address))
        return stack.enter_context(context.wrap_socket(sock, server_hostname="127.0.0.1"))

    with ExitStack() as stack:
        silent = stack.enter_context(dial(program.address))
        for _ in range(4):
            with dial(program.address) as garbage:
                garbage.sendall(b"this is no TLS at all, but it is long enough\n")
                with suppress(ConnectionError):
                    rest(garbage)
            sock = secure(stack)
            sock.sendall(b"x\n")
            assert rest(sock).endswith(b":x:done\n")
        assert rest(silent) == b""
        assert noted(notes, "error") == ["RequestTimeout"]
        held = secure(stack)
        held.sendall(b"x extend 20 gate go\n")
        noted(notes, "begun")
        program.begin_stop()
        program.write("go", "")
        assert rest(held).endswith(b":x:done\n")
    assert program.wait_exit().code == 0
    program.finish()


@both_loops
@pytest.mark.parametrize("kind", ["udp", "unixgram"])
def test_datagrams_at_once(start: Start, notes: Notes, loop: str, kind: str) -> None:
    """Datagrams are served beside each other up to max_connections; those that are queued at a stop are answered."""
    program = begin(start, loop, kind, workers=1, max_connections=3)
    address = program.address
    with address.socket() as sock:
        sock.settimeout(5)
        sock.connect(address.target)
        for number in range(8):
            sock.send(f"{number} gate go".encode())
        noted(notes, "begun", 3)
        elapse(0.1)
        assert len(notes("begun")) == 3
        program.begin_stop()
        program.write("go", "")
        answers = {sock.recv(100).split(b":", 1)[1] for _ in range(8)}
    assert answers == {f"{number}:done\n".encode() for number in range(8)}
    assert program.wait_exit().code == 0
    program.finish()


@both_loops
def test_a_client_that_does_not_read_its_datagrams(start: Start, notes: Notes, loop: str) -> None:
    """A Unix client whose queue is full waits for its answers, and nobody else waits with it."""
    program = begin(start, loop, "unixgram", workers=1)
    address = program.address
    with address.socket() as lazy:
        lazy.settimeout(5)
        lazy.connect(address.target)
        for number in range(60):
            lazy.send(f"{number}".encode())
        assert ask(address).result == "done"
        answers = {lazy.recv(100).split(b":", 1)[1] for _ in range(60)}
    assert answers == {f"{number}:done\n".encode() for number in range(60)}
    program.finish()


# -- what fits -------------------------------------------------------------------------------------


class Stream(prefork.AsyncStreamRequestHandler):
    async def handle(self) -> None:
        self.writer.write(await self.reader.readline())


class Datagram(prefork.AsyncDatagramRequestHandler):
    async def handle(self) -> None:
        await self.reply(self.packet)


class Threads(prefork.PreforkMixIn, socketserver.ThreadingMixIn, socketserver.TCPServer):
    pass


TCP, UDP = prefork.PreforkTCPServer, prefork.PreforkUDPServer


@pytest.mark.parametrize(
    ("server", "handler", "kind", "says"),
    [
        (TCP, Stream, prefork.AsyncioWorker, ""),
        (TCP, functools.partial(Stream), prefork.AsyncioWorker, ""),
        (UDP, Datagram, prefork.AsyncioWorker, ""),
        (TCP, Datagram, prefork.AsyncioWorker, "use AsyncStreamRequestHandler or bind a datagram address"),
        (UDP, Stream, prefork.AsyncioWorker, "use AsyncDatagramRequestHandler or bind a stream address"),
        (
            TCP,
            socketserver.StreamRequestHandler,
            prefork.AsyncioWorker,
            "subclass of prefork.AsyncStreamRequestHandler",
        ),
        (TCP, len, prefork.AsyncioWorker, "subclass of prefork.AsyncStreamRequestHandler"),
        (TCP, None, prefork.AsyncioWorker, "None is not a handler for worker_class 'asyncio'"),
        (Threads, Stream, prefork.AsyncioWorker, "does not call Threads.process_request"),
        (TCP, Stream, prefork.SyncWorker, "use worker_class 'asyncio'"),
        (UDP, Datagram, prefork.SyncWorker, "use worker_class 'asyncio'"),
    ],
)
def test_what_fits(server: Any, handler: Any, kind: type[prefork.Worker], says: str) -> None:
    """What a class of workers cannot serve is refused before anything is forked, in one line with the mend."""
    with server(("127.0.0.1", 0), handler) as one:
        if not says:
            kind.check(one)
            return
        with pytest.raises(prefork.OptionError, match=says) as refused:
            kind.check(one)
        assert "\n" not in str(refused.value)


def test_a_single_request_is_no_coroutine() -> None:
    """handle_request(), which serves one request in a process of its own, refuses a handler that is a coroutine."""
    with TCP(("127.0.0.1", 0), Stream) as server, pytest.raises(prefork.OptionError, match="worker_class 'asyncio'"):
        server.handle_request()


def test_the_command(start: Start) -> None:
    """The command finds the class for a coroutine; where another is wanted, it says which one serves it."""
    files = {"app.py": "from kit import *\nLOOP = 'asyncio'\n" + PROGRAM}
    env = path_of_modules()
    words = ("prefork", "app:Stream", "-b", "tcp://127.0.0.1:0", "--workers", 2)
    program = start(*words, files=files, env=env).ready()
    pids_serving(program.address, 2)
    program.finish()
    program = start(*words, "--worker-class", "sync", files=files, env=env, allow=[patterns.ANYTHING])
    assert program.wait_exit(10).code == 2
    assert "use worker_class 'asyncio'" in program.log
    program.finish(code=2)


def test_asyncio_is_imported_when_it_is_used() -> None:
    """The names are there without an import of asyncio, which comes with the first use of one."""
    code = """
import sys, prefork
names = [name for name in prefork.__all__ if "Async" in name]
before = "asyncio" in sys.modules
found = [getattr(prefork, name).__name__ for name in names]
print(len(names), found == names, before, "asyncio" in sys.modules, hasattr(prefork, "Nothing"))
"""
    done = subprocess.run([sys.executable, "-I", "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["3", "True", "False", "True", "False"]

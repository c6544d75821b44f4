"""Workers and programs that do what they should not: the pool, and its other workers, are not harmed."""

import contextlib
import re
import signal
from contextlib import ExitStack

import pytest

from support import ask, dial, patterns, processes, until
from support.faulty_server import begin, check_alive, soon
from support.scripts import Notes, Start, hold, launch, noted, rest

pytestmark = pytest.mark.timeout(60)


@pytest.mark.parametrize("how", ["closes", "disarms"])
def test_a_worker_without_its_lifeline_dies_with_the_master(start: Start, notes: Notes, how: str) -> None:
    """A worker that closed every descriptor, or took the signal off its lifeline, does not outlive the master."""
    before = """
import fcntl

class Careless(Handler):
    def answer(self, order):
        if order == "closes":
            note(f"begun {os.getpid()}")
            os.closerange(3, 4096)
            while True:
                time.sleep(60)
        for fd in range(3, 64):
            try:
                fcntl.fcntl(fd, fcntl.F_SETFL, fcntl.fcntl(fd, fcntl.F_GETFL) & ~os.O_ASYNC)
            except OSError:
                continue
        note(f"begun {os.getpid()}")
        while True:
            time.sleep(60)
"""
    program = begin(start, before, handler="Careless")
    with ExitStack() as stack:
        hold(program.address, stack, how)
        noted(notes, "begun")
        program.send(signal.SIGKILL)
        program.wait_exit()
        until(lambda: not program.remaining(), 2.0, "no process is left")
    program.finish(code=-signal.SIGKILL)


def test_garbage_on_the_uplink_orders_nothing(start: Start) -> None:
    """A program that writes bytes to a wrong descriptor neither stops the pool nor has its worker replaced."""
    before = """
import stat

class Careless(Handler):
    def answer(self, order):
        for fd in range(3, 64):
            try:
                if stat.S_ISFIFO(os.fstat(fd).st_mode):
                    for value in range(256):
                        os.write(fd, bytes((value,)) * 8)
            except OSError:
                continue
        return "done"
"""
    program = begin(start, before, handler="Careless", allow=[patterns.ANYTHING])
    workers = program.wait_ready(2)
    for _ in range(20):
        ask(program.address)
    assert program.wait_ready(2) == workers
    assert program.log.count("INFO") == program.log.count(": listening") + program.log.count(": pool ready")
    check_alive(program)
    program.finish()


def test_who_stopped_the_pool_is_said(start: Start) -> None:
    """A pool that is stopped by shutdown() in a worker says which one it was."""
    before = """
class Stops(Handler):
    def answer(self, order):
        self.server.shutdown()
        return "done"
"""
    program = begin(start, before, handler="Stops")
    pid = ask(program.address).pid
    assert program.wait_exit().code == 0
    assert re.search(rf"worker {pid} \(slot \d, generation 1\) asks the pool to stop", program.log)
    program.finish()


@pytest.mark.parametrize("kind", ["tcp", "unix"])
@pytest.mark.parametrize("workers", ["sync", "thread", "asyncio"])
def test_a_listener_that_was_shut_down_is_opened_again(start: Start, kind: str, workers: str) -> None:
    """A worker that shuts the listener down takes it from all of them: the master says so, and opens it again."""
    body = f"""
    def answer(server, order):
        if order == "shut":
            server.worker.servers[0].socket.shutdown(socket.SHUT_RDWR)
        return f"{{os.getpid()}}:x:done\\n".encode()

    class Shuts(prefork.StreamRequestHandler):
        def handle(self):
            self.wfile.write(answer(self.server, self.rfile.readline().decode().split()[1]))

    class ShutsInLoop(prefork.AsyncStreamRequestHandler):
        async def handle(self):
            line = await self.reader.readline()
            self.writer.write(answer(self.server, line.decode().split()[1]))

    class Server(prefork.{"PreforkTCPServer" if kind == "tcp" else "PreforkUnixStreamServer"}):
        workers = 2
        worker_class = "{workers}"

    address = {'("127.0.0.1", 0)' if kind == "tcp" else 'str(RUN / "socket")'}
    with Server(address, {"ShutsInLoop" if workers == "asyncio" else "Shuts"}) as server:
        server.serve_forever()
    """
    program = launch(start, body, allow=[patterns.TRACEBACK]).ready()
    program.wait_ready(2)
    for number in range(1, 3):
        with ExitStack() as stack:
            assert b":x:done" in rest(hold(program.address, stack, "shut"))
        program.wait_for(
            r"a worker or the program has shut down .*; the master has opened it again \[PF0412\]", number=number
        )
        program.wait_ready(2)
        for _ in range(10):
            with ExitStack() as stack:
                assert b":x:done" in rest(hold(program.address, stack, "go"))
    assert program.stop().code == 0
    program.finish()


@pytest.mark.parametrize("kind", ["udp", "unixgram"])
@pytest.mark.parametrize("workers", ["sync", "thread"])
def test_a_socket_of_datagrams_that_was_shut_down_is_opened_again(start: Start, kind: str, workers: str) -> None:
    """The same where datagrams are received: nobody spins on a socket that has nothing to give any more."""
    body = f"""
    class Shuts(prefork.DatagramRequestHandler):
        def handle(self):
            identity, _, order = self.rfile.readline().decode().strip().partition(" ")
            self.wfile.write(f"{{os.getpid()}}:{{identity}}:done\\n".encode())
            if order == "shut":
                super().finish()
                try:
                    self.server.worker.servers[0].socket.shutdown(socket.SHUT_RD)
                except OSError:
                    pass  # ENOTCONN, and it is shut down

        def finish(self):
            if self.wfile.getvalue().count(b"done") and not self.packet.endswith(b"shut\\n"):
                super().finish()

    class Server(prefork.{"PreforkUDPServer" if kind == "udp" else "PreforkUnixDatagramServer"}):
        workers = 2
        worker_class = "{workers}"

    with Server({'("127.0.0.1", 0)' if kind == "udp" else 'str(RUN / "socket")'}, Shuts) as server:
        server.serve_forever()
    """
    program = launch(start, body, allow=[patterns.TRACEBACK, patterns.HANDLER_ERROR]).ready()
    program.wait_ready(2)
    for number in range(1, 3):
        ask(program.address, "shut")
        program.wait_for(
            r"a worker or the program has shut down .*; the master has opened it again \[PF0412\]", number=number
        )
        program.wait_ready(2)
        for _ in range(10):
            ask(program.address)
    assert program.stop().code == 0
    program.finish()


FULL_TABLE = """
import errno

def fill():
    while True:
        try:
            os.dup(1)
        except OSError as error:
            if error.errno == errno.EMFILE:
                return
            raise

class Fills(prefork.StreamRequestHandler):
    def handle(self):
        self.rfile.readline()
        fill()
        self.wfile.write(f"{os.getpid()}:x:done\\n".encode())

class FillsInLoop(prefork.AsyncStreamRequestHandler):
    async def handle(self):
        await self.reader.readline()
        fill()
        self.writer.write(f"{os.getpid()}:x:done\\n".encode())

def wsgi(environ, start_response):
    fill()
    start_response("200 OK", [])
    return [f"{os.getpid()}:x:done\\n".encode()]

async def asgi(scope, receive, send):
    if scope["type"] == "http":
        fill()
        await send({"type": "http.response.start", "status": 200})
        await send({"type": "http.response.body", "body": f"{os.getpid()}:x:done\\n".encode()})

class Server(prefork.PreforkTCPServer):
    workers = 2
    worker_class = sys.argv[1]

served = {"sync": Fills, "thread": Fills, "asyncio": FillsInLoop, "wsgi": wsgi, "asgi": asgi}[sys.argv[1]]
with Server(("127.0.0.1", 0), served) as server:
    server.serve_forever()
"""


@pytest.mark.parametrize("kind", ["sync", "thread", "asyncio", "wsgi", "asgi"])
def test_a_worker_whose_table_is_full_leaves(start: Start, kind: str) -> None:
    """A worker that has no descriptor left leaves at once when it is told to, alone or with the whole pool."""
    program = launch(start, FULL_TABLE, kind, limits={7: 64}, allow=[patterns.ANYTHING]).ready()  # RLIMIT_NOFILE
    program.wait_ready(2)

    def fill() -> int:
        with dial(program.address) as client:
            client.sendall(b"GET / HTTP/1.0\r\n\r\n" if kind in ("wsgi", "asgi") else b"go\n")
            answer = rest(client)
        found = re.search(rb"(\d+):x:done", answer)
        assert found, answer
        return int(found[1])

    full = fill()
    with soon(2.0):
        program.send(signal.SIGTERM, full)
        until(lambda: not processes.alive(full), 5.0, "the worker with a full table has left")
    program.wait_ready(2, without=[full])
    fill()
    with soon(3.0):
        assert program.stop().code == 0
    program.finish()


# -- ready -----------------------------------------------------------------------------------------


def test_no_null_device(start: Start) -> None:
    """Where /dev/null is missing workers serve, are replaced, and leave without a loss."""
    program = begin(start, 'os.devnull = "/nowhere/null"\n')
    workers = program.wait_ready(2)
    program.send(signal.SIGTERM, workers[0])
    program.wait_ready(2, without=workers[:1])
    check_alive(program)
    program.finish()


def test_who_cannot_accept_is_not_ready(start: Start) -> None:
    """A worker that cannot make what it needs to accept has failed to boot: a reload fails, the old pool serves on."""
    before = """
import prefork.workers.intake.acceptor as accept
accept.Acceptor.__init__ = refusing(accept.Acceptor.__init__, errno.EMFILE)
"""
    program = begin(start, before, allow=[patterns.TRACEBACK])
    workers = program.wait_ready(2)
    program.write("refuse", "")
    program.send(signal.SIGHUP)
    program.wait_for(patterns.RELOAD_FAILED)
    assert program.wait_ready(2) == workers
    ask(program.address)
    (program.work / "refuse").unlink()
    check_alive(program)
    program.finish()


@pytest.mark.parametrize("kind", ["sync", "wsgi"])
def test_a_wake_up_within_a_worker_is_refused(start: Start, kind: str) -> None:
    """A worker that waits at several listeners leaves at once where its own wake-up cannot be written."""
    body = f"""
    import errno

    write = os.write

    def refusing(fd, data):
        if data == b"\\0" and (HOME / "refuse").exists():
            raise OSError(errno.EIO, "refused")
        return write(fd, data)

    class Server(prefork.PreforkTCPServer):
        workers = 2
        worker_class = "{kind}"

    os.write = refusing
    prefork.serve(Server(("127.0.0.1", 0), Handler), Server(("127.0.0.1", 0), Handler))
    """
    program = launch(start, body).ready()
    workers = program.wait_ready(2)
    program.write("refuse", "")
    program.send(signal.SIGTERM, workers[0])
    with soon(1.0):
        program.wait_ready(2, without=workers[:1])
    with soon(1.0):
        assert program.stop().code == 0
    program.finish(check_log=False)


def test_a_connection_without_an_address_ends(start: Start) -> None:
    """Where the system does not tell a connection's address, `asgi` closes it, and it holds up no stop."""
    body = """
    import errno
    import uvicorn.protocols.http.httptools_impl as impl

    ask = impl.get_local_addr

    def refusing(transport):
        if (HOME / "refuse").exists():
            raise OSError(errno.ENOBUFS, "refused")
        return ask(transport)

    impl.get_local_addr = refusing

    async def app(scope, receive, send):
        if scope["type"] == "http":
            await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]})
            await send({"type": "http.response.body", "body": b"ok"})

    class Server(prefork.PreforkTCPServer):
        workers = 1
        worker_class = "asgi"

    with Server(("127.0.0.1", 0), app) as server:
        server.serve_forever()
    """
    program = launch(start, body, allow=[patterns.TRACEBACK]).ready()
    program.wait_ready(1)
    request = b"GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
    program.write("refuse", "")
    with dial(program.address) as client, contextlib.suppress(ConnectionError):
        client.sendall(request)
        assert rest(client) == b""
    (program.work / "refuse").unlink()
    with dial(program.address) as client:
        client.sendall(request)
        assert rest(client).endswith(b"ok")
    with soon(1.0):
        assert program.stop().code == 0
    program.finish(check_log=False)

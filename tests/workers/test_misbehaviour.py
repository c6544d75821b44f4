"""Programs that do what nobody thought of: each of these has once cost a request, a worker or the pool."""

import signal
import socket
import textwrap
import time
from contextlib import ExitStack
from pathlib import Path

import pytest

import prefork
from support import Times, ask, patterns, processes, until, within
from support.scripts import Notes, Start, hold, launch, noted, rest


def test_a_process_of_a_handler_is_no_worker(start: Start) -> None:
    """TERM to a process that a handler forked ends that process, and says nothing in the name of its worker."""
    program = launch(
        start,
        """
        import multiprocessing

        class Forks(prefork.BaseRequestHandler):
            def handle(self):
                self.request.recv(100)
                child = multiprocessing.get_context("fork").Process(target=time.sleep, args=(30,))
                child.start()
                child.terminate()
                child.join(10)
                self.request.sendall(f"{os.getpid()} {child.exitcode}".encode())

        class Pool(prefork.PreforkTCPServer):
            workers = 1
            graceful_timeout = 2

        with Pool(("127.0.0.1", 0), Forks) as server:
            server.serve_forever()
        """,
    ).ready()
    (worker,) = program.wait_ready(1)
    for _ in range(3):
        with ExitStack() as stack:
            assert rest(hold(program.address, stack, "")) == f"{worker} -15".encode()
    program.stop()
    program.finish()


@pytest.mark.parametrize("way", ["override", "executor"])
def test_requests_handed_to_threads_are_waited_for(start: Start, notes: Notes, way: str) -> None:
    """A stop waits for requests that an override or an executor carries on in threads of its own."""
    body = {
        "override": """
        class Pool(prefork.PreforkMixIn, socketserver.ThreadingMixIn, socketserver.TCPServer):
            workers = 1
            daemon_threads = True

            def process_request(self, request, client_address):
                super().process_request(request, client_address)
        """,
        "executor": """
        from concurrent.futures import ThreadPoolExecutor

        class Pool(prefork.PreforkTCPServer):
            workers = 1

            def process_request(self, request, client_address):
                if not hasattr(self, "executor"):
                    self.executor = ThreadPoolExecutor(8)
                self.executor.submit(self.carry_on, request, client_address)

            def carry_on(self, request, client_address):
                self.finish_request(request, client_address)
                self.shutdown_request(request)
        """,
    }[way]
    program = launch(
        start,
        body
        + """
        class Waits(prefork.BaseRequestHandler):
            def handle(self):
                self.request.recv(100)
                note("begun")
                pass_gate("go")
                self.request.sendall(b"answer")

        with Pool(("127.0.0.1", 0), Waits) as server:
            server.serve_forever()
        """,
    ).ready()
    with ExitStack() as stack:
        clients = [hold(program.address, stack, "") for _ in range(4)]
        noted(notes, "begun", 4)
        program.send(15)
        program.wait_for(patterns.STOPPING)
        program.write("go", "")
        assert [rest(client) for client in clients] == [b"answer"] * 4
    assert program.wait_exit(10).code == 0
    program.finish()


def test_a_forking_server_is_refused() -> None:
    """ForkingMixIn behind the mix-in would wait for any child of the master: one line says to leave it out."""
    import socketserver

    class Both(prefork.PreforkMixIn, socketserver.ForkingMixIn, socketserver.TCPServer):  # type: ignore[misc]
        pass

    with (
        Both(("127.0.0.1", 0), prefork.BaseRequestHandler) as server,
        pytest.raises(prefork.OptionError, match="Forking"),
    ):
        server.serve_forever()


def test_servers_of_a_factory_keep_their_addresses(start: Start, tmp_path: Path) -> None:
    """However a factory orders the servers that it returns, each address is served by the one that was bound to it."""
    sockets = [tmp_path / "a", tmp_path / "b"]
    program = start(
        "prefork",
        "factory:make",
        "-w",
        "2",
        files={
            "factory.py": f"""
import socketserver

class A(socketserver.BaseRequestHandler):
    answer = b"a"
    def handle(self):
        self.request.sendall(self.answer)

class B(A):
    answer = b"b"

def make():
    a = socketserver.UnixStreamServer({str(sockets[0])!r}, A)
    b = socketserver.UnixStreamServer({str(sockets[1])!r}, B)
    return [b, a]
"""
        },
    ).ready()
    for path in sockets:
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(str(path))
            assert rest(client) == path.name.encode()
    program.stop()
    program.finish()


def test_closing_before_the_drain_is_over(start: Start) -> None:
    """server_close() without block_on_close leaves the listener to the drain: idle workers leave at once."""
    program = launch(
        start,
        """
        class Pool(prefork.PreforkTCPServer):
            workers = 2
            graceful_timeout = 20
            block_on_close = False

        server = Pool(("127.0.0.1", 0), Handler)
        when("close", server.server_close)
        server.serve_forever()
        """,
    ).ready()
    program.wait_ready(2)
    program.write("close", "")
    assert program.wait_exit(5).code == 0
    program.finish()


@pytest.mark.parametrize("kind", ["tcp", "unix"])
def test_a_process_that_a_handler_left_holds_no_port(start: Start, notes: Notes, kind: str) -> None:
    """A process that a handler, or `setup()`, forked may outlive the pool: the address is free all the same."""
    body = """
        from prefork.workers.handlers.sync import SyncWorker

        class Forks(prefork.BaseRequestHandler):
            def handle(self):
                self.request.recv(100)
                leave_one()

        class Early(SyncWorker):
            def setup(self):
                leave_one()

        def leave_one():
            if os.fork() == 0:
                note(f"left {os.getpid()}")
                pass_gate("go")
                os._exit(0)

        class Pool(prefork.PreforkTCPServer if KIND == "tcp" else prefork.PreforkUnixStreamServer):
            workers = 1
            worker_class = Early
            allow_reuse_port = False

        with Pool(("127.0.0.1", 0) if KIND == "tcp" else str(RUN / "s"), Forks) as server:
            address = server.server_address
            server.serve_forever()
        try:
            Pool(address, Forks).server_close()
            note("again free")
        except OSError as error:
            note(f"again {error}")
        """
    program = launch(start, f"KIND = {kind!r}\n" + textwrap.dedent(body)).ready()
    with ExitStack() as stack:
        assert rest(hold(program.address, stack, "")) == b""
    noted(notes, "left", 2)
    program.send(signal.SIGTERM)
    assert noted(notes, "again") == ["free"]
    program.write("go", "")
    assert program.wait_exit().code == 0
    program.finish()


def test_a_fork_that_comes_back_from_its_handler_ends(start: Start, notes: Notes) -> None:
    """A child that a handler forks and that returns is no second worker: it answers its client, and takes no other."""
    program = launch(
        start,
        """
        class Forks(prefork.BaseRequestHandler):
            def handle(self):
                if self.request.recv(100).strip() == b"fork" and os.fork() == 0:
                    note(f"child {os.getpid()}")
                self.request.sendall(b"%d" % os.getpid())

        class Pool(prefork.PreforkTCPServer):
            workers = 1

        with Pool(("127.0.0.1", 0), Forks) as server:
            server.serve_forever()
        """,
        allow=[patterns.ANYTHING],
    ).ready()
    (worker,) = program.wait_ready(1)
    with ExitStack() as stack:
        rest(hold(program.address, stack, "", identity="fork"))
    (child,) = map(int, noted(notes, "child"))
    until(lambda: not processes.alive(child), 5.0, "the child has ended")
    for _ in range(10):
        with ExitStack() as stack:
            assert rest(hold(program.address, stack, "")) == str(worker).encode()
    program.stop()
    program.finish()


def test_children_of_a_handlers_process_are_its_own(start: Start, notes: Notes) -> None:
    """What a process that a handler forked sets and opens is inherited by its own children as without prefork."""
    program = launch(
        start,
        """
        def heard(*_):
            note(f"heard {os.getpid()}")
            os._exit(0)

        class Forks(prefork.BaseRequestHandler):
            def handle(self):
                child = os.fork()
                if child:
                    os.waitpid(child, 0)
                    return
                os.closerange(3, 256)
                signal.signal(signal.SIGTERM, heard)
                files = [os.open(HOME / "app.py", os.O_RDONLY) for _ in range(64)]
                grandchild = os.fork()
                if grandchild:
                    os.waitpid(grandchild, 0)
                    os._exit(0)
                note(f"intact {sum(os.fstat(fd).st_size > 0 for fd in files)}")
                os.kill(os.getpid(), signal.SIGTERM)
                os._exit(1)

        class Pool(prefork.PreforkTCPServer):
            workers = 1

        with Pool(("127.0.0.1", 0), Forks) as server:
            server.serve_forever()
        """,
    ).ready()
    with ExitStack() as stack:
        assert rest(hold(program.address, stack, "")) == b""
    assert noted(notes, "intact") == ["64"]
    assert len(noted(notes, "heard")) == 1
    program.stop()
    program.finish()


@pytest.mark.parametrize("order", [signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize("way", ["os.set_blocking(self.server.fileno(), False)", "self.server.socket.settimeout(0.05)"])
def test_a_listener_that_somebody_makes_non_blocking(start: Start, order: signal.Signals, way: str) -> None:
    """A handler, or whoever shares the listener, may make it non-blocking: idle workers leave as soon as otherwise."""
    program = launch(
        start,
        f"""
        class Careless(prefork.BaseRequestHandler):
            def handle(self):
                self.request.recv(100)
                {way}
                self.request.sendall(b"%d" % os.getpid())

        class Pool(prefork.PreforkTCPServer):
            workers = 2

        with Pool(("127.0.0.1", 0), Careless) as server:
            server.serve_forever()
        """,
    ).ready()
    workers = program.wait_ready(2)
    for _ in range(4):
        with ExitStack() as stack:
            assert int(rest(hold(program.address, stack, ""))) in workers
    begun = time.monotonic()
    program.send(order)
    if order is signal.SIGHUP:
        program.wait_ready(2, without=workers)
    else:
        program.wait_exit()
    within(time.monotonic() - begun, 0.75)  # it was a whole second for each
    program.stop()
    program.finish()


@pytest.mark.parametrize("order", ["exit 3", "leave 3", "crash"])
def test_first_requests_that_end_their_worker(start: Start, order: str) -> None:
    """Each costs one worker, however many come in a row: the next client is answered at once, by the next worker."""
    program = launch(
        start,
        """
        class Breaks(Handler):
            def answer(self, order):
                if order == "crash":
                    os.kill(os.getpid(), signal.SIGSEGV)
                return super().answer(order)

        class Pool(prefork.PreforkTCPServer):
            workers = 2

        with Pool(("127.0.0.1", 0), Breaks) as server:
            server.serve_forever()
        """,
        allow=[patterns.ANYTHING],
    ).ready()
    times = Times()
    for _ in range(30):
        begun = time.monotonic()
        with ExitStack() as stack:
            assert rest(hold(program.address, stack, order)) == b""
        times.append(time.monotonic() - begun)
    times.check(0.5, 3.0)  # a back-off would soon be 10 s; how fast a respawn is stands elsewhere
    ask(program.address)
    program.stop()
    program.finish()

"""The worker with threads: several requests at once in a process, every kind of server, and nothing lost at its end."""

import functools
import os
import signal
import ssl
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from support import (
    Ledger,
    Load,
    Program,
    ask,
    children,
    dial,
    elapse,
    patterns,
    stop_and_start,
    switches,
    threads_of,
    until,
)
from support.reporting import reports
from support.scripts import TCP, Notes, Start, hold, launch, noted, rest
from support.threads import pool

Run = Callable[..., Load]
pytestmark = pytest.mark.timeout(90)


# -- several at once -------------------------------------------------------------------------------


def test_as_many_at_once_as_there_are_threads(start: Start, notes: Notes) -> None:
    """A worker serves `threads` requests at once and takes no more than that; what is queued is taken as one ends."""
    program = pool(start, "threads = 3")
    (worker,) = program.wait_ready(1)
    with ExitStack() as stack:
        held = [hold(program.address, stack, "gate go", f"c{number}") for number in range(4)]
        noted(notes, "begun", 3)
        elapse(0.2)
        assert len(notes("begun")) == 3
        program.write("go", "")
        assert sorted(map(rest, held)) == [f"{worker}:c{number}:done\n".encode() for number in range(4)]
    program.finish()


def test_a_full_worker_leaves_new_clients_to_its_siblings(start: Start, notes: Notes) -> None:
    """Where all threads of one worker are busy, another takes whoever comes."""
    program = pool(start, "workers = 2", "threads = 2")
    workers = program.wait_ready(2)
    with ExitStack() as stack:
        for number in range(3):
            hold(program.address, stack, "gate go", f"c{number}")
            noted(notes, "begun", number + 1)
        assert {ask(program.address).pid for _ in range(8)} <= set(workers)
        hold(program.address, stack, "gate go", "last")
        noted(notes, "begun", 4)
        late = hold(program.address, stack, "", "late")
        elapse(0.1)
        program.write("go", "")
        assert rest(late).endswith(b":late:done\n")
    program.finish()


def test_threads_are_started_when_they_are_needed(start: Start, notes: Notes) -> None:
    """One client after the other needs few threads, many at once need as many; idle threads do not wake up."""
    program = pool(start, "threads = 24")
    (worker,) = program.wait_ready(1)
    until(lambda: threads_of(worker) == 2, 5, "one accepts")
    for _ in range(20):
        assert ask(program.address, "thread").result.startswith("prefork-")
    assert threads_of(worker) < 20
    with ExitStack() as stack:
        for _ in range(23):
            hold(program.address, stack, "gate go")
        noted(notes, "begun", 23)
        until(lambda: threads_of(worker) == 25, 5, "and one accepts")
        program.write("go", "")
    ask(program.address)
    elapse(0.3)
    before = switches(worker)
    elapse(1.0)
    assert switches(worker) == before
    program.finish()


def test_slow_clients_hold_a_thread_not_a_process(start: Start) -> None:
    """Clients that say nothing are no hindrance to the others while a thread is free, and none to a stop in time."""
    program = pool(start, "threads = 4", "graceful_timeout = 0.5")
    with ExitStack() as stack:
        for _ in range(3):
            stack.enter_context(dial(program.address))
        for _ in range(10):
            ask(program.address)
        assert program.stop().seconds < 5
    program.finish(allow=[patterns.FAULT])


def test_a_system_without_room_for_threads(start: Start, notes: Notes) -> None:
    """Where no further thread can be started, those that are there serve on."""
    before = """
class Poor(ThreadWorker):
    def _start(self):
        if self._started == 2:
            raise RuntimeError("can't start new thread")
        super()._start()
"""
    program = pool(start, "threads = 4", "worker_class = Poor", before=before)
    with ExitStack() as stack:
        held = [hold(program.address, stack, "gate go") for _ in range(5)]
        noted(notes, "begun", 2)
        program.wait_for(
            r"WARNING: worker \d+ \(slot 0, .*\) cannot start another thread: can't start new thread; it serves with 2"
        )
        program.write("go", "")
        assert all(rest(one).endswith(b":held:done\n") for one in held)
    program.finish()


def test_a_full_file_table(start: Start, notes: Notes) -> None:
    """EMFILE at accept: the worker pauses and says so, does not spin, and takes the client when there is room again."""
    before = """
import resource

class Poor(ThreadWorker):
    def setup(self):
        used = len(os.listdir("/proc/self/fd"))
        resource.setrlimit(resource.RLIMIT_NOFILE, (used + 2, used + 2))

def answer(self, order):
    pass_gate("go")
    return "done"

Hangs.answer = answer
"""
    program = pool(start, "worker_class = Poor", before=before)
    (worker,) = program.wait_ready(1)
    with ExitStack() as stack:
        held = [hold(program.address, stack, "stay") for _ in range(6)]
        program.wait_for(r"WARNING: worker \d+ \(slot 0, .*\) cannot accept a connection: Too many open files")
        tick = os.sysconf("SC_CLK_TCK")
        spent = os_times(worker)
        elapse(1.0)
        assert (os_times(worker) - spent) / tick < 0.3
        program.write("go", "")
        assert all(rest(one).endswith(b":held:done\n") for one in held)
    program.finish()


def os_times(pid: int) -> int:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return int(fields[11]) + int(fields[12])


# -- every kind of server --------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["tcp", "udp", "unix", "unixgram"])
def test_kinds(start: Start, notes: Notes, kind: str) -> None:
    """Streams and datagrams are served at once by several threads; a stop answers what they have in progress."""
    server, handler, address = {
        "tcp": ("PreforkTCPServer", "Handler", TCP),
        "udp": ("PreforkUDPServer", "Datagrams", TCP),
        "unix": ("PreforkUnixStreamServer", "Handler", 'str(RUN / "s")'),
        "unixgram": ("PreforkUnixDatagramServer", "Datagrams", 'str(RUN / "s")'),
    }[kind]
    program = launch(
        start,
        f"""
        class Server(prefork.{server}):
            workers = 1
            worker_class = "thread"
            threads = 4

        with Server({address}, {handler}) as server:
            server.serve_forever()
        """,
    ).ready()
    (worker,) = program.wait_ready(1)
    with ExitStack() as stack:
        held = [hold(program.address, stack, "gate go", f"c{number}") for number in range(3)]
        noted(notes, "begun", 3)
        assert ask(program.address, "thread").result.startswith("prefork-")
        program.begin_stop()
        elapse(0.05)
        assert program.running and children(program.pid) == [worker]
        program.write("go", "")
        for number, sock in enumerate(held):
            assert sock.recv(1000) == f"{worker}:c{number}:done\n".encode()
    assert program.wait_exit().code == 0
    program.finish()


def test_tls(start: Start, notes: Notes, certificate: tuple[Path, Path]) -> None:
    """With a TLS listener the handshake is a thread's: clients that do not shake hands hold nobody up, until their
    deadline has the worker replaced."""
    cert, key = certificate
    wrap = f"""
import ssl
context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
context.load_cert_chain({str(cert)!r}, {str(key)!r})

class Secure(Reporting, socketserver.TCPServer):
    def server_activate(self):
        super().server_activate()
        self.socket = context.wrap_socket(self.socket, server_side=True)
"""
    program = pool(start, "worker_class = 'thread'", "request_timeout = 1.0", bases="Secure", before=wrap)
    context = ssl.create_default_context(cafile=str(cert))

    def secure(stack: ExitStack) -> ssl.SSLSocket:
        sock = stack.enter_context(dial(program.address))
        return stack.enter_context(context.wrap_socket(sock, server_hostname="127.0.0.1"))

    with ExitStack() as stack:
        silent = [stack.enter_context(dial(program.address)) for _ in range(3)]
        for _ in range(5):
            sock = secure(stack)
            sock.sendall(b"x\n")
            assert rest(sock).endswith(b":x:done\n")
        assert [rest(one) for one in silent] == [b""] * 3
        assert reports(notes)[0]["reason"] == "REQUEST_TIMEOUT"
        sock = secure(stack)
        sock.sendall(b"x\n")
        assert rest(sock).endswith(b":x:done\n")
    program.finish(allow=[patterns.FAULT])


def test_several_listeners(start: Start, notes: Notes) -> None:
    """Several servers share a pool of workers with threads, through a retirement, a reload and a stop."""
    program = launch(
        start,
        """
        class First(prefork.PreforkTCPServer):
            workers = 2
            worker_class = "thread"
            threads = 3

        with (
            First(("127.0.0.1", 0), Handler) as one,
            prefork.PreforkUnixStreamServer(str(RUN / "s"), Handler) as two,
            prefork.PreforkUDPServer(("127.0.0.1", 0), Datagrams) as three,
        ):
            prefork.serve(one, two, three)
        """,
    ).ready()
    workers = program.wait_ready(2)
    for address in program.addresses * 3:
        assert ask(address, "thread").result.startswith("prefork-")
    program.send(signal.SIGTERM, workers[0])
    program.wait_ready(2, without=workers[:1])
    program.send(signal.SIGHUP)
    program.wait_for(patterns.RELOADED)
    program.wait_ready(2, without=workers)
    with ExitStack() as stack:
        held = [hold(address, stack, "gate go") for address in program.addresses[:2] * 2]
        noted(notes, "begun", 4)
        program.begin_stop()
        program.write("go", "")
        assert all(rest(sock).endswith(b":held:done\n") for sock in held)
    assert program.wait_exit().code == 0
    program.finish()


def test_overrides(start: Start, notes: Notes) -> None:
    """Every method of the server that is overridden is called; what verify_request() refuses is closed; an exception
    is the server's handle_error(), and the thread serves on."""
    program = pool(
        start,
        "threads = 2",
        bases="Overrides",
        before="""
class Overrides(Reporting, socketserver.TCPServer):
    worker_class = "thread"

    def get_request(self):
        request, peer = super().get_request()
        note("get_request")
        return request, peer

    def verify_request(self, request, client_address):
        return not (HOME / "refuse").exists()

    def process_request(self, request, client_address):
        note("process_request")
        super().process_request(request, client_address)

    def close_request(self, request):
        note("close_request")
        super().close_request(request)

    def handle_error(self, request, client_address):
        note(f"handle_error {sys.exc_info()[0].__name__}")
""",
    )
    for number in range(1, 5):
        with dial(program.address) as sock:
            sock.sendall(b"x raise\n")
            assert rest(sock) == b""
        ask(program.address)
        noted(notes, "handle_error", number)
    program.write("refuse", "")
    with dial(program.address) as sock:
        assert rest(sock) == b""
    noted(notes, "close_request", 9)
    assert (len(notes("get_request")), len(notes("process_request"))) == (9, 8)
    program.finish()
    assert reports(notes)[0]["requests"] == 9


# -- nothing is lost -------------------------------------------------------------------------------


def busy_pool(start: Start, *arguments: object, **options: Any) -> Program:
    return start("pool.py", *arguments, "--worker-class", "thread", "--threads", 4, **options).ready()


@pytest.mark.parametrize("kind", ["tcp", "unix"])
def test_stops_lose_nothing(start: Start, ledger: Ledger, load: Run, kind: str) -> None:
    """16 clients that never stop, a pool that is stopped and started on one address: 0 reset, 0 unanswered."""
    listen = {"tcp": "tcp://127.0.0.1:0", "unix": "unix:{run}/socket"}[kind]
    program = busy_pool(start, listen, "--workers", 2)
    address = program.address
    clients = load(address, clients=16)
    again = functools.partial(busy_pool, start, address, "--workers", 2, directory=program.directory)
    stop_and_start(program, again, [clients], 10)
    clients.check_nothing_lost(ledger, stopped=True)


@pytest.mark.parametrize("kind", ["tcp://127.0.0.1:0", "udp://127.0.0.1:0"])
def test_changes_lose_nothing(start: Start, ledger: Ledger, load: Run, kind: str) -> None:
    """Reloads, retirements of single workers and recycling under 16 clients: no request fails, and none is served
    twice."""
    program = busy_pool(start, kind, "--workers", 3, "--max-requests", 400, "--max-requests-jitter", 100)
    clients = load(program.address, clients=16)
    for _ in range(5):
        clients.more(100)
        program.reload()
    for turn in range(20):
        clients.more(20)
        pids = until(lambda: children(program.pid), 5, "workers")
        try:
            program.send(signal.SIGTERM, pids[turn % len(pids)])
        except ProcessLookupError:  # it was being recycled
            continue
    clients.more(2000)
    clients.check_nothing_lost(ledger)
    said = " ".join(match[4] for match in program.found(patterns.LEFT))
    assert "recycled" in said and "a reload has replaced" in said and "signal from outside" in said
    program.finish()

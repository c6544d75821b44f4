"""Handlers that say when a request is there: until it is, a connection holds no thread, and nothing is lost by that."""

import os
import signal
import socket
import ssl
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import pytest

from support import (
    Address,
    Ledger,
    Load,
    Program,
    account,
    ask,
    children,
    descriptors,
    dial,
    elapse,
    patterns,
    switches,
    threads_of,
    until,
)
from support.clients import reset
from support.processes import blocked_in
from support.scripts import TCP, Notes, Start, hold, launch, noted, rest

Run = Callable[..., Load]

pytestmark = pytest.mark.timeout(90)

UNIX = 'str(RUN / "s")'

# A pool of workers with two threads, whose handler waits for a line. `CLASS`, `HANDLER` and `SETTINGS` are bodies.
POOL = """
from prefork.workers.handlers.threaded import ThreadWorker
from work import Work

class Patient(ThreadWorker):
    CLASS

class Lines(Handler):
    HANDLER

    def handle(self):
        note("handled")
        super().handle()

BEFORE

class Pool(BASE):
    worker_class = Patient
    workers = 1
    threads = 2
    SETTINGS

with Pool(ADDRESS, Lines) as server:
    server.serve_forever()
"""
LINE = 'has_request = staticmethod(lambda data: b"\\n" in data)'
NONE = "PATIENCE = 30.0"
SHORT = "PATIENCE = 0.6"


def pool(
    start: Start,
    *settings: str,
    worker: str = NONE,
    handler: str = LINE,
    base: str = "prefork.PreforkTCPServer",
    address: str = TCP,
    before: str = "",
    **options: Any,
) -> Program:
    body = (
        POOL.replace("CLASS", worker)
        .replace("HANDLER", handler)
        .replace("BEFORE", before)
        .replace("BASE", base)
        .replace("SETTINGS", "\n    ".join(settings))
        .replace("ADDRESS", address)
    )
    return launch(start, body, **options).ready()


def unix(start: Start, *settings: str, **options: Any) -> Program:
    return pool(start, *settings, base="prefork.PreforkUnixStreamServer", address=UNIX, **options)


class Slow:
    """Clients of a worker that have sent a part of their request, and that it has accepted; `beside` other sockets."""

    def __init__(
        self, program: Program, worker: int, stack: ExitStack, number: int, part: bytes = b"slow", beside: int = 1
    ) -> None:
        self.socks = [stack.enter_context(dial(program.address, 20)) for _ in range(number)]
        for index, sock in enumerate(self.socks):
            if part:
                sock.sendall(part + b"-%d" % index)
        until(lambda: descriptors(worker)["socket"] == beside + number, 5, f"{number} are accepted")

    def finish(self) -> list[bytes]:
        for sock in self.socks:
            sock.sendall(b"\n")
        return [rest(sock) for sock in self.socks]


def answers(worker: int, number: int, name: bytes = b"slow") -> list[bytes]:
    return [b"%d:%s-%d:done\n" % (worker, name, index) for index in range(number)]


def ended(sock: socket.socket) -> bytes:
    """All that comes until the end of the stream, which may be a reset."""
    try:
        return rest(sock)
    except ConnectionResetError:
        return b"reset"


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
        "OptionError: RequestHandlerClass: Lines.has_request is asked before there is a handler; make it" in program.log
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
        program.wait_for(r"ERROR: worker 0: Lines.has_request\(\); the handler is to see to it")
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


# -- bounds ----------------------------------------------------------------------------------------


def test_patience(start: Start, notes: Notes) -> None:
    """Who says nothing, stops midway, or sends byte after byte without an end is closed when its time is over, by the
    server's own shutdown_request(); no handler has seen it, and nobody else is harmed."""
    settings = [
        "def shutdown_request(self, request):",
        "    note('shutdown')",
        "    super().shutdown_request(request)",
    ]
    program = pool(start, *settings, worker=SHORT)
    (worker,) = program.wait_ready(1)
    with ExitStack() as stack:
        silent, half, dripping = (
            Slow(program, worker, stack, 1, part, beside).socks[0]
            for beside, part in enumerate((b"", b"half", b"drip"), 1)
        )

        def drips() -> bool:
            try:
                dripping.send(b"x")
            except ConnectionError:
                return True
            assert ask(program.address).pid == worker
            return False

        until(drips, 5, "it is closed", every=0.05)
        assert (ended(silent), ended(half)) in ((b"", b""), (b"", b"reset"))
    assert len(notes("shutdown")) == len(notes("handled")) + 3
    ask(program.address)
    program.finish()


def test_more_than_may_wait(start: Start) -> None:
    """At `max_connections` who has waited longest makes room, and who is not slow is served however many are slow."""
    program = pool(start, "max_connections = 5")
    (worker,) = program.wait_ready(1)
    with ExitStack() as stack:
        first = [stack.enter_context(dial(program.address)) for _ in range(5)]
        until(lambda: descriptors(worker)["socket"] == 6, 5, "they wait")
        ask(program.address)
        elapse(1.1)  # by then it is not a moment that they have waited
        later = []
        for sock in first:
            later.append(stack.enter_context(dial(program.address)))
            assert ended(sock) == b""
        assert ask(program.address).pid == worker
        for sock in later:
            sock.sendall(b"x\n")
            assert rest(sock) == b"%d:x:done\n" % worker
    program.finish()


def test_many_that_come_at_once(start: Start) -> None:
    """A crowd that connects first and sends then is served to the last one, though fewer may wait."""
    program = pool(start, "max_connections = 5")
    (worker,) = program.wait_ready(1)
    with ExitStack() as stack:
        crowd = [stack.enter_context(dial(program.address, 20)) for _ in range(60)]
        for sock in crowd:
            sock.sendall(b"x\n")
        assert [rest(sock) for sock in crowd] == [b"%d:x:done\n" % worker] * 60
    program.finish()


def test_a_full_file_table(start: Start) -> None:
    """EMFILE at accept: those that have waited longest make room, and the worker does not spin meanwhile."""
    worker = """
    def setup(self):
        import resource
        used = len(os.listdir("/proc/self/fd"))
        resource.setrlimit(resource.RLIMIT_NOFILE, (used + 6, used + 6))
"""
    program = pool(start, worker=worker)
    (pid,) = program.wait_ready(1)
    with ExitStack() as stack:
        crowd = [stack.enter_context(dial(program.address, 20)) for _ in range(12)]
        program.wait_for("WARNING: worker 0 cannot accept: Too many open files")
        assert ask(program.address, timeout=10).pid == pid
        spent = os_times(pid)
        elapse(1.0)
        assert (os_times(pid) - spent) / os.sysconf("SC_CLK_TCK") < 0.3
        assert ended(crowd[0]) == b""
    ask(program.address)
    program.finish()


def os_times(pid: int) -> int:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return int(fields[11]) + int(fields[12])


# -- who gets what ---------------------------------------------------------------------------------


def test_each_worker_has_its_turn(start: Start) -> None:
    """Slow clients, and fast ones beside them, are spread evenly over the workers."""
    program = pool(start, "workers = 4")
    workers = program.wait_ready(4)
    # A worker is ready before its threads are, and 40 clients come within 25 ms.
    until(lambda: all(map(polls, workers)), what="a thread of each worker waits for clients")
    with ExitStack() as stack:
        slow: list[socket.socket] = []

        def held() -> list[int]:
            return [descriptors(pid)["socket"] - 1 for pid in workers]

        for number in range(1, 41):
            slow.append(stack.enter_context(dial(program.address, 20)))
            slow[-1].sendall(b"slow")
            until(lambda: sum(held()) == number, 5, "it waits", every=0)  # noqa: B023  # called at once
        assert jain(held()) > 0.95, held()
        served = Counter(ask(program.address).pid for _ in range(200))
        assert jain(list(served.values())) > 0.95 and len(served) == 4, served
        for sock in slow:
            sock.sendall(b"\n")
        assert all(rest(sock).endswith(b":slow:done\n") for sock in slow)
    program.finish()


def polls(worker: int) -> bool:
    return any("epoll" in blocked_in(int(thread)) for thread in os.listdir(f"/proc/{worker}/task"))


def jain(counts: list[int]) -> float:
    return sum(counts) ** 2 / (len(counts) * sum(count**2 for count in counts))


def test_a_busy_worker_leaves_new_clients_to_its_siblings(start: Start, notes: Notes) -> None:
    """Where all threads of a worker are busy, another takes whoever comes."""
    program = pool(start, "workers = 2")
    program.wait_ready(2)
    with ExitStack() as stack:
        for number in range(3):
            hold(program.address, stack, "gate go", f"c{number}")
            noted(notes, "begun", number + 1)
        for _ in range(8):
            ask(program.address)
        program.write("go", "")
    program.finish()


def test_recycling_counts_requests(start: Start) -> None:
    """Who waits is no request: max_requests counts what was served, and those that wait then are answered."""
    program = pool(start, "max_requests = 5", "max_requests_jitter = 0")
    (worker,) = program.wait_ready(1)
    with ExitStack() as stack:
        slow = Slow(program, worker, stack, 20)
        assert {ask(program.address).pid for _ in range(4)} == {worker}
        assert children(program.pid) == [worker]
        ask(program.address)
        program.wait_children(2)
        assert slow.finish() == answers(worker, 20)
    program.wait_ready(1, without=[worker])
    program.finish()


# -- the end ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("begin", [pool, unix])
@pytest.mark.parametrize("order", ["stop", "reload", "retire"])
def test_who_waits_has_a_last_word(start: Start, begin: Callable[..., Program], order: str) -> None:
    """A worker that leaves answers requests that become whole soon, closes the others in time, and is not killed."""
    program = begin(start, worker="LAST_WORD = 1.5", allow=[])
    (worker,) = program.wait_ready(1)
    with ExitStack() as stack:
        never = Slow(program, worker, stack, 3, b"never")
        silent = Slow(program, worker, stack, 3, b"", beside=4)
        slow = Slow(program, worker, stack, 10, beside=7)
        number, pid = {
            "stop": (signal.SIGTERM, None),
            "reload": (signal.SIGHUP, None),
            "retire": (signal.SIGTERM, worker),
        }[order]
        program.send(number, pid)
        if order == "stop":
            program.wait_for(patterns.STOPPING)
        else:
            program.wait_ready(2)
        assert slow.finish() == answers(worker, 10)
        assert worker in children(program.pid)
        for sock in [*never.socks, *silent.socks]:
            assert ended(sock) in (b"", b"reset")
        if order != "stop":
            program.wait_ready(1, without=[worker])
            ask(program.address)
    if order == "stop":
        assert program.wait_exit().code == 0
    assert "killed" not in program.log and "graceful" not in program.log
    program.finish()


def test_nobody_waits_and_the_stop_is_at_once(start: Start) -> None:
    """The last word is for those who wait: a pool without any stops as it always did."""
    program = pool(start, "workers = 2")
    program.wait_ready(2)
    ask(program.address)
    assert program.stop().seconds < 1.5
    program.finish()


@pytest.mark.parametrize("order", ["retire", "stop"])
def test_told_to_leave_before_it_takes(start: Start, notes: Notes, order: str) -> None:
    """TERM between ready and the first accept: the worker leaves as if it had served, and a stop takes the queue."""
    worker = """
    def run(self):
        if self.generation == 1 and self.slot == 0:
            note("begun run")
            pass_gate("go")
        super().run()
"""
    program = pool(start, worker=worker)
    (first,) = program.wait_ready(1)
    noted(notes, "begun")
    with ExitStack() as stack:
        if order == "stop":
            queued = [hold(program.address, stack, "", f"q{number}") for number in range(5)]
            half = stack.enter_context(dial(program.address))
            half.sendall(b"half")
            program.send(signal.SIGTERM)
            program.wait_for(patterns.STOPPING)
            elapse(0.3)
            program.write("go", "")
            assert [rest(sock) for sock in queued] == [b"%d:q%d:done\n" % (first, number) for number in range(5)]
            assert ended(half) in (b"", b"reset")
            assert program.wait_exit().code == 0
        else:
            program.send(signal.SIGTERM, first)
            program.wait_ready(2)
            program.write("go", "")
            program.wait_ready(1, without=[first])
            ask(program.address)
    program.wait_for(patterns.LEFT)
    program.finish()


def test_a_short_graceful_timeout(start: Start) -> None:
    """Who waits is closed within graceful_timeout, so that nobody is killed for it."""
    program = pool(start, "graceful_timeout = 1.0")
    (worker,) = program.wait_ready(1)
    with ExitStack() as stack:
        Slow(program, worker, stack, 10)
        assert program.stop().seconds < 3
    assert "graceful" not in program.log
    program.finish()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGQUIT])
def test_fast_stop(start: Start, number: int) -> None:
    """A fast stop waits for nobody, also where a slow one has begun."""
    program = pool(start, "workers = 2", worker="LAST_WORD = 10.0")
    workers = program.wait_ready(2)
    with ExitStack() as stack:
        socks = [stack.enter_context(dial(program.address)) for _ in range(10)]
        until(lambda: sum(descriptors(pid)["socket"] for pid in workers) == 12, 5, "they wait")
        program.send(signal.SIGTERM)
        program.wait_for(patterns.STOPPING)
        assert program.stop(number).seconds < 1.5
        assert [ended(sock) for sock in socks] == [b""] * 10
    program.finish()


def test_whole_requests_wait_for_a_thread(start: Start, notes: Notes) -> None:
    """What has become whole while all threads are busy is served, though time passes and the worker is to leave."""
    program = pool(start, worker="PATIENCE = 0.6\n    LAST_WORD = 0.2")
    (worker,) = program.wait_ready(1)
    with ExitStack() as stack:
        slow = Slow(program, worker, stack, 10)
        half = Slow(program, worker, stack, 1, b"half", beside=11).socks[0]
        held = [hold(program.address, stack, "gate go", f"c{number}") for number in range(2)]
        noted(notes, "begun", 2)
        for sock in slow.socks:
            sock.sendall(b"\n")
        half.shutdown(socket.SHUT_WR)
        program.send(signal.SIGTERM, worker)
        program.wait_ready(2)
        elapse(0.7)  # all deadlines are over
        program.write("go", "")
        assert [rest(sock) for sock in slow.socks] == answers(worker, 10)
        assert rest(half) == b"%d:half-0:done\n" % worker
        assert all(rest(sock).startswith(b"%d:c" % worker) for sock in held)
    program.wait_ready(1, without=[worker])
    program.finish()


def test_all_threads_hang(start: Start) -> None:
    """Where every thread is past its deadline the worker is replaced, and those that wait have their last word."""
    before = """
def answer(self, order):
    if order == "hang":
        note("begun hang")
        threading.Event().wait()
    return perform(order)

Lines.answer = answer
"""
    program = pool(start, "request_timeout = 0.8", before=before, allow=[patterns.FAULT])
    (worker,) = program.wait_ready(1)
    with ExitStack() as stack:
        slow = Slow(program, worker, stack, 5)
        hung = [hold(program.address, stack, "hang") for _ in range(2)]
        program.wait_ready(2)
        assert slow.finish() == answers(worker, 5)
        assert [ended(sock) for sock in hung] == [b"", b""]
    program.wait_ready(1, without=[worker])
    program.finish()


def test_a_listener_that_the_program_closes(start: Start) -> None:
    """A handler that closes the listener of its worker costs that worker, and nobody who waits there."""
    before = """
def answer(self, order):
    if order == "close":
        self.server.socket.close()
        return "closed"
    return perform(order)

Lines.answer = answer
"""
    program = pool(start, "workers = 2", before=before, allow=[patterns.TRACEBACK])
    workers = program.wait_ready(2)
    with ExitStack() as stack:
        slow = [stack.enter_context(dial(program.address)) for _ in range(10)]
        for sock in slow:
            sock.sendall(b"x")
        until(lambda: sum(descriptors(pid)["socket"] for pid in workers) == 12, 5, "they wait")
        victim = ask(program.address, "close").pid
        until(lambda: ask(program.address) and children(program.pid) != workers, 5, "it is being replaced")
        for sock in slow:
            sock.sendall(b"\n")
        assert all(rest(sock).endswith(b":x:done\n") for sock in slow)
    until(lambda: victim not in children(program.pid), 5, "it leaves")
    program.wait_ready(2)
    program.wait_for("OSError: .*Bad file descriptor")
    program.finish()


# -- nothing is lost -------------------------------------------------------------------------------

LEDGER = """
from work import Work

class Lines(Work):
    has_request = staticmethod(lambda data: b"\\n" in data)

class Pool(SERVER):
    worker_class = "thread"
    workers = 3
    threads = 4
    SETTINGS

with Pool(ADDRESS, Lines) as server:
    server.serve_forever()
"""


def busy_pool(start: Start, kind: str, *settings: str, address: Address | None = None, **options: Any) -> Program:
    server = {"tcp": "prefork.PreforkTCPServer", "unix": "prefork.PreforkUnixStreamServer"}[kind]
    where = {"tcp": f'("127.0.0.1", {address.port if address else 0})', "unix": UNIX}[kind]
    text = LEDGER.replace("SERVER", server).replace("ADDRESS", where).replace("SETTINGS", "\n    ".join(settings))
    return launch(start, text, **options).ready()


class Dripping:
    """Slow clients beside a load: they come, send half a request, and are replaced when they are closed."""

    def __init__(self, address: Address, stack: ExitStack, number: int = 20) -> None:
        self.address, self.stack = address, stack
        self.socks: list[socket.socket] = []
        self.number, self.begun = number, 0

    def drip(self) -> None:
        kept = []
        for sock in self.socks:
            try:
                sock.send(b"x")
                kept.append(sock)
            except OSError:
                sock.close()
        self.socks = kept
        while len(self.socks) < self.number:
            try:
                sock = self.stack.enter_context(dial(self.address, 0.25))
            except OSError:
                break  # nobody listens now
            self.begun += 1
            self.socks.append(sock)
            with suppress(OSError):
                sock.send(b"slow-%d-" % self.begun)


@pytest.mark.parametrize("kind", ["tcp", "unix"])
def test_stops_lose_nothing(start: Start, ledger: Ledger, load: Run, kind: str) -> None:
    """16 clients that never stop and 20 slow ones, a pool that is stopped and started on one address: 0 reset, 0
    unanswered."""
    program = busy_pool(start, kind, "graceful_timeout = 1.0")
    address = program.address
    clients = load(address, clients=16)
    with ExitStack() as stack:
        slow = Dripping(address, stack)
        for turn in range(8):
            if turn:
                program = busy_pool(start, kind, "graceful_timeout = 1.0", address=address, directory=program.directory)
            slow.drip()
            clients.more(200)
            slow.drip()
            assert program.stop().code == 0
            program.finish()
        tally = clients.stop()
    assert not account(tally, ledger)
    assert tally.lost == 0, tally


@pytest.mark.parametrize("kind", ["tcp", "unix"])
def test_changes_lose_nothing(start: Start, ledger: Ledger, load: Run, kind: str) -> None:
    """Reloads, retirements of single workers and recycling under 16 fast and 20 slow clients: no request fails, and
    none is served twice."""
    program = busy_pool(start, kind, "graceful_timeout = 1.0", "max_requests = 400", "max_requests_jitter = 100")
    clients = load(program.address, clients=16)
    with ExitStack() as stack:
        slow = Dripping(program.address, stack)
        for _ in range(5):
            slow.drip()
            clients.more(100)
            mark = program.mark
            program.send(signal.SIGHUP)
            program.wait_for(patterns.RELOADED, 20, since=mark)
        for turn in range(20):
            slow.drip()
            clients.more(20)
            pids = until(lambda: children(program.pid), 5, "workers")
            try:
                program.send(signal.SIGTERM, pids[turn % len(pids)])
            except ProcessLookupError:  # it was being recycled
                continue
        clients.more(1000)
        tally = clients.stop()
        program.finish()
    assert not account(tally, ledger)
    assert (tally.lost, tally.refused) == (0, 0), tally
    said = " ".join(match[4] for match in program.found(patterns.LEFT))
    assert "recycled" in said and "generation was replaced" in said and "signal from outside" in said
    assert "graceful" not in said

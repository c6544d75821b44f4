"""Handlers that say when a request is there: nothing is lost when a worker leaves or the pool changes."""

import signal
import socket
from collections.abc import Callable
from contextlib import ExitStack, suppress
from typing import Any

import pytest

from support import Address, Ledger, Load, Program, account, ask, children, descriptors, dial, elapse, patterns, until
from support.filters import UNIX, Slow, answers, ended, pool, unix
from support.scripts import Notes, Start, hold, launch, noted, rest

Run = Callable[..., Load]
pytestmark = pytest.mark.timeout(90)


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
    assert "killed" not in program.log and "graceful_timeout" not in program.log
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
    assert "graceful_timeout" not in program.log
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
from prefork.workers.handlers.threaded import ThreadWorker
from work import Work

class Brief(ThreadWorker):
    LAST_WORD = 0.2

class Lines(Work):
    has_request = staticmethod(lambda data: b"\\n" in data)

class Pool(SERVER):
    worker_class = Brief
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
    program = busy_pool(start, kind, "graceful_timeout = 1.0", "max_requests = 800", "max_requests_jitter = 200")
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
        clients.more(3000)
        tally = clients.stop()
        program.finish()
    assert not account(tally, ledger)
    assert (tally.lost, tally.refused) == (0, 0), tally
    said = " ".join(match[4] for match in program.found(patterns.LEFT))
    assert "recycled" in said and "a reload has replaced" in said and "signal from outside" in said
    assert "graceful_timeout" not in said

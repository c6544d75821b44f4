"""The worker with threads: each request has a deadline, and what ends a worker lets the other requests finish."""

import signal
from contextlib import ExitStack

import pytest

from support import Ledger, ask, children, elapse, patterns, processes, until
from support.reporting import reports
from support.scripts import Notes, Start, hold, noted, rest
from support.threads import STOCK, pool

pytestmark = pytest.mark.timeout(90)
MIXED = "Reporting, socketserver.ThreadingMixIn, socketserver.TCPServer"


# -- deadlines -------------------------------------------------------------------------------------

LATE = ("request_timeout = 0.6", "graceful_timeout = 20", "threads = 4")


@pytest.mark.parametrize("bases", [STOCK, MIXED], ids=["thread", "mixin"])
def test_one_hangs_and_the_others_finish(start: Start, notes: Notes, bases: str) -> None:
    """A request in a thread that is past its deadline costs itself alone: the worker is replaced at once, its other
    requests finish, it leaves as soon as only the hung one is left, and its report shows where that is."""
    program = pool(start, *LATE, bases=bases)
    (worker,) = program.wait_ready(1)
    with ExitStack() as stack:
        hung = hold(program.address, stack, "hang")
        noted(notes, "begun")
        held = [hold(program.address, stack, "extend gate go", f"c{number}") for number in range(2)]
        noted(notes, "begun", 3)
        other = until(lambda: [pid for pid in children(program.pid) if pid != worker], 3, "it is replaced")
        until(lambda: patterns.TITLE_READY.search(processes.title(other[0])), 3, "the replacement is ready")
        until(lambda: {ask(program.address).pid for _ in range(5)} == set(other), 3, "it takes nothing new")
        elapse(0.3)
        assert worker in children(program.pid) and not notes("exit")
        program.write("go", "")
        for number, sock in enumerate(held):
            assert rest(sock) == f"{worker}:c{number}:done\n".encode()
        assert rest(hung) == b""
    (report,) = reports(notes)
    assert (report["pid"], report["reason"], report["status"]) == (worker, "REQUEST_TIMEOUT", 0)
    assert report["requests"] >= 2
    assert report["serving"] and report["busy_for"] > 0.6
    assert "in hang" in report["detail"] and "in pass_gate" in report["detail"], report["detail"]
    assert program.wait_ready(1) == other
    program.finish(allow=[patterns.FAULT])


@pytest.mark.parametrize("bases", [STOCK, MIXED], ids=["thread", "mixin"])
def test_all_hang(start: Start, notes: Notes, bases: str) -> None:
    """Where every thread hangs the worker leaves at once, without graceful_timeout, and a queued client is served by
    its successor."""
    program = pool(start, *LATE[:2], "threads = 2", bases=bases)
    (worker,) = program.wait_ready(1)
    with ExitStack() as stack:
        hung = [hold(program.address, stack, "hang") for _ in range(2)]
        noted(notes, "begun", 2)
        reply = ask(program.address)
        assert bases == MIXED or reply.pid != worker
        assert [rest(one) for one in hung] == [b"", b""]
    (report,) = reports(notes)
    assert (report["pid"], report["reason"]) == (worker, "REQUEST_TIMEOUT")
    program.wait_ready(1, without=[worker])
    program.finish(allow=[patterns.FAULT])


@pytest.mark.parametrize("bases", [STOCK, MIXED], ids=["thread", "mixin"])
def test_a_thread_that_holds_the_interpreter(start: Start, notes: Notes, bases: str) -> None:
    """A regular expression that backtracks for ever lets no signal handler run: the worker is killed for it, with the
    stack in its report."""
    program = pool(start, *LATE, bases=bases)
    (worker,) = program.wait_ready(1)
    with ExitStack() as stack:
        assert rest(hold(program.address, stack, "regex")) == b""
    (report,) = reports(notes)
    assert (report["pid"], report["reason"]) == (worker, "REQUEST_TIMEOUT")
    assert report["status"] in (-signal.SIGABRT, -signal.SIGKILL)
    assert report["busy_for"] < 5
    if report["status"] == -signal.SIGABRT:  # not on a machine too busy for its stacks
        assert "in hang" in report["detail"]
    program.wait_ready(1, without=[worker])
    ask(program.address)
    program.finish(allow=[patterns.FAULT])


@pytest.mark.parametrize("bases", [STOCK, MIXED], ids=["thread", "mixin"])
def test_an_extended_deadline(start: Start, notes: Notes, bases: str) -> None:
    """A handler that extends its deadline in time lives on, and so does its worker; the deadlines of others hold."""
    program = pool(start, *LATE, bases=bases)
    (worker,) = program.wait_ready(1)
    with ExitStack() as stack:
        long = hold(program.address, stack, "extend gate go")
        noted(notes, "begun")
        for _ in range(4):
            assert ask(program.address).pid == worker
            elapse(0.25)
        assert not notes("exit")
        hung = hold(program.address, stack, "hang", "hung")
        noted(notes, "begun", 2)
        program.wait_ready(2)
        until(lambda: worker not in {ask(program.address).pid for _ in range(5)}, 3, "it takes nothing new")
        program.write("go", "")
        assert rest(long) == f"{worker}:held:done\n".encode()
        assert rest(hung) == b""
    assert [report["pid"] for report in reports(notes)] == [worker]
    program.finish(allow=[patterns.FAULT])


def test_the_pool_stops_while_one_hangs(start: Start, notes: Notes, ledger: Ledger) -> None:
    """A request that hangs is no reason for a stop to lose the queue, or to take until graceful_timeout."""
    program = pool(start, *LATE[:2], "threads = 2")
    with ExitStack() as stack:
        hung = [hold(program.address, stack, "hang") for _ in range(2)]
        noted(notes, "begun", 2)
        queued = [hold(program.address, stack, "", f"q{number}") for number in range(10)]
        program.send(signal.SIGTERM)
        assert all(rest(one).endswith(b":done\n") for one in queued)
        assert [rest(one) for one in hung] == [b"", b""]
    assert program.wait_exit(5).code == 0
    program.finish(allow=[patterns.FAULT])


# -- what ends a worker ----------------------------------------------------------------------------


@pytest.mark.parametrize(("order", "status"), [("leave 3", 3), ("leave 0", 0), ("interrupt", 1)])
def test_exit_in_a_handler(start: Start, notes: Notes, order: str, status: int) -> None:
    """SystemExit and KeyboardInterrupt end the worker, as they do in one without threads; what its other threads have
    in progress is finished first, by which time it is replaced."""
    program = pool(start, allow=[patterns.TRACEBACK, r"\S+KeyboardInterrupt|KeyboardInterrupt"])
    (worker,) = program.wait_ready(1)
    with ExitStack() as stack:
        held = hold(program.address, stack, "gate go")
        noted(notes, "begun")
        assert rest(hold(program.address, stack, order)) == b""
        program.wait_ready(2)
        until(lambda: worker not in {ask(program.address).pid for _ in range(5)}, 3, "it takes nothing new")
        program.write("go", "")
        assert rest(held) == f"{worker}:held:done\n".encode()
    (report,) = reports(notes)
    assert (report["pid"], report["reason"], report["status"]) == (worker, "EXITED", status)
    program.wait_ready(1, without=[worker])
    program.finish()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGQUIT])
def test_fast_stop(start: Start, notes: Notes, number: int) -> None:
    """A fast stop does not wait for busy threads, nor for idle ones."""
    program = pool(start, "workers = 2", "threads = 3")
    program.wait_ready(2)
    with ExitStack() as stack:
        hold(program.address, stack, "gate go")
        noted(notes, "begun")
        assert program.stop(number).seconds < 2
    program.finish()


def test_a_listener_that_the_program_closes(start: Start, notes: Notes) -> None:
    """A handler that closes the listener of its worker costs that worker; the pool serves on."""
    before = """
def answer(self, order):
    if order == "close":
        self.server.socket.close()
        return "closed"
    return perform(order)

Hangs.answer = answer
"""
    program = pool(start, "workers = 2", "threads = 3", before=before, allow=[patterns.TRACEBACK])
    workers = program.wait_ready(2)
    victim = ask(program.address, "close").pid
    until(lambda: ask(program.address) and victim not in children(program.pid), 5, "it is replaced")
    assert victim in workers and set(program.wait_ready(2)) & set(workers)
    report = reports(notes)[0]
    assert (report["pid"], report["reason"], report["status"]) == (victim, "EXITED", 1)
    assert "Bad file descriptor" in report["detail"]
    program.finish()

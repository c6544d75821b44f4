"""Invariants 1, 2, 6 and 8 of the design: dead masters, dead workers, hangs and crash loops."""

import contextlib
import os
import signal
import statistics
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import pytest

from support import Ledger, Times, account, ask, dial, elapse, patterns, state, until, within
from support.invariants import POLITE, TCP, Run, Start, in_hand, wait_busy

pytestmark = pytest.mark.timeout(120)


# -- 1: a dead master ------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", POLITE)
def test_invariant_01_killed_master_leaves_nothing(
    start: Start, ledger: Ledger, kind: str, record_property: Callable[[str, object], None]
) -> None:
    """Kill -9 of the master, workers idle, busy, in C and stopped: no process is left, a new start binds at once."""
    program = start("pool.py", POLITE[kind], "--workers", 7).ready()
    address = program.address
    with ExitStack() as stack:
        in_hand(address, stack, "sleep 60", "busy", "spin", "spin-free", "stubborn")
        wait_busy(ledger, 5)
        idle = sorted(set(program.children()) - ledger.pids())
        assert len(idle) == 2
        program.send(signal.SIGSTOP, idle[0])
        until(lambda: state(idle[0]) == "T", what="the worker is stopped")
        begun = time.monotonic()
        program.send(signal.SIGKILL)
        until(lambda: not program.remaining(), 2.0, "no process is left")
        record_property("seconds", round(time.monotonic() - begun, 4))
        assert program.wait_exit().code == -signal.SIGKILL
        left = os.listdir(program.run)
        again = start("pool.py", address, "--workers", 2, directory=program.directory).ready()
        ask(address)
    if kind == "tcp":
        assert not left
    again.finish()
    program.finish(code=-signal.SIGKILL)


def test_invariant_01_master_killed_while_workers_boot(start: Start, ledger: Ledger, trouble: Path) -> None:
    """A worker that hangs in its setup, or that is just being forked, dies with the master too."""
    program = start("pool.py", TCP, "--workers", 4).ready()
    trouble.write_text("spin")
    program.send(signal.SIGKILL, program.children()[0])
    program.send(signal.SIGHUP)
    until(lambda: len(program.children()) >= 5, 5, "a worker boots for ever")
    program.send(signal.SIGKILL)
    until(lambda: not program.remaining(), 2.0, "no process is left")
    program.wait_exit()
    program.finish(code=-signal.SIGKILL)


# -- 2: dead workers -------------------------------------------------------------------------------


def test_invariant_02_killed_workers_cost_only_their_requests(start: Start, ledger: Ledger, load: Run) -> None:
    """100 rounds of kill -9 under load, of one or of all: each killed worker loses at most the request in its hand."""
    program = start("pool.py", TCP, "--workers", 4).ready()
    killed = []
    program.wait_ready(4)
    with program.flat():
        clients = load(program.address, clients=8)
        clients.more(100)
        for round_ in range(100):
            victims = program.wait_ready(4)
            victims = victims if round_ % 4 == 3 else victims[round_ % 4 : round_ % 4 + 1]
            ledger.wait_for_all(victims)
            program.kill_workers(*victims)
            killed += victims
            clients.more(20)
        program.wait_ready(4, without=killed)
        tally = clients.stop()
    assert not account(tally, ledger, killed)
    assert not tally.refused
    program.finish()


def test_invariant_02_killed_pool_is_back_at_once(
    start: Start, ledger: Ledger, record_property: Callable[[str, object], None]
) -> None:
    """After kill -9 of one worker, or of all four, the next client is answered within 50 ms, 100 times."""
    program = start("pool.py", TCP, "--workers", 4).ready()
    address = program.address
    times = Times()
    program.wait_ready(4)
    with program.flat():
        for round_ in range(100):
            pids = program.wait_ready(4)
            victims = pids if round_ % 2 else pids[:1]
            begun = time.monotonic()
            program.kill_workers(*victims)
            if len(victims) == 4:
                ask(address)
            else:
                program.wait_ready(4, without=victims)
            times.append(time.monotonic() - begun)
        program.wait_ready(4)
    record_property("times", str(times))
    times.check(0.05, 0.5)
    program.finish()


# -- 6: hangs --------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", ["sleep 60", "busy"])
def test_invariant_06_a_hang_in_python_is_interrupted(
    start: Start, ledger: Ledger, notes: Callable[[str], list[str]], order: str
) -> None:
    """At most 0.25 s past its deadline RequestTimeout is raised in the handler; the worker lives and serves on."""
    program = start("pool.py", TCP, "--workers", 1, "--request-timeout", 0.5, allow=[patterns.HANDLER_ERROR]).ready()
    (pid,) = program.wait_ready(1)
    times = []
    for _ in range(3):
        with dial(program.address) as connection:
            begun = time.monotonic()
            connection.sendall(f"hold {order}\n".encode())
            assert connection.recv(100) == b""
            times.append(time.monotonic() - begun)
    assert min(times) >= 0.49 and statistics.median(times) <= 0.75 and max(times) <= 1.5, times
    assert ask(program.address, "slices 0.2").pid == pid
    assert all(line.endswith("RequestTimeout") for line in notes("raised")) and len(notes("raised")) == 3
    program.finish()


@pytest.mark.parametrize("order", ["spin", "spin-free", "stubborn"])
def test_invariant_06_a_deaf_worker_is_killed(start: Start, ledger: Ledger, order: str) -> None:
    """A worker that does not notice the interrupt is killed soon after, with its stack in the log, and replaced."""
    program = start("pool.py", TCP, "--workers", 1, "--request-timeout", 0.5, allow=[patterns.ANYTHING]).ready()
    (pid,) = program.wait_ready(1)
    with dial(program.address) as connection:
        connection.settimeout(10)
        begun = time.monotonic()
        connection.sendall(f"hold {order}\n".encode())
        with contextlib.suppress(ConnectionResetError):
            assert connection.recv(100) == b""
        seconds = time.monotonic() - begun
    # `stubborn` does notice, and goes on: it has had its time for clean-up.
    assert seconds >= 0.49
    within(seconds, 3.5 if order == "stubborn" else 1.0)
    program.wait_ready(1, timeout=1.0, without=[pid])
    match = program.wait_for(patterns.LEFT)
    assert int(match[1]) == pid
    until(lambda: "work.py" in program.log and "in perform" in program.log, 2, "the stack is in the log")
    program.finish()


@pytest.mark.parametrize("fault", ["hang", "spin"])
def test_invariant_06_a_hang_during_boot_is_found(start: Start, ledger: Ledger, trouble: Path, fault: str) -> None:
    """A worker that hangs in its setup is killed at most 0.25 s past boot_timeout and replaced; the others serve on."""
    program = start("pool.py", TCP, "--workers", 2, "--boot-timeout", 0.5, allow=[patterns.ANYTHING]).ready()
    first, second = program.wait_ready(2)
    trouble.write_text(fault)
    program.send(signal.SIGKILL, first)
    begun = time.monotonic()
    program.wait_for(patterns.LEFT, number=2)
    seconds = time.monotonic() - begun
    assert seconds >= 0.5
    within(seconds, 0.9)
    assert ask(program.address).pid == second
    trouble.unlink()
    program.wait_ready(2, timeout=3)
    program.finish()


@pytest.mark.parametrize("who", ["master", "everybody"])
@pytest.mark.parametrize("seconds", [3, pytest.param(10, marks=pytest.mark.soak)])
def test_invariant_06_no_false_kill_after_a_suspend(start: Start, ledger: Ledger, who: str, seconds: float) -> None:
    """After the master, or the whole machine, was stopped for longer than every timeout, nobody is killed for that."""
    program = start("pool.py", TCP, "--workers", 3, "--request-timeout", 1, "--boot-timeout", 1).ready()
    workers = program.wait_ready(3)
    with ExitStack() as stack:
        connections = in_hand(program.address, stack, "slices 0.8", "slices 0.8")
        wait_busy(ledger, 2)
        stopped = [program.pid] if who == "master" else [program.pid, *workers]
        for pid in stopped:
            program.send(signal.SIGSTOP, pid)
        if who == "master":
            assert ask(program.address).pid in workers
        elapse(seconds)
        for pid in stopped:
            program.send(signal.SIGCONT, pid)
        for connection in connections:
            connection.settimeout(5)
            assert b"".join(iter(lambda: connection.recv(100), b"")).endswith(b":hold\n")  # noqa: B023
    assert program.wait_ready(3) == workers
    assert not program.found(patterns.LEFT)
    program.finish()


# -- 8: crash loops --------------------------------------------------------------------------------


def test_invariant_08_a_crash_loop_is_slow(start: Start, ledger: Ledger, tmp_path: Path) -> None:
    """Workers that die at every boot: at most one boot a second a slot, a bounded log; mended, the pool recovers.

    Three pools at once, since it takes ten seconds: dying in setup by an exception, by an exit, and right after ready.
    """
    programs = {}
    for fault in ("raise", "exit", "run"):
        env = {"PREFORK_TROUBLE": str(tmp_path / fault), "PREFORK_BOOTS": str(tmp_path / f"boots-{fault}")}
        program = start("pool.py", TCP, "--workers", 2, env=env, allow=[patterns.ANYTHING]).ready()
        workers = program.wait_ready(2)
        (tmp_path / fault).write_text(fault)
        programs[fault] = program, program.mark
        program.kill_workers(*workers)
    elapse(10)
    for fault, (program, mark) in programs.items():
        number = len((tmp_path / f"boots-{fault}").read_text().splitlines()) - 2
        assert 2 <= number <= 2 * 10, f"{number} boots of two slots in 10 s: {fault}"
        assert program.mark - mark <= 2 * 10 * 4096
        assert program.running
        (tmp_path / fault).unlink()
    for program, _ in programs.values():
        program.wait_ready(2, timeout=12)
        ask(program.address)
        program.finish()


@pytest.mark.parametrize("fault", ["raise", "exit"])
def test_invariant_08_a_pool_that_never_boots_ends(start: Start, ledger: Ledger, trouble: Path, fault: str) -> None:
    """If no worker of the first generation is ever ready, the program ends with an error that says why."""
    trouble.write_text(fault)
    program = start("pool.py", TCP, "--workers", 2, allow=[patterns.ANYTHING])
    end = program.wait_exit(5)
    assert end.code not in (0, None)
    if fault == "raise":
        assert "ordered trouble" in program.log
    program.finish(code=end.code)

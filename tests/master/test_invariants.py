"""The invariants of the design, each by its number, with real processes, real clients and real signals.

Times that the design promises are checked on the median of several tries, with a generous worst case beside it: the
machine that runs this may be busy with something else.
"""

import contextlib
import os
import re
import resource
import signal
import socket
import stat
import statistics
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import pytest

from support import (
    Address,
    Ledger,
    Load,
    Program,
    Times,
    account,
    ask,
    dial,
    elapse,
    patterns,
    pids_serving,
    private_memory,
    queue_up,
    state,
    title,
    until,
    within,
)

Start = Callable[..., Program]
Run = Callable[..., Load]

TCP = "tcp://127.0.0.1:0"
UNIX = "unix:{run}/socket"
POLITE = {"tcp": TCP, "unix": UNIX}
EVERY = {**POLITE, "udp": "udp://127.0.0.1:0", "unixgram": "unixgram:{run}/socket"}

APP = """
from work import Work

class Handler(Work):
    version = "{version}"
"""

pytestmark = pytest.mark.timeout(120)


def in_hand(address: Address, stack: ExitStack, *orders: str) -> list[socket.socket]:
    """Connections whose orders are being obeyed, one a worker."""
    connections = []
    for order in orders:
        connection = stack.enter_context(dial(address))
        connection.sendall(f"hold {order}\n".encode())
        connections.append(connection)
    return connections


def wait_busy(ledger: Ledger, number: int) -> None:
    until(lambda: len(ledger.read().served) + len(ledger.twice) >= number, 5, f"{number} requests have begun")


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


# -- 3: changes under load -------------------------------------------------------------------------


def reload(program: Program, timeout: float = 20.0) -> None:
    """HUP, until the new generation serves and the workers of the old one are gone."""
    before, mark = program.children(), program.mark
    program.send(signal.SIGHUP)
    program.wait_for(patterns.RELOADED, timeout, since=mark)
    until(lambda: not set(before).intersection(program.children()), timeout, "the old generation is gone")


def resize(program: Program) -> None:
    for number in range(5, 8):
        program.send(signal.SIGTTIN)
        program.wait_children(number)
    for number in range(6, 3, -1):
        program.send(signal.SIGTTOU)
        program.wait_children(number)


@pytest.mark.parametrize("kind", EVERY)
def test_invariant_03_reload_and_resize_lose_nothing(start: Start, ledger: Ledger, load: Run, kind: str) -> None:
    """Reloads, and a pool that grows and shrinks, under 16 clients: every connection is answered."""
    program = start("pool.py", EVERY[kind], "--workers", 4).ready()
    program.wait_ready(4)
    with program.flat():
        clients = load(program.address, clients=16)
        for _ in range(3):
            clients.more(200)
            reload(program)
            clients.more(200)
            program.wait_ready(4)
            resize(program)
        program.wait_children(4)
        tally = clients.stop()
    assert not account(tally, ledger)
    assert (tally.lost, tally.refused) == (0, 0)
    program.finish()


@pytest.mark.parametrize("kind", EVERY)
def test_invariant_03_recycling_loses_nothing(start: Start, ledger: Ledger, load: Run, kind: str) -> None:
    """Workers that are replaced after every 50 requests or so lose none of them."""
    program = start("pool.py", EVERY[kind], "--workers", 4, "--max-requests", 50, "--max-requests-jitter", 20).ready()
    clients = load(program.address, clients=16, pause=0.001)
    until(lambda: len(ledger.pids()) >= 40, 30, "40 workers have served")
    tally = clients.stop()
    assert not account(tally, ledger)
    assert (tally.lost, tally.refused) == (0, 0)
    until(lambda: len(program.children()) == 4, 5, "four workers again")
    program.finish()


@pytest.mark.parametrize("kind", POLITE)
def test_invariant_03_stop_loses_nothing(start: Start, ledger: Ledger, load: Run, kind: str) -> None:
    """A graceful stop under 16 clients answers everybody who was connected."""
    for _ in range(3):
        program = start("pool.py", POLITE[kind], "--workers", 4).ready()
        clients = load(program.address, clients=16)
        clients.more(300)
        end = program.stop()
        tally = clients.stop()
        assert (end.code, tally.lost) == (0, 0), tally
        assert not account(tally, ledger)
        program.finish()


@pytest.mark.parametrize("kind", EVERY)
def test_invariant_03_stop_answers_the_queue(start: Start, ledger: Ledger, kind: str) -> None:
    """Whoever is in the queue when the stop is ordered is answered: here 100 clients before two stopped workers."""
    program = start("pool.py", EVERY[kind], "--workers", 2).ready()
    address = program.address
    workers = program.wait_ready(2)
    for pid in workers:
        program.send(signal.SIGSTOP, pid)
    until(lambda: [state(pid) for pid in workers] == ["T", "T"], what="the workers are stopped")
    with ExitStack() as stack:
        # A Unix datagram socket holds net.unix.max_dgram_qlen (10, or 512) and makes its senders wait.
        clients = queue_up(address, 8 if kind == "unixgram" else 100, stack)
        mark = program.mark
        program.send(signal.SIGTERM)
        program.wait_for(patterns.STOPPING, since=mark)
        for pid in workers:
            program.send(signal.SIGCONT, pid)
        for identity, sock in clients.items():
            answer = sock.recv(4096)
            assert answer.endswith(f":{identity}\n".encode()), (identity, answer)
    program.wait_exit()
    program.finish()


# -- 4: bad reloads --------------------------------------------------------------------------------


def command(*arguments: object) -> tuple[object, ...]:
    return ("prefork", "app:Handler", "-b", TCP, "-w", 2, *arguments)


def check_still_serves(program: Program, version: str) -> None:
    for _ in range(8):
        assert ask(program.address, "version").result == version


def check_reload_fails(program: Program, timeout: float = 10.0) -> None:
    before = program.children()
    mark = program.mark
    program.send(signal.SIGHUP)
    program.wait_for(patterns.RELOAD_FAILED, timeout, since=mark)
    assert set(program.wait_children(len(before))) == set(before), "the old workers were touched"


@pytest.mark.parametrize(
    ("fault", "says"),
    [
        ("def broken(:\n", "SyntaxError"),
        ("import no_such_module_at_all\n", "no_such_module_at_all"),
        ("Nothing = 1\n", "Handler"),
        ("raise SystemExit(0)\n", ""),
    ],
    ids=["syntax", "import", "name", "exit"],
)
def test_invariant_04_reload_of_a_broken_program(start: Start, ledger: Ledger, fault: str, says: str) -> None:
    """HUP with a program that cannot be loaded: the old pool serves on and says why; a mended one is loaded."""
    program = start(*command(), files={"app.py": APP.format(version="one")}, allow=[patterns.ANYTHING]).ready()
    check_still_serves(program, "one")
    program.write("app.py", fault)
    mark = program.mark
    check_reload_fails(program)
    assert says in program.log_path.read_bytes()[mark:].decode()
    check_still_serves(program, "one")
    program.write("app.py", APP.format(version="two"))
    reload(program)
    check_still_serves(program, "two")
    program.finish()


def test_invariant_04_reload_of_a_program_that_hangs(start: Start, ledger: Ledger) -> None:
    """HUP with an import that never ends: given up at the boot timeout; the old pool serves on meanwhile and after."""
    program = start(
        *command("--boot-timeout", 1), files={"app.py": APP.format(version="one")}, allow=[patterns.ANYTHING]
    ).ready()
    program.write("app.py", "import threading\nthreading.Event().wait()\n")
    mark = program.mark
    begun = time.monotonic()
    program.send(signal.SIGHUP)
    check_still_serves(program, "one")
    program.wait_for(patterns.RELOAD_FAILED, 5, since=mark)
    assert 0.9 <= time.monotonic() - begun <= 2.5
    program.wait_children(2)
    check_still_serves(program, "one")
    program.write("app.py", APP.format(version="two"))
    reload(program)
    check_still_serves(program, "two")
    program.finish()


def test_invariant_04_reload_to_an_address_that_cannot_be_bound(start: Start, ledger: Ledger) -> None:
    """HUP with a program that now names an address in use: the old pool serves on, and says so."""
    text = """
import prefork
from work import Work

def make():
    return prefork.PreforkTCPServer(("127.0.0.1", {port}), Work)
"""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        files = {"app.py": text.format(port=0)}
        program = start("prefork", "app:make", "-w", 2, files=files, allow=[patterns.ANYTHING]).ready()
        ask(program.address)
        program.write("app.py", text.format(port=taken.getsockname()[1]))
        mark = program.mark
        check_reload_fails(program)
        assert "in use" in program.log_path.read_bytes()[mark:].decode()
        for _ in range(8):
            ask(program.address)
    program.finish()


@pytest.mark.parametrize("fault", ["raise", "hang", "spin", "exit"])
def test_invariant_04_reload_whose_workers_do_not_boot(start: Start, ledger: Ledger, trouble: Path, fault: str) -> None:
    """HUP where the new generation's setup fails or hangs: the old pool is not touched, the next HUP may succeed."""
    program = start("pool.py", TCP, "--workers", 3, "--boot-timeout", 1, allow=[patterns.ANYTHING]).ready()
    program.wait_ready(3)
    with program.flat():
        for _ in range(2):
            trouble.write_text(fault)
            check_reload_fails(program)
            trouble.unlink()
        ask(program.address)
        reload(program)
        program.wait_ready(3)
    program.finish()


# -- 5: signals ------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGQUIT])
def test_invariant_05_idle_stop_within_100_ms(start: Start, ledger: Ledger, number: signal.Signals) -> None:
    """An idle pool is gone 100 ms after TERM, INT or QUIT, from the signal to the exit of the master."""
    times = Times()
    for _ in range(5):
        program = start("pool.py", TCP, "--workers", 4).ready()
        program.wait_ready(4)
        end = program.stop(number)
        assert end.code == 0
        times.append(end.seconds)
        program.finish()
    times.check(0.1, 0.5)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGQUIT])
@pytest.mark.parametrize("order", ["sleep 60", "busy", "stubborn"])
def test_invariant_05_fast_stop_of_a_busy_pool(
    start: Start, ledger: Ledger, number: signal.Signals, order: str
) -> None:
    """INT and QUIT end a pool within 500 ms although every worker has a request in hand."""
    program = start("pool.py", TCP, "--workers", 2, allow=[patterns.HANDLER_ERROR]).ready()
    with ExitStack() as stack:
        in_hand(program.address, stack, order, order)
        wait_busy(ledger, 2)
        end = program.stop(number)
    assert end.code == 0
    within(end.seconds, 0.5)
    program.finish()


@pytest.mark.parametrize("order", ["spin", "spin-free"])
def test_invariant_05_fast_stop_of_workers_deep_in_c(start: Start, ledger: Ledger, order: str) -> None:
    """A worker that cannot hear a signal is killed within the 2 s that a fast stop has; a second INT kills at once."""
    for signals in (1, 2):
        program = start("pool.py", TCP, "--workers", 1).ready()
        with ExitStack() as stack:
            in_hand(program.address, stack, order)
            wait_busy(ledger, signals)
            begun = time.monotonic()
            program.send(signal.SIGINT)
            if signals == 2:
                elapse(0.05)
                if program.running:
                    program.send(signal.SIGINT)
            program.wait_exit()
        within(time.monotonic() - begun, (2.3, 0.3)[signals - 1])
        program.finish()


def test_invariant_05_graceful_stop_hears_a_second_signal(start: Start, ledger: Ledger) -> None:
    """TERM waits for a request in hand; TERM again, or INT, does not."""
    for number in (signal.SIGTERM, signal.SIGINT):
        program = start("pool.py", TCP, "--workers", 2, allow=[patterns.HANDLER_ERROR]).ready()
        already = len(ledger.read().served) + len(ledger.twice)
        with ExitStack() as stack:
            in_hand(program.address, stack, "sleep 60")
            wait_busy(ledger, already + 1)
            program.send(signal.SIGTERM)
            program.wait_children(1)
            assert program.running
            within(program.stop(number).seconds, 0.5)
        program.finish()


def test_invariant_05_graceful_stop_waits_for_the_request(start: Start, ledger: Ledger) -> None:
    """A request in hand when TERM comes is answered to the byte, and the pool is gone right after it."""
    program = start("pool.py", TCP, "--workers", 2).ready()
    with ExitStack() as stack:
        (connection,) = in_hand(program.address, stack, "sleep 0.7")
        wait_busy(ledger, 1)
        program.send(signal.SIGTERM)
        answer = b"".join(iter(lambda: connection.recv(100), b""))
        assert answer.endswith(b":hold\n")
        assert program.wait_exit(0.5).code == 0
    program.finish()


def test_invariant_05_graceful_timeout(start: Start, ledger: Ledger) -> None:
    """A request that outlasts graceful_timeout is killed then, with its worker, and the pool ends in order."""
    program = start("pool.py", TCP, "--workers", 2, "--graceful-timeout", 0.5, allow=[patterns.ANYTHING]).ready()
    with ExitStack() as stack:
        in_hand(program.address, stack, "sleep 60", "spin")
        wait_busy(ledger, 2)
        end = program.stop()
    assert end.code == 0
    assert end.seconds >= 0.45
    within(end.seconds, 1.2)
    program.finish()


def test_invariant_05_signals_while_a_boot_hangs(start: Start, ledger: Ledger, trouble: Path) -> None:
    """While the new generation hangs in its boot the old pool serves, every signal is obeyed, TERM ends it at once."""
    program = start("pool.py", TCP, "--workers", 2).ready()
    program.wait_ready(2)
    trouble.write_text("hang")
    program.send(signal.SIGHUP)
    program.wait_children(3)
    for number in (signal.SIGWINCH, signal.SIGUSR1, signal.SIGTTIN, signal.SIGTTOU, signal.SIGHUP):
        program.send(number)
    ask(program.address)
    within(program.stop().seconds, 0.5)
    program.finish()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_invariant_05_stop_while_a_program_is_tried(start: Start, ledger: Ledger, number: signal.Signals) -> None:
    """While the import of a new program hangs, the command still resizes, and TERM and INT end it at once."""
    program = start(*command(), files={"app.py": APP.format(version="one")}).ready()
    program.write("app.py", "import threading\nthreading.Event().wait()\n")
    before = program.wait_ready(2)
    program.send(signal.SIGHUP)
    program.wait_children(3)
    program.send(signal.SIGTTIN)
    program.wait_children(4)
    assert set(before) < set(program.children())
    check_still_serves(program, "one")
    within(program.stop(number).seconds, 0.5)
    program.finish()


def test_invariant_05_a_program_that_leaves_a_child(start: Start, ledger: Ledger) -> None:
    """A program whose import forks a process that lives on, with all it inherited, does not make the master wait."""
    program = start(*command(), files={"app.py": APP.format(version="one")}).ready()
    fork = "import os, select\n\nif not os.fork():\n    select.select([], [], [], 1.5)\n    os._exit(0)\n"
    program.write("app.py", fork + APP.format(version="two"))
    begun = time.monotonic()
    reload(program)
    within(time.monotonic() - begun, 0.6)
    check_still_serves(program, "two")
    within(program.stop().seconds, 0.5)
    program.finish()


def test_invariant_05_signals_while_requests_hold_a_reload(start: Start, ledger: Ledger) -> None:
    """While requests in hand hold a reload, killed new workers are replaced, the pool can grow, INT ends it at once."""
    program = start("pool.py", TCP, "--workers", 2, allow=[patterns.HANDLER_ERROR]).ready()
    old = program.wait_ready(2)
    with ExitStack() as stack:
        in_hand(program.address, stack, "sleep 60", "sleep 60")
        wait_busy(ledger, 2)
        program.send(signal.SIGHUP)
        times = Times()
        for _ in range(5):
            new = until(lambda: set(program.children()) - set(old), 5, "a worker of the new generation")
            ask(program.address)
            begun = time.monotonic()
            program.kill_workers(*new)
            until(lambda: set(program.children()) - set(old) - new, 5, "its replacement")  # noqa: B023
            ask(program.address)
            times.append(time.monotonic() - begun)
        times.check(0.05, 0.25)
        size = len(program.children())
        program.send(signal.SIGTTIN)
        begun = time.monotonic()
        until(lambda: len(program.children()) > size, 5, "the pool grows")
        within(time.monotonic() - begun, 0.5)
        within(program.stop(signal.SIGINT).seconds, 0.5)
    program.finish()


def test_invariant_05_signals_during_back_off(start: Start, ledger: Ledger, trouble: Path) -> None:
    """While every slot waits for its next try, a growing pool tries its new slot at once, and TERM ends it at once."""
    program = start("pool.py", TCP, "--workers", 2, allow=[patterns.ANYTHING]).ready()
    trouble.write_text("raise")
    program.kill_workers(*program.wait_ready(2))
    program.wait_for(patterns.LEFT, number=2 + 2 * 4, timeout=10)  # the next delay is about a second
    trouble.unlink()
    program.send(signal.SIGTTIN)
    begun = time.monotonic()
    ask(program.address)
    within(time.monotonic() - begun, 0.5)
    within(program.stop().seconds, 0.5)
    program.finish()


def test_invariant_05_resize_and_reload_answer_within_100_ms(start: Start, ledger: Ledger) -> None:
    """TTIN, TTOU and HUP show their effect within 100 ms in an idle pool; WINCH and USR1 have none on the workers."""
    program = start("pool.py", TCP, "--workers", 2).ready()
    program.wait_ready(2)
    times = Times()
    for _ in range(5):
        for number, size in ((signal.SIGTTIN, 3), (signal.SIGTTOU, 2)):
            begun = time.monotonic()
            program.send(number)
            program.wait_ready(size)
            times.append(time.monotonic() - begun)
        mark, begun = program.mark, time.monotonic()
        program.send(signal.SIGHUP)
        program.wait_for(patterns.RELOAD_BEGINS, since=mark)
        times.append(time.monotonic() - begun)
        program.wait_for(patterns.RELOADED, since=mark)
    times.check(0.1, 0.5)
    program.wait_ready(2)
    before = program.children()
    for number in (signal.SIGWINCH, signal.SIGUSR1):
        program.send(number)
    ask(program.address)
    for _ in range(3):
        program.send(signal.SIGTTOU)  # never below one
    program.wait_children(1)
    elapse(0.2)
    assert len(program.children()) == 1 and set(program.children()) <= set(before)
    ask(program.address)
    program.finish()


def test_invariant_05_signals_to_a_worker(start: Start, ledger: Ledger) -> None:
    """A worker ignores INT, HUP, TTIN, TTOU, WINCH, also in a handler; TERM drains and QUIT ends it; it is replaced."""
    program = start("pool.py", TCP, "--workers", 1, allow=[patterns.HANDLER_ERROR]).ready()
    address = program.address
    (pid,) = program.wait_ready(1)
    with dial(address) as connection:
        connection.sendall(b"patient slices 0.4\n")
        wait_busy(ledger, 1)
        for number in (signal.SIGINT, signal.SIGHUP, signal.SIGTTIN, signal.SIGTTOU, signal.SIGWINCH, signal.SIGTERM):
            program.send(number, pid)
        answer = b"".join(iter(lambda: connection.recv(100), b""))
    assert answer == f"{pid}:patient\n".encode()
    (other,) = program.wait_ready(1, without=[pid])
    assert ask(address).pid == other
    for number in (signal.SIGINT, signal.SIGHUP, signal.SIGTTIN, signal.SIGTTOU, signal.SIGWINCH, signal.SIGUSR1):
        program.send(number, other)
    assert ask(address).pid == other
    with ExitStack() as stack:
        already = len(ledger.read().served) + len(ledger.twice)
        in_hand(address, stack, "sleep 60")
        wait_busy(ledger, already + 1)
        program.send(signal.SIGQUIT, other)
        program.wait_ready(1, timeout=0.5, without=[other])
    program.finish()


def test_invariant_05_a_burst_of_signals(start: Start, ledger: Ledger) -> None:
    """Every signal at once, as a process meets that was stopped, harms neither master nor worker."""
    program = start("pool.py", TCP, "--workers", 1).ready()
    address = program.address
    (pid,) = program.wait_ready(1)
    harmless = [
        signal.SIGINT,
        signal.SIGHUP,
        signal.SIGTTIN,
        signal.SIGTTOU,
        signal.SIGWINCH,
        signal.SIGUSR1,
        signal.SIGXCPU,
    ]
    for _ in range(5):
        mark = program.mark
        for target in (pid, program.pid):
            program.send(signal.SIGSTOP, target)
            until(lambda: state(target) == "T", what="it is stopped")  # noqa: B023
            # CONT discards a pending TTIN and TTOU: they come while it starts to run.
            for number in harmless if target == pid else harmless[1:6]:
                program.send(number, target)
            program.send(signal.SIGCONT, target)
            for number in (signal.SIGTTIN, signal.SIGTTOU):
                program.send(number, target)
            if target == pid:
                assert ask(address).pid == pid
        program.wait_for(patterns.RELOADED, since=mark)
        # Signals that are pending together come in no promised order: a TTOU before the TTIN leaves two.
        program.send(signal.SIGTTOU)
        ask(address)
        (pid,) = program.wait_ready(1, without=[pid])
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
    assert int(match[2]) == pid
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


# -- 7: nothing grows ------------------------------------------------------------------------------


def check_respawns(program: Program, number: int) -> None:
    """Kill all four workers again and again; the master is the same after it."""
    killed = 0
    while killed < number:
        program.kill_workers(*program.wait_ready(4))
        killed += 4


def check_reloads(program: Program, number: int) -> None:
    for _ in range(number):
        reload(program)


COUNTS = [(200, 100), pytest.param((1000, 1000), marks=[pytest.mark.soak, pytest.mark.timeout(900)])]


@pytest.mark.parametrize("counts", COUNTS, ids=str)
def test_invariant_07_respawns_and_reloads_leak_nothing(
    start: Start, ledger: Ledger, counts: tuple[int, int], record_property: Callable[[str, object], None]
) -> None:
    """After 200 respawns and 100 reloads (1000, 1000) the master has no descriptor more, and less than 1 MiB more."""
    program = start("pool.py", TCP, "--workers", 4).ready()
    check_respawns(program, 20)
    check_reloads(program, 5)
    program.wait_ready(4)
    before = private_memory(program.pid)
    with program.flat():
        check_respawns(program, counts[0])
        check_reloads(program, counts[1])
        program.wait_ready(4)
    growth = private_memory(program.pid) - before
    record_property("growth", growth)
    assert growth < 1 << 20
    ask(program.address)
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


# -- 9: children of the host -----------------------------------------------------------------------


@pytest.mark.parametrize("off_main", [False, True], ids=["main", "thread"])
def test_invariant_09_children_of_the_host_keep_their_exit_status(
    start: Start, ledger: Ledger, notes: Callable[[str], list[str]], off_main: bool
) -> None:
    """While workers die all the time, each child that the program started itself returns its own exit status."""
    options = ["--off-main"] if off_main else []
    program = start("pool.py", TCP, "--workers", 3, "--host-children", 100, *options, stdin=True).ready()

    def workers() -> list[int]:
        return [pid for pid in program.children() if patterns.TITLE_READY.search(title(pid))]

    while len(notes("child")) < 100:
        program.kill_workers(*until(workers, 5, "a worker"))
    for line in notes("child"):
        code, of_popen, of_spawn = line.split()
        assert code == of_popen == of_spawn
    pids_serving(program.address, 3)
    if off_main:
        program.tell("stop\n")
        assert program.wait_exit().code == 0
    program.finish(allow=[r".*DeprecationWarning: This process .* is multi-threaded.*", r"  .*"])


# -- 10: the program's own endings -----------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_invariant_10_atexit_and_finally_run_once_in_the_master(
    start: Start, ledger: Ledger, notes: Callable[[str], list[str]], number: signal.Signals
) -> None:
    """However workers end, `finally` blocks and atexit functions of the program run once, in the master."""
    program = start("pool.py", TCP, "--workers", 4, "--max-requests", 7, allow=[patterns.ANYTHING]).ready()
    address = program.address
    for order in ("leave 0", "leave 3", "exit 3", "interrupt", "raise", "segfault"):
        with dial(address) as connection, contextlib.suppress(ConnectionResetError):
            connection.sendall(f"x {order}\n".encode())
            assert connection.recv(100) == b""
    program.send(signal.SIGTERM, program.wait_ready(4)[0])
    program.send(signal.SIGQUIT, program.wait_ready(4)[1])
    reload(program)
    for _ in range(40):
        ask(address)
    assert program.stop(number).code == 0
    master = [str(program.pid)]
    assert (notes("begin"), notes("finally"), notes("atexit")) == (master, master, master)
    program.finish()


# -- 11: Unix paths --------------------------------------------------------------------------------


def socket_path(program: Program) -> Path:
    return Path(program.address.where)


@pytest.mark.parametrize("kind", ["unix", "unixgram"])
def test_invariant_11_second_instance_is_refused(start: Start, ledger: Ledger, kind: str) -> None:
    """Of two instances on one Unix path the second is refused with a clear error; the first serves on undisturbed."""
    first = start("pool.py", EVERY[kind], "--workers", 2).ready()
    inode = socket_path(first).stat().st_ino
    second = start("pool.py", first.address, "--workers", 2, directory=first.directory, allow=[patterns.ANYTHING])
    assert second.wait_exit().code not in (0, None)
    assert socket_path(first).stat().st_ino == inode
    for _ in range(4):
        assert ask(first.address).pid in first.children()
    assert "in use" in second.log.lower() or "another server" in second.log.lower()
    first.finish()
    second.finish(code=None)


@pytest.mark.parametrize("kind", ["unix", "unixgram"])
def test_invariant_11_stale_path_is_reused(start: Start, ledger: Ledger, kind: str) -> None:
    """A path that a killed server left behind is taken over by the next start, and removed by its stop."""
    first = start("pool.py", EVERY[kind], "--workers", 2).ready()
    path = socket_path(first)
    first.send(signal.SIGKILL)
    first.wait_exit()
    until(lambda: not first.remaining(), 2)
    assert path.exists()
    second = start("pool.py", first.address, "--workers", 2, directory=first.directory)
    ask(second.ready().address)
    second.finish()
    first.finish(code=-signal.SIGKILL)


@pytest.mark.parametrize("kind", ["unix", "unixgram"])
def test_invariant_11_only_our_own_file_is_removed(start: Start, ledger: Ledger, kind: str) -> None:
    """The socket's file is private by default; one that somebody else put in its place is left alone by the stop."""
    program = start("pool.py", EVERY[kind], "--workers", 2).ready()
    path = socket_path(program)
    found = path.stat()
    assert stat.S_ISSOCK(found.st_mode) and stat.S_IMODE(found.st_mode) == 0o600
    path.unlink()
    with socket.socket(socket.AF_UNIX) as other:
        other.bind(str(path))
        assert program.stop().code == 0
        program.finish(leftovers=[path.name])
    path.unlink()


@pytest.mark.parametrize("kind", ["unix", "unixgram"])
def test_invariant_11_a_file_that_is_no_socket_is_not_touched(start: Start, ledger: Ledger, kind: str) -> None:
    """A regular file on the path is an error of the start; its contents survive."""
    program = start(
        "pool.py", EVERY[kind].replace("{run}", "{work}"), files={"socket": "precious"}, allow=[patterns.ANYTHING]
    )
    assert program.wait_exit().code not in (0, None)
    assert (program.work / "socket").read_text() == "precious"
    assert os.listdir(program.work) == ["socket"]
    program.finish(code=None)


# -- 12: standard error that cannot be written -----------------------------------------------------


def work_hard(program: Program, address: Address, workers: int = 2) -> None:
    """Serve, lose workers, reload, resize: all of it is logged."""
    for _ in range(20):
        ask(address)
    for _ in range(5):
        program.kill_workers(*program.wait_ready(workers))
        ask(address)
    for _ in range(2):
        before = program.wait_ready(workers)
        program.send(signal.SIGHUP)
        program.wait_ready(workers, timeout=10, without=before)
    before = program.wait_ready(workers)
    for _ in range(4 * workers):
        with dial(address) as connection:
            connection.sendall(b"x raise\n")
            assert connection.recv(100) == b""
    pids_serving(address, workers)
    assert program.children() == before, "an exception in a handler cost a worker, because it could not be told"


def start_mute(start: Start, *, stderr: int, limits: dict[int, int] | None = None) -> tuple[Program, Address]:
    """The command with a standard error that takes nothing, and a program that says something as it is imported."""
    files = {"app.py": "import sys\n\nprint('loaded', file=sys.stderr)\n" + APP.format(version="one")}
    program = start(
        "prefork",
        "app:Handler",
        "-b",
        UNIX,
        "-w",
        2,
        files=files,
        stderr=stderr,
        limits=limits,
        allow=[patterns.ANYTHING],
    )
    address = Address("unix", str(program.run / "socket"))

    def answers() -> bool:
        assert program.running
        with contextlib.suppress(OSError):
            return ask(address).pid > 0
        return False

    until(answers, 10, "it serves")
    return program, address


def test_invariant_12_full_pipe(start: Start, ledger: Ledger) -> None:
    """With standard error a pipe that nobody empties, serving and signals go on, and what was dropped is counted."""
    reader, writer = os.pipe()
    try:
        os.set_blocking(writer, False)
        with contextlib.suppress(BlockingIOError):
            while True:
                os.write(writer, b"." * 4096)
        os.set_blocking(writer, True)
        program, address = start_mute(start, stderr=writer)
        work_hard(program, address)
        os.close(writer)
        writer = -1
        os.set_blocking(reader, False)
        with contextlib.suppress(BlockingIOError):
            while True:
                os.read(reader, 65536)
        within(program.stop().seconds, 1.0)
        text = os.read(reader, 65536).decode()
        assert patterns.DROPPED.search(text), text
    finally:
        os.close(reader)
        if writer >= 0:
            os.close(writer)
    program.finish()


def test_invariant_12_dev_full(start: Start, ledger: Ledger) -> None:
    """With standard error on a full disk, serving and signals go on, and the exit code is right."""
    full = os.open("/dev/full", os.O_WRONLY)
    try:
        program, address = start_mute(start, stderr=full)
    finally:
        os.close(full)
    work_hard(program, address)
    within(program.stop().seconds, 1.0)
    program.finish()


def test_invariant_12_file_that_may_not_grow(start: Start, ledger: Ledger, tmp_path: Path) -> None:
    """With standard error a file at its size limit (EFBIG), serving and signals go on."""
    path = tmp_path / "stderr"
    path.write_bytes(b"." * 1024)
    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND)
    ledger.path.touch()
    # The ledger is a file too: 1 MiB is enough for it, and the log begins beyond.
    os.truncate(descriptor, 1 << 20)
    try:
        program, address = start_mute(start, stderr=descriptor, limits={resource.RLIMIT_FSIZE: 1 << 20})
    finally:
        os.close(descriptor)
    work_hard(program, address)
    within(program.stop().seconds, 1.0)
    program.finish()


def test_invariant_12_closed_reader(start: Start, ledger: Ledger) -> None:
    """With standard error a pipe whose reader is gone (EPIPE), serving and signals go on."""
    reader, writer = os.pipe()
    os.close(reader)
    try:
        program, address = start_mute(start, stderr=writer)
    finally:
        os.close(writer)
    work_hard(program, address)
    within(program.stop().seconds, 1.0)
    program.finish()


def test_invariant_12_log_file_on_a_full_disk(start: Start, ledger: Ledger) -> None:
    """A log file that cannot be written, nor closed, is reopened by USR1: no request fails of it, and TERM is heard."""
    program = start("pool.py", UNIX, "--workers", 2, "--log", "/dev/full", allow=[patterns.ANYTHING])
    address = Address("unix", str(program.run / "socket"))
    until(lambda: (program.run / "socket").exists(), 10, "it is bound")
    workers = program.wait_ready(2)
    with dial(address) as connection:
        connection.sendall(b"patient slices 0.4\n")
        wait_busy(ledger, 1)
        for _ in range(5):
            program.send(signal.SIGUSR1)
            ask(address)
        answer = b"".join(iter(lambda: connection.recv(100), b""))
    assert answer.endswith(b":patient\n")
    assert program.wait_ready(2) == workers
    program.send(signal.SIGSTOP)
    program.send(signal.SIGUSR1)
    program.send(signal.SIGTERM)
    program.send(signal.SIGCONT)
    assert program.wait_exit(2.0).code == 0
    program.finish()


def test_invariant_12_library_workers_do_not_block(start: Start, ledger: Ledger) -> None:
    """A library program whose handlers fail in a row before a full pipe: its workers serve on."""
    reader, writer = os.pipe()
    try:
        program = start("pool.py", UNIX, "--workers", 2, stderr=writer, allow=[patterns.ANYTHING])
        address = Address("unix", str(program.run / "socket"))
        until(lambda: (program.run / "socket").exists(), 10, "it is bound")
        program.wait_ready(2)
        os.set_blocking(writer, False)
        with contextlib.suppress(BlockingIOError):
            while True:
                os.write(writer, b"." * 4096)
        os.set_blocking(writer, True)
        for _ in range(50):
            with dial(address) as connection:
                connection.sendall(b"x raise\n")
                assert connection.recv(100) == b""
        pids_serving(address, 2)
        os.set_blocking(reader, False)
        with contextlib.suppress(BlockingIOError):
            while True:
                os.read(reader, 65536)
        program.stop()
    finally:
        os.close(reader)
        os.close(writer)
    program.finish()


def test_invariant_05_all_signals_pending(start: Start, ledger: Ledger) -> None:
    """All that a master obeys, pending at one moment under faulthandler, overflows no stack: it stops in good order."""
    program = start("pool.py", TCP, "--workers", 1, env={"PYTHONFAULTHANDLER": "1"}).ready()
    # TTIN and TTOU would be discarded by the CONT.
    obeyed = [signal.SIGHUP, signal.SIGUSR1, signal.SIGQUIT, signal.SIGTERM, signal.SIGINT]
    program.send(signal.SIGSTOP)
    until(lambda: state(program.pid) == "T", what="it is stopped")
    for number in (*obeyed, signal.SIGWINCH, signal.SIGCHLD):
        program.send(number)
    program.send(signal.SIGCONT)
    assert program.wait_exit().code == 0
    assert sorted(re.findall(r": (SIG\w+)$", program.log, re.MULTILINE)) == sorted(one.name for one in obeyed)
    program.finish()

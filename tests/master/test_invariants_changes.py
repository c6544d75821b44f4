"""Invariants 3, 4 and 7 of the design: changes under load, bad reloads, and nothing grows."""

import signal
import socket
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import pytest

from support import Ledger, Program, account, ask, patterns, private_memory, queue_up, state, until
from support.invariants import APP, EVERY, POLITE, TCP, Run, Start, check_still_serves, command, reload

pytestmark = pytest.mark.timeout(120)


# -- 3: changes under load -------------------------------------------------------------------------


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

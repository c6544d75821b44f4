"""Nothing is lost: graceful stops, reloads and retirements of single workers under 16 clients, proven by ledger.

The first tests prove the judge: the standard library's server, stopped as its users stop it, must be found guilty.
"""

import functools
import os
import signal
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from support import Ledger, Load, Loss, Program, Tally, account, ask, dial, patterns, stop_and_start, until

Start = Callable[..., Program]
Run = Callable[..., Load]

TCP = "tcp://127.0.0.1:0"
UNIX = "unix:{run}/socket"

pytestmark = pytest.mark.timeout(300)


def soak(*values: object) -> object:
    return pytest.param(*values, marks=[pytest.mark.soak, pytest.mark.timeout(900)])


# -- the judge -------------------------------------------------------------------------------------


def test_the_load_sees_the_resets_of_another_server(start: Start, ledger: Ledger, load: Run) -> None:
    """ForkingTCPServer, ended by TERM under the same load, resets clients, and no killed process excuses it."""
    wrong: list[str] = []
    while not wrong:
        program = start("forking.py").ready()
        clients = load(program.address, clients=16)
        clients.more(300)
        program.stop()
        tally = clients.stop()
        assert tally.ok >= 300
        assert tally.mismatch == 0
        wrong = account(tally, ledger)
        assert bool(wrong) == bool(tally.lost), (wrong, tally)
        program.finish()


def test_the_harness_sees_what_is_left(start: Start, ledger: Ledger) -> None:
    """A server that leaves a child behind, an unexpected line, or another exit code, is found by `finish`."""
    program = start("forking.py", "--no-wait").ready()
    with dial(program.address) as connection:
        connection.sendall(b"x sleep 60\n")
        until(lambda: ledger.pids(), 5, "it is served")
        program.stop()
        with pytest.raises(AssertionError, match="no process of forking"):
            program.finish()
    program.kill()
    program.finish()
    program = start("forking.py").ready()
    with dial(program.address) as connection:
        connection.sendall(b"x raise trouble\n")
        assert connection.recv(100) == b""
    with pytest.raises(AssertionError, match="unexpected on stderr"):
        program.finish()
    program.finish(allow=[patterns.HANDLER_ERROR])
    program = start("forking.py").ready()
    (program.run / "socket").touch()
    with pytest.raises(AssertionError, match="left files"):
        program.finish()
    with pytest.raises(AssertionError, match="ended with 0, not 3"):
        program.finish(code=3)
    program.finish(leftovers=["socket"])


def test_the_judge_is_just(tmp_path: Path) -> None:
    """A loss is excused only by a killed process of its own."""
    path = tmp_path / "ledger"
    path.write_text("10 a-1\n11 a-2\n10 a-3\n")
    losses = [Loss("a-3", "reset", "", 0.0, 1.0), Loss("b-1", "unanswered", "", 0.0, 1.0)]
    tally = Tally(2, 1, 0, 1, 0, 0, 0, 0, losses, [], Counter())
    assert not account(tally, Ledger(path), [10, 12])
    assert len(account(tally, Ledger(path), [10])) == 1
    assert len(account(tally, Ledger(path), [12])) == 1
    assert len(account(tally, Ledger(path))) == 2
    path.write_text("10 a-1\n11 a-1\n10 a-3\n10 a-2\n")
    assert account(tally, Ledger(path), [10, 12]) == ["served twice: a-1"]


# -- the pool --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "number"), [("tcp", 30), ("unix", 10), soak("tcp", 100), soak("unix", 100)])
def test_graceful_stops_lose_nothing(start: Start, ledger: Ledger, load: Run, kind: str, number: int) -> None:
    """16 clients that never stop, a pool that is stopped and started on one address: 0 reset, 0 unanswered."""
    program = start("pool.py", {"tcp": TCP, "unix": UNIX}[kind], "--workers", 4).ready()
    address = program.address
    clients = load(address, clients=16)
    again = functools.partial(start, "pool.py", address, "--workers", 4, directory=program.directory)
    stop_and_start(program, again, [clients], number)
    clients.check_nothing_lost(ledger, stopped=True)


@pytest.mark.parametrize("number", [50])
def test_reloads_lose_nothing(start: Start, ledger: Ledger, load: Run, number: int) -> None:
    """50 reloads under 16 clients: 0 reset, 0 unanswered, 0 refused."""
    program = start("pool.py", TCP, "--workers", 4).ready()
    program.wait_ready(4)
    with program.flat():
        clients = load(program.address, clients=16)
        for _ in range(number):
            clients.more(100)
            program.reload()
        clients.check_nothing_lost(ledger)
    program.finish()


def test_twenty_reloads_at_once_are_one_or_two(start: Start, ledger: Ledger, load: Run) -> None:
    """HUPs that come while a reload is under way are one more reload, not twenty; nothing is lost."""
    program = start("pool.py", TCP, "--workers", 4).ready()
    clients = load(program.address, clients=16)
    clients.more(100)
    for _ in range(20):
        program.send(signal.SIGHUP)
        clients.more(20)
    before = len(program.found(patterns.RELOAD_BEGINS))
    program.reload()
    until(lambda: len(program.found(patterns.RELOADED)) == len(program.found(patterns.RELOAD_BEGINS)), 10)
    assert 1 <= before <= 20
    clients.check_nothing_lost(ledger)
    program.finish()


@pytest.mark.parametrize(("kind", "number"), [("tcp", 200), ("unix", 50), soak("tcp", 1000), soak("unix", 1000)])
def test_retirements_lose_nothing(start: Start, ledger: Ledger, load: Run, kind: str, number: int) -> None:
    """TERM from outside to one worker after the other under 16 clients: each is replaced, and no request fails."""
    program = start("pool.py", {"tcp": TCP, "unix": UNIX}[kind], "--workers", 4).ready()
    program.wait_ready(4)
    with program.flat():
        clients = load(program.address, clients=16)
        clients.more(100)
        for turn in range(number):
            pids = program.wait_ready(4)
            victim = pids[turn % 4]
            program.send(signal.SIGTERM, victim)
            program.wait_children(4, without=[victim])
        clients.check_nothing_lost(ledger)
    assert len(program.found(patterns.LEFT)) >= number
    program.finish()


@pytest.mark.parametrize("number", [200, soak(1000)])
def test_recycling_loses_nothing(start: Start, ledger: Ledger, load: Run, number: int) -> None:
    """max_requests recycles worker after worker under 16 clients: no request fails, the pool never stops serving."""
    program = start("pool.py", TCP, "--workers", 4, "--max-requests", 20, "--max-requests-jitter", 10).ready()
    clients = load(program.address, clients=16)
    until(lambda: len(program.found(patterns.LEFT)) >= number, number / 5 + 20, f"{number} workers were recycled")
    clients.check_nothing_lost(ledger)
    assert len(os.listdir(f"/proc/{program.pid}/task")) == 1
    ask(program.address)
    program.finish()


def test_datagrams_survive_reloads(start: Start, ledger: Ledger, load: Run) -> None:
    """UDP: 20 reloads and 50 retirements under 16 clients; every datagram is answered, once."""
    program = start("pool.py", "udp://127.0.0.1:0", "--workers", 4).ready()
    clients = load(program.address, clients=16)
    for _ in range(20):
        clients.more(50)
        program.reload()
    for turn in range(50):
        pids = program.wait_ready(4)
        program.send(signal.SIGTERM, pids[turn % 4])
        program.wait_children(4, without=[pids[turn % 4]])
    clients.check_nothing_lost(ledger)
    program.finish()


def test_ipv6(start: Start, ledger: Ledger) -> None:
    """IPv6 is served like IPv4."""
    program = start("pool.py", "tcp://[::1]:0", "--workers", 2).ready()
    address = program.address
    assert address.where == "::1"
    assert ask(address).pid in program.children()
    program.finish()


SEVERAL = """
import logging
import sys

import prefork
from pool import SERVERS, address

logging.basicConfig(level=logging.INFO, format="%(asctime)s prefork[%(process)d] %(levelname)s: %(message)s")
servers = []
for kind, where in map(address, sys.argv[1:]):
    server_class, handler = SERVERS[kind]
    servers.append(type("Pool", (server_class,), {"workers": 4})(where, handler))
prefork.serve(*servers)
for server in servers:
    server.server_close()
"""


def test_several_listeners_lose_nothing(start: Start, ledger: Ledger, load: Run) -> None:
    """One pool on TCP, a Unix path and UDP under 24 clients: reloads, retirements and stops lose nothing at any."""

    def begin(*addresses: object, **options: object) -> Program:
        program = start("{work}/several.py", *addresses, files={"several.py": SEVERAL}, **options).ready()
        program.wait_ready(4)
        return program

    program = begin(TCP, UNIX, "udp://127.0.0.1:0")
    loads = [load(address, clients=8) for address in program.addresses]
    for turn in range(10):
        for clients in loads:
            clients.more(30)
        pids = program.wait_ready(4)
        program.send(signal.SIGTERM, pids[turn % 4])
        program.wait_children(4, without=[pids[turn % 4]])
        program.reload()
    loads.pop().check_nothing_lost(ledger)  # nobody says to a client of UDP that there is no server
    stop_and_start(program, functools.partial(begin, *program.addresses, directory=program.directory), loads, 5)
    for clients in loads:
        clients.check_nothing_lost(ledger, stopped=True)

"""The worker for coroutines under load: nothing is lost, and each worker has its turn."""

import functools
import os
import resource
import signal
import time
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import pytest

from support import Ledger, Load, ask, dial, elapse, patterns, pids_serving, stop_and_start, switches
from support.coroutines import LOOPS, begin, both_loops
from support.scripts import Notes, Start, hold, noted, rest

Run = Callable[..., Load]
pytestmark = pytest.mark.timeout(60)


# -- nothing is lost -------------------------------------------------------------------------------


@pytest.mark.parametrize(("loop", "kind"), [("asyncio", "tcp"), (LOOPS[-1], "tcp"), ("asyncio", "udp")])
def test_replacements_lose_nothing(start: Start, ledger: Ledger, load: Run, loop: str, kind: str) -> None:
    """Reloads, retirements and recycling under 16 clients: every request is answered, once."""
    program = begin(start, loop, kind, max_requests=200)
    with program.flat():
        clients = load(program.address, clients=16)
        for _ in range(5):
            clients.more(100)
            program.reload()
        for _ in range(8):
            clients.more(30)
            victim = program.wait_ready(2, 10)[0]
            program.send(signal.SIGTERM, victim)
            program.wait_children(2, 10, without=[victim])
        clients.more(1200)
        clients.check_nothing_lost(ledger)
        program.wait_ready(2)
    assert any("recycled" in match[4] for match in program.found(patterns.LEFT))
    program.finish()


@pytest.mark.parametrize(("loop", "kind"), [("asyncio", "tcp"), (LOOPS[-1], "tcp"), (LOOPS[-1], "unix")])
def test_stops_lose_nothing(start: Start, ledger: Ledger, load: Run, loop: str, kind: str) -> None:
    """A pool that is stopped and started on one address under 16 clients answers whoever it has accepted."""
    program = begin(start, loop, kind)
    address = program.address
    clients = load(address, clients=16)
    again = functools.partial(begin, start, loop, kind, directory=program.directory, port=address.port)
    stop_and_start(program, again, [clients], 5)
    clients.check_nothing_lost(ledger, stopped=True)


@both_loops
def test_a_stop_takes_the_queue(start: Start, notes: Notes, loop: str) -> None:
    """Clients that wait in the backlog of workers at their limit are served before the pool is gone."""
    program = begin(start, loop, workers=2, max_connections=2)
    with ExitStack() as stack:
        held = [hold(program.address, stack, "gate go", f"held-{number}") for number in range(12)]
        noted(notes, "begun", 4)
        program.begin_stop()
        program.write("go", "")
        for number, sock in enumerate(held):
            assert rest(sock).endswith(f":held-{number}:done\n".encode())
    assert program.wait_exit().code == 0
    program.finish()


# -- who gets what ---------------------------------------------------------------------------------


@both_loops
def test_each_worker_has_its_turn(start: Start, notes: Notes, loop: str) -> None:
    """One client at a time is spread evenly over 8 workers, and wakes about one of them."""
    program = begin(start, loop, workers=8)
    pids = program.wait_ready(8, 10)
    pids_serving(program.address, 8)
    before = sum(map(switches, pids))
    number = 400
    served = Counter(ask(program.address).pid for _ in range(number))
    jain = number**2 / (8 * sum(count**2 for count in served.values()))
    assert jain > 0.95, served
    assert (sum(map(switches, pids)) - before) / number < 4  # the herd: 8
    program.finish()


@both_loops
def test_max_connections(start: Start, notes: Notes, loop: str) -> None:
    """A worker at its limit accepts nobody; those who come then wait, and are served when others are done."""
    program = begin(start, loop, workers=1, max_connections=3)
    with ExitStack() as stack:
        held = [hold(program.address, stack, f"gate go-{number}") for number in range(5)]
        noted(notes, "begun", 3)
        elapse(0.1)
        assert len(notes("begun")) == 3
        for number in range(5):
            program.write(f"go-{number}", "")
            assert rest(held[number]).endswith(b":held:done\n")
            noted(notes, "begun", min(5, 4 + number))
    assert ask(program.address).result == "done"
    program.finish()


@both_loops
def test_a_full_file_table(start: Start, notes: Notes, loop: str) -> None:
    """A worker without a descriptor left pauses, says so, uses no processor, and goes on when there is one."""
    program = begin(start, loop, workers=1)
    (worker,) = program.wait_ready(1)
    ask(program.address)
    soft, hard = resource.prlimit(worker, resource.RLIMIT_NOFILE)
    highest = max(int(name) for name in os.listdir(f"/proc/{worker}/fd"))
    resource.prlimit(worker, resource.RLIMIT_NOFILE, (highest + 1, hard))
    with ExitStack() as stack:
        held = [hold(program.address, stack, "sleep 1", str(number)) for number in range(8)]
        program.wait_for(r"worker \d+ \(slot 0, generation 1\) cannot accept a connection")
        before = processor(worker)
        elapse(0.5)
        assert processor(worker) - before < 0.25
        resource.prlimit(worker, resource.RLIMIT_NOFILE, (soft, hard))
        for number, sock in enumerate(held):
            assert rest(sock).endswith(f":{number}:done\n".encode())
    program.finish()


def processor(pid: int) -> float:
    """Seconds of processor that a process has used."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


@both_loops
def test_slow_clients(start: Start, loop: str) -> None:
    """1,000 clients that send a byte a second cost 2 workers nothing that fast clients would notice."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < 2500:
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(2500, hard), hard))
    program = begin(start, loop, request_timeout=20.0)
    with ExitStack() as stack:
        slow = [stack.enter_context(dial(program.address)) for _ in range(1000)]
        begun, sent, times = time.monotonic(), 0, []
        for number, sock in enumerate(slow):
            sock.sendall(f"{number} ".encode())
        while (now := time.monotonic()) < begun + 1.2:
            while sent < (now - begun) * 1000:
                slow[sent % 1000].sendall(b"x")
                sent += 1
            times.append(ask(program.address).seconds)
        times.sort()
        for sock in slow:
            sock.sendall(b"\n")
        for number, sock in enumerate(slow):
            assert rest(sock).endswith(f":{number}:done\n".encode())
    assert sent >= 1000 and len(times) > 50
    p99 = times[int(len(times) * 0.99)]
    print(f"{loop}: {len(times)} fast requests, median {times[len(times) // 2] * 1e3:.2f} ms, p99 {p99 * 1e3:.2f} ms")
    assert p99 < 0.25
    program.finish()

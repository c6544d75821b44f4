"""Handlers that say when a request is there: how many may wait, for how long, and which worker has them."""

import os
import socket
from collections import Counter
from contextlib import ExitStack
from pathlib import Path

import pytest

from support import ask, children, descriptors, dial, elapse, until
from support.filters import Slow, answers, ended, pool
from support.processes import blocked_in
from support.scripts import Notes, Start, hold, noted, rest

pytestmark = pytest.mark.timeout(90)
SHORT = "PATIENCE = 0.6"


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
        program.wait_for(r"WARNING: worker \d+ \(slot 0, .*\) cannot accept a connection: Too many open files")
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

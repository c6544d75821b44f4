"""Two minutes of everything at once (`make soak`)."""

import contextlib
import os
import random
import signal
import time
from collections.abc import Callable

import pytest

from support import Ledger, Load, Program, account, elapse, patterns, pids_serving, private_memory, session, until

pytestmark = [pytest.mark.soak, pytest.mark.timeout(400)]

SECONDS = float(os.environ.get("PREFORK_SOAK_SECONDS", "120"))
WORKERS = 4


class Storm:
    """One random blow after the other against one program; it knows whom it killed."""

    def __init__(self, program: Program, seed: int) -> None:
        self.program = program
        self.random = random.Random(seed)
        self.killed: list[int] = []
        self.stopped: dict[int, float] = {}
        self.size = WORKERS
        self.blows: dict[str, int] = {}

    def strike(self) -> None:
        blow = self.random.choices(
            [
                self.kill,
                self.kill_all,
                self.pause,
                self.term,
                self.hang_up,
                self.grow,
                self.shrink,
                self.reopen,
                self.noise,
            ],
            [20, 2, 6, 20, 4, 6, 6, 4, 4],
        )[0]
        self.blows[blow.__name__] = self.blows.get(blow.__name__, 0) + 1
        with contextlib.suppress(ProcessLookupError):  # it left before the blow
            blow()
        self.go_on(time.monotonic())

    def go_on(self, now: float) -> None:
        for pid, until_ in list(self.stopped.items()):
            if now >= until_:
                del self.stopped[pid]
                try:
                    self.program.send(signal.SIGCONT, pid)
                except ProcessLookupError:
                    continue

    def victim(self) -> int:
        pids = self.program.children()
        if not pids:
            raise ProcessLookupError
        return self.random.choice(pids)

    def kill(self) -> None:
        pid = self.victim()
        self.program.kill_workers(pid)
        self.killed.append(pid)

    def kill_all(self) -> None:
        for pid in self.program.children():
            self.program.kill_workers(pid)
            self.killed.append(pid)

    def pause(self) -> None:
        pid = self.random.choice([self.victim(), self.victim(), self.victim(), self.program.pid])
        self.program.send(signal.SIGSTOP, pid)
        self.stopped[pid] = time.monotonic() + self.random.uniform(0.0, 1.0)

    def term(self) -> None:
        self.program.send(signal.SIGTERM, self.victim())

    def hang_up(self) -> None:
        for _ in range(self.random.choice([1, 1, 3, 10])):
            self.program.send(signal.SIGHUP)

    def grow(self) -> None:
        if self.size < 2 * WORKERS:
            self.size += 1
            self.program.send(signal.SIGTTIN)

    def shrink(self) -> None:
        if self.size > 1:
            self.size -= 1
            self.program.send(signal.SIGTTOU)

    def reopen(self) -> None:
        self.program.send(signal.SIGUSR1)

    def noise(self) -> None:
        self.program.send(
            self.random.choice([signal.SIGINT, signal.SIGHUP, signal.SIGWINCH, signal.SIGTTIN]), self.victim()
        )


@pytest.mark.parametrize("kind", ["tcp", "unix"])
def test_random_signals(
    start: Callable[..., Program],
    load: Callable[..., Load],
    ledger: Ledger,
    kind: str,
    record_property: Callable[[str, object], None],
) -> None:
    """Two minutes of random signals: at most the requests of killed workers are lost, and the master is as before."""
    seed = int.from_bytes(os.urandom(4), "big")
    print(f"seed {seed}")
    listen = {"tcp": "tcp://127.0.0.1:0", "unix": "unix:{run}/socket"}[kind]
    program = start("pool.py", listen, "--workers", WORKERS, "--max-requests", 2000, allow=[patterns.ANYTHING]).ready()
    program.wait_ready(WORKERS)
    storm = Storm(program, seed)
    before = private_memory(program.pid)
    with program.flat(timeout=10):
        clients = load(program.address, clients=16, seconds=SECONDS + 60)
        end = time.monotonic() + SECONDS
        while time.monotonic() < end:
            storm.strike()
            elapse(storm.random.expovariate(1 / 0.05))
            assert program.running
        storm.go_on(float("inf"))
        settle(program)
        tally = clients.stop()
    record_property("tally", str(tally))
    record_property("killed", len(storm.killed))
    record_property("blows", str(storm.blows))
    print(tally, storm.blows, f"killed {len(storm.killed)}, memory {private_memory(program.pid) - before:+}")
    assert not account(tally, ledger, storm.killed)
    assert tally.refused == 0
    assert tally.lost <= len(storm.killed)
    program.check_no_zombie()
    stopped = program.finish(timeout=10)
    assert stopped.seconds <= 0.5
    assert not [entry for entry in session(program.pid) if not entry.is_zombie]


def settle(program: Program) -> None:
    """Bring the pool to the size it began with: signals that were sent to a stopped master may have been merged."""

    def at_rest() -> bool:
        begun, served = len(program.found(patterns.RELOAD_BEGINS)), len(program.found(patterns.RELOADED))
        return begun == served + len(program.found(patterns.RELOAD_FAILED))

    until(at_rest, 20, "no reload is under way")
    for _ in range(3 * WORKERS):
        sizes = program.found(patterns.WANTED)
        size = int(sizes[-1][1]) if sizes else WORKERS
        if size == WORKERS:
            break
        mark = program.mark
        program.send(signal.SIGTTIN if size < WORKERS else signal.SIGTTOU)
        program.wait_for(patterns.WANTED, since=mark)
    program.wait_ready(WORKERS, 10)
    pids_serving(program.address, WORKERS, timeout=10)

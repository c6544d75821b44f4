"""Who answered what: a load of clients that counts every way to lose a request, and the servers' own book.

The programs write `PID ID` to the ledger (O_APPEND, one write) before they answer, so that of each id that a client
lost it can be told which process had it. `account` is the judge: what is lost must have been in a process that was
killed, and a process that serves one request at a time can lose one.
"""

import json
import mmap
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from .clients import Address
from .load import COUNTERS
from .program import Program
from .waiting import until


class Loss(NamedTuple):
    """An id whose connection was made and whose answer did not come."""

    identity: str
    kind: str
    note: str
    begun: float
    ended: float


@dataclass(frozen=True)
class Tally:
    """What the clients of a load saw.

    Lost is what was connected and got no right answer: `reset`, `unanswered`, `short`, `mismatch`. Not lost is what no
    server ever took: `refused` (nobody listens), `unconnected` (the SYN was not taken), `overflow` (full backlog).
    """

    ok: int
    reset: int
    refused: int
    unanswered: int
    short: int
    mismatch: int
    unconnected: int
    overflow: int
    losses: list[Loss] = field(repr=False)
    refused_at: list[float] = field(repr=False)
    by_pid: Counter[int] = field(repr=False)

    @property
    def lost(self) -> int:
        return self.reset + self.unanswered + self.short + self.mismatch


class Load:
    """Clients that run in a process of their own from the construction to `stop()`."""

    def __init__(self, address: Address, clients: int = 16, pause: float = 0.0, seconds: float = 300.0) -> None:
        self.address = address
        self.directory = Path(tempfile.mkdtemp(prefix="prefork-load-"))
        self.tally: Tally | None = None
        control, self.result = self.directory / "control", self.directory / "result"
        control.write_bytes(bytes(8 * len(COUNTERS)))
        with control.open("r+b") as file:
            self.counters = memoryview(mmap.mmap(file.fileno(), 0)).cast("Q")
        words = (control, self.result, address, clients, pause, seconds)
        script = Path(__file__).with_name("load.py")
        self.process = subprocess.Popen([sys.executable, str(script), *map(str, words)], stdin=subprocess.DEVNULL)

    def count(self, kind: str) -> int:
        return self.counters[COUNTERS.index(kind)]

    @property
    def ok(self) -> int:
        return self.count("ok")

    def more(self, number: int, timeout: float = 20.0) -> int:
        """Wait until `number` more requests were answered."""
        aim = self.ok + number

        def reached() -> bool:
            assert self.process.poll() is None, "the load ended"
            return self.ok >= aim

        until(reached, timeout, f"{number} more answers")
        return self.ok

    def stop(self, timeout: float = 20.0) -> Tally:
        """End it: requests that are connected are heard out first."""
        if self.tally is None:
            self.counters[0] = 1
            until(lambda: self.process.poll() is not None, timeout, "the load ends")
            assert self.process.returncode == 0, f"the load failed: {self.process.returncode}"
            found = json.loads(self.result.read_text(encoding="utf-8"))
            counts = {name: number for name, number in found["counts"].items() if name != "stop"}
            losses = [Loss(*loss) for loss in found["losses"]]
            by_pid = Counter({int(pid): number for pid, number in found["by_pid"].items()})
            self.tally = Tally(**counts, losses=losses, refused_at=found["refused_at"], by_pid=by_pid)
            self.close()
        return self.tally

    def check_nothing_lost(self, ledger: "Ledger", *, stopped: bool = False) -> None:
        """End it: every request was answered, once. None was refused either, unless the pool was `stopped` at times."""
        tally = self.stop()
        assert not account(tally, ledger)
        assert tally.lost == 0, tally
        assert stopped or tally.refused == 0, tally

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        shutil.rmtree(self.directory, ignore_errors=True)


class Ledger:
    """The book that the programs write, read as it grows."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.served: dict[str, int] = {}
        self.twice: list[str] = []
        self.by_pid: Counter[int] = Counter()
        self._offset = 0

    def read(self) -> "Ledger":
        """Take in what was written since."""
        if not self.path.exists():
            return self
        with self.path.open("rb") as file:
            file.seek(self._offset)
            text = file.read()
        whole = text[: text.rfind(b"\n") + 1]
        self._offset += len(whole)
        for line in whole.splitlines():
            pid, identity = line.decode().split(" ", 1)
            if identity in self.served:
                self.twice.append(identity)
            self.served[identity] = int(pid)
            self.by_pid[int(pid)] += 1
        return self

    def pids(self) -> set[int]:
        """Every worker that has served."""
        return set(self.read().by_pid)

    def wait_for_all(self, pids: Iterable[int], timeout: float = 10.0) -> None:
        """Each of `pids` has served something: it is surely ready."""
        wanted = set(pids)
        until(lambda: wanted <= self.pids(), timeout, f"all of {wanted} serve")


def account(tally: Tally, ledger: Ledger, killed: Iterable[int] = ()) -> list[str]:
    """What is wrong with this load: nothing, if each lost request was in progress in a killed process of its own."""
    ledger.read()
    hands = Counter(killed)
    wrong = [f"served twice: {identity}" for identity in ledger.twice]
    nowhere = []
    for loss in tally.losses:
        pid = ledger.served.get(loss.identity)
        if pid is None:
            nowhere.append(loss)
        elif hands[pid]:
            hands[pid] -= 1
        else:
            wrong.append(f"lost by {pid}, which was not killed or had lost another one: {loss}")
    if len(nowhere) > hands.total():
        wrong += [
            f"in no ledger, and only {hands.total()} killed processes could have had it: {loss}" for loss in nowhere
        ]
    if tally.lost > len(tally.losses):
        wrong.append(f"{tally.lost} losses, too many to be listed")
    in_ledger = sum(identity in ledger.served for identity in (loss.identity for loss in tally.losses))
    own = sum(ledger.by_pid.values()) - in_ledger
    if own < tally.ok:
        wrong.append(f"{tally.ok} answers, but {own} in the ledger: it cannot be trusted")
    return wrong


def stop_and_start(program: Program, again: Callable[[], Program], loads: Iterable[Load], number: int) -> None:
    """Stop a program under these loads so many times, and in between start it `again` on its addresses."""
    for turn in range(number):
        if turn:
            program = again().ready()
        for load in loads:
            load.more(200)
        assert program.stop().code == 0
        program.finish()

"""One life of a pool, with a fault in one phase of it, and the verdict."""

import enum
import random
import re
import signal
import socket
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from support import Address, Program, ask, converse, descriptors, dial, patterns, title, until
from sweep import faults
from sweep.faults import Fault
from sweep.tracer import Tracer

STAGED = Path(__file__).with_name("staged.py")
PROGRAMS = ("command", "script")
PHASES = ("start", "serve", "hang", "stop", "drain", "quit")
RECOVERY = 5.0  # seconds after the fault in which the pool has its size, and obeys
REFUSALS = (1, 2, 3, 4)  # exit codes of a start that is refused
DICE = random.SystemRandom()

HANDLER = "from work import Work as Handler\n"
BROKEN = "raise RuntimeError('a deploy that is broken')\n"
# In its probe all is well.
CRASHING = "import setproctitle\nfrom work import Work as Handler\n'probe' in setproctitle.getproctitle() or 1 / 0\n"

# The last line of a program that Python ends for an exception, and of the command.
REASON = re.compile(r"prefork: error: .*|[\w.]*(Error|Exception)\b.*")
IMPORTING = re.compile(r'  File "<frozen importlib|(ImportError|ModuleNotFoundError): ')


class Outcome(enum.Enum):
    """How a life went. The first five are right."""

    OK = "ok"
    MISSED = "-"  # the call was not made so often
    REFUSED = "refused"  # the start, with a reason and an exit code
    IMPORT = "import"  # the start, with a traceback, for Python could not import a module
    LATE = "late"  # an order was obeyed only when the fault was over, and there was no other way
    DIED = "DIED"  # the master, once it served; or a start, without a reason
    DEAF = "DEAF"  # an order is not obeyed
    SHORT = "SHORT"  # workers are missing after the fault
    LOST = "LOST"  # a request was not answered
    GONE = "GONE"  # a worker ended for a call that failed once
    LEFT = "LEFT"  # something is left behind
    FAILED = "FAILED"  # the tool itself

    @property
    def right(self) -> bool:
        return self in (Outcome.OK, Outcome.MISSED, Outcome.REFUSED, Outcome.IMPORT, Outcome.LATE)


@dataclass(frozen=True, order=True)
class Cell:
    """A fault in a phase of a program's life; without one it is a census."""

    program: str
    phase: str
    fault: Fault | None = None

    def __str__(self) -> str:
        return f"{self.program} {self.phase} {self.fault or 'census'}"


@dataclass(frozen=True)
class Result:
    """What came of a cell."""

    cell: Cell
    outcome: Outcome
    detail: str = ""
    injected: list[str] = field(default_factory=list)
    counted: Counter[str] = field(default_factory=Counter)
    log: list[str] = field(default_factory=list)  # from the beginning of the fault on


class Judged(Exception):
    """The verdict is known before the end."""

    def __init__(self, outcome: Outcome, detail: str) -> None:
        super().__init__(detail)
        self.outcome, self.detail = outcome, detail


class Life:
    """A program from its start to its end; the fault's phase is that of the cell."""

    workers = 3

    def __init__(self, cell: Cell, stack: ExitStack) -> None:
        self.cell, self.stack = cell, stack
        self.injected: list[str] = []
        self.counted: Counter[str] = Counter()
        self.began_at = 0  # the fault, in the log
        self.size = self.workers
        # How long an event is waited for under the fault, which may well keep it from ever happening.
        self.patience = 0.6 if cell.fault and cell.fault.last is None else 1.5
        port = free_port()
        self.program = Program(
            STAGED,
            *self.arguments(port),
            stdin=True,
            files={"served.py": self.served},
            env={"PREFORK_LEDGER": "ledger"},
        )
        stack.callback(self.program.forget)
        stack.callback(self.program.kill)
        self.addresses = [Address("tcp", "127.0.0.1", port), Address("unix", str(self.program.run / "socket"))]

    def arguments(self, port: int) -> list[object]:
        settings = {
            "boot_timeout": 4,
            "request_timeout": 30 if self.cell.phase in ("stop", "drain", "quit") else 1,
            "graceful_timeout": 0.5 if self.cell.phase == "drain" else 10,
        }
        if self.cell.program == "script":
            return ["script", port, "{run}/socket", *(f"{name}={value}" for name, value in settings.items())]
        flags = [word for name, value in settings.items() for word in (f"--{name.replace('_', '-')}", value)]
        binds = ["-b", f"tcp://127.0.0.1:{port}", "-b", "unix:{run}/socket"]
        return ["command", "served:Handler", "-w", self.workers, *binds, *flags]

    @property
    def served(self) -> str:
        """The module that the command serves."""
        return HANDLER

    @property
    def traced(self) -> int:
        """The process whose calls fail."""
        return self.program.pid

    def go(self) -> Result:
        """Live it."""
        outcome, detail = Outcome.OK, ""
        try:
            getattr(self, self.cell.phase)()
        except Judged as judged:
            outcome, detail = judged.outcome, judged.detail
        except Exception as error:
            outcome, detail = Outcome.FAILED, f"{type(error).__name__}: {error}"
        if outcome is Outcome.OK and self.cell.fault and not self.injected:
            outcome = Outcome.MISSED
        return Result(self.cell, outcome, detail, self.injected, self.counted, self.log())

    # -- the phases

    def start(self) -> None:
        """The fault is in the start, which may be refused."""
        self.waits_for_us()
        with self.fault():
            self.program.tell("\n")
            self.settled(6.0)
        self.settled(RECOVERY)
        if not self.program.running:
            self.refused()
        self.serves()
        self.ends()

    def serve(self) -> None:
        """The fault is in a pool that serves, is reloaded, resized, and loses workers."""
        self.begin()
        before = self.descriptors()
        with self.fault():
            for event in (
                self.kill, self.reload, self.grow, self.dismiss, self.reload_broken, self.reload_crashing, self.shrink,
                self.reopen,
            ):  # fmt: skip
                event()
                self.alive()
                self.answers()
        self.serves(before)
        self.ends()

    def hang(self) -> None:
        """The fault is in a pool that ends a request which is past its deadline, and its worker."""
        self.begin()
        before = self.descriptors()
        client = self.occupy("stubborn")
        victim = self.occupied()
        with self.fault():
            client.settimeout(6.0 if self.patience > 1 else 3.0)
            with suppress(OSError):
                client.recv(1)
            self.best(lambda: victim not in self.program.children() and self.full())
            self.alive()
            self.answers()
        self.ends_requests(client)
        self.serves(before)
        self.ends()

    def stop(self) -> None:
        """The fault is in the end, from TERM on."""
        self.begin()
        self.ends_under_fault(signal.SIGTERM)

    def drain(self) -> None:
        """The same with a request in progress that does not end by itself."""
        self.begin()
        self.occupy("stubborn")
        self.ends_under_fault(signal.SIGTERM)

    def quit(self) -> None:
        """The same where the end may not wait for it."""
        self.begin()
        self.occupy("stubborn")
        self.ends_under_fault(signal.SIGQUIT)

    # -- its parts

    def waits_for_us(self) -> None:
        until(self.program.out_path.read_text, 20.0, "the program waits for its beginning", every=0.01)

    def begin(self) -> None:
        self.waits_for_us()
        self.program.tell("\n")
        until(self.full, 15.0, "the pool is ready", every=0.01)
        self.program.ready()  # the master has heard of it, and has all the descriptors that it will have

    def settled(self, timeout: float) -> None:
        """Wait until the start is over, one way or the other."""
        with suppress(AssertionError):
            until(lambda: not self.program.running or self.full(), timeout, every=0.01)

    @contextmanager
    def fault(self) -> Iterator[None]:
        self.began_at = self.program.mark
        tracer = Tracer(self.traced, self.program.directory, self.cell.fault)
        try:
            yield
        finally:
            tracer.detach()
            self.injected, self.counted = tracer.injected, tracer.counted()

    @contextmanager
    def otherwise(self, outcome: Outcome) -> Iterator[None]:
        """What fails inside is this; or its cause, where the master is ending."""
        try:
            yield
        except (AssertionError, OSError) as error:
            with suppress(AssertionError):
                until(lambda: not self.program.running, 0.5)
            self.alive()
            raise Judged(outcome, str(error) or repr(error)) from error

    def log(self) -> list[str]:
        return self.program.log_path.read_bytes()[self.began_at :].decode(errors="replace").splitlines()

    def touches(self, calls: set[str]) -> bool:
        return self.cell.fault is not None and self.cell.fault.call in calls

    def alive(self) -> None:
        if not self.program.running:
            raise Judged(Outcome.DIED, f"the master ended with {self.program.process.returncode}")

    def full(self) -> bool:
        """Whether there are as many workers as are wanted, and all say that they are ready.

        Where setproctitle could not be imported they say nothing, and it is `all_answer` that finds out.
        """
        titles = [title(pid) for pid in self.program.children()]
        if len(titles) != self.size:
            return False
        if not any("prefork: worker" in words for words in titles) and self.program.found(patterns.READY):
            return True
        return all(map(patterns.TITLE_READY.search, titles))

    def descriptors(self) -> Counter[str]:
        return descriptors(self.program.pid)

    def best(self, predicate: Callable[[], object]) -> None:
        """Wait until it is so, or, under the fault, for as long as it takes to give up."""
        with suppress(AssertionError):
            until(predicate, self.patience, every=0.005)

    def occupy(self, order: str) -> socket.socket:
        """A client whose request does not end. It is in progress when this returns."""
        client = self.stack.enter_context(dial(self.addresses[0]))
        client.sendall(f"client {order}\n".encode())
        until(self.occupied, 5.0, "the request is in progress")
        return client

    def occupied(self) -> int | None:
        """The worker that has it."""
        ledger = self.program.work / "ledger"
        text = ledger.read_text() if ledger.exists() else ""
        return next((int(line.split()[0]) for line in text.splitlines() if line.endswith(" client")), None)

    # -- what happens to it

    def strike(self, number: signal.Signals) -> Callable[[], bool]:
        """Send a signal to a worker. What is returned says whether it was replaced."""
        pids = self.program.children()
        if pids:
            with suppress(ProcessLookupError):  # it has just left
                self.program.send(number, pids[0])
        return lambda: self.full() and not set(pids[:1]) & set(self.program.children())

    def kill(self) -> None:
        self.best(self.strike(signal.SIGKILL))

    def dismiss(self) -> None:
        self.best(self.strike(signal.SIGTERM))

    def replaced(self, before: list[int]) -> bool:
        return self.full() and not set(before) & set(self.program.children())

    def reload(self) -> None:
        before = self.program.children()
        self.program.send(signal.SIGHUP)
        self.best(lambda: self.replaced(before))

    def reload_in_vain(self, text: str) -> None:
        if self.cell.program == "script":  # which imports nothing anew
            return
        mark = self.program.mark
        self.program.write("served.py", text)
        self.program.send(signal.SIGHUP)
        self.best(lambda: self.program.found(patterns.RELOAD_FAILED, since=mark))
        self.program.write("served.py", self.served)

    def reload_broken(self) -> None:
        self.reload_in_vain(BROKEN)

    def reload_crashing(self) -> None:
        self.reload_in_vain(CRASHING)

    def grow(self) -> None:
        self.size += 1
        self.program.send(signal.SIGTTIN)
        self.best(self.full)

    def shrink(self) -> None:
        self.size -= 1
        self.program.send(signal.SIGTTOU)
        self.best(self.full)

    def reopen(self) -> None:
        self.program.send(signal.SIGUSR1)

    # -- what must be so

    def answers(self) -> None:
        """Also under the fault."""
        with self.otherwise(Outcome.LOST):
            for address in self.addresses:
                self.request(address)

    def request(self, address: Address) -> None:
        ask(address, timeout=3.0)

    def serves(self, before: Counter[str] | None = None) -> None:
        """After the fault: the pool has its size, each worker answers, it does what it is told, and nothing is left."""
        self.alive()
        with self.otherwise(Outcome.SHORT):
            until(self.full, RECOVERY, f"{self.size} workers are ready", every=0.01)
        with self.otherwise(Outcome.LOST):
            until(self.all_answer, RECOVERY, "each worker answers")
        with self.otherwise(Outcome.SHORT):
            victim = self.program.children()[0]
            self.program.kill_workers(victim)
            until(
                lambda: victim not in self.program.children() and self.full(), RECOVERY, "a killed worker is replaced"
            )
        with self.otherwise(Outcome.DEAF):
            pids = self.program.children()
            self.program.send(signal.SIGHUP)
            until(lambda: self.replaced(pids), RECOVERY, "HUP: a new generation serves")
        self.ends_requests()
        self.answers()
        fault = self.cell.fault
        if not fault or (fault.call, fault.error) not in faults.NOT_COLLECTED:
            with self.otherwise(Outcome.LEFT):
                self.program.check_no_zombie()
        if before is not None and not self.touches(faults.NOT_CLOSED):
            with suppress(AssertionError):
                until(lambda: not self.descriptors() - before, 2.0, every=0.02)
            if more := self.descriptors() - before:
                raise Judged(Outcome.LEFT, f"descriptors: {dict(more)}")

    def ends_requests(self, client: socket.socket | None = None) -> None:
        """One that is past its deadline is ended, without an answer."""
        with self.otherwise(Outcome.DEAF):
            if client is None:
                client = self.stack.enter_context(dial(self.addresses[0]))
                client.sendall(b"client sleep 60\n")
            client.settimeout(RECOVERY)
            try:
                answer = client.recv(1)
            except TimeoutError:
                raise AssertionError(
                    f"after {RECOVERY:g} s nobody has ended a request of request_timeout 1 s"
                ) from None
            assert not answer, "a request past its deadline got an answer"

    def all_answer(self) -> bool:
        """A worker has one connection at a time: as many clients as workers have all of them."""
        with ExitStack() as stack:
            pairs = [(self.addresses[number % 2], number) for number in range(self.size)]
            clients = [(stack.enter_context(dial(address, 3.0)), address, number) for address, number in pairs]
            pids = {converse(client, address, "", f"client-{number}").pid for client, address, number in clients}
        return pids == set(self.program.children())  # or the last reload is still under way

    def ends(self) -> None:
        """TERM ends it, and nothing is left."""
        with self.otherwise(Outcome.DEAF):
            self.program.send(signal.SIGTERM)
            until(lambda: not self.program.running, RECOVERY, "TERM ends it", every=0.01)
        self.ended()

    def ends_under_fault(self, number: signal.Signals) -> None:
        """The signal ends it, under the fault or, where there is no other way, after it."""
        with self.fault():
            self.program.send(number)
            with suppress(AssertionError):
                until(lambda: not self.program.running, RECOVERY, every=0.01)
            late = self.program.running
        with self.otherwise(Outcome.DEAF):
            until(lambda: not self.program.running, RECOVERY, f"{number.name} ends it after the fault", every=0.01)
        self.ended()
        if late:
            excused = self.touches(set(faults.NO_OTHER_WAY))
            raise Judged(Outcome.LATE if excused else Outcome.DEAF, f"{number.name} was obeyed after the fault only")

    def ended(self) -> None:
        if code := self.program.process.returncode:
            raise Judged(Outcome.DIED, f"it ended with {code}, not 0")
        self.leaves_nothing()

    def refused(self) -> None:
        """The start was refused: by an exit code of its own, and a reason that is said; nothing is left."""
        code, lines = self.program.process.returncode, self.program.log.splitlines()
        reason = [line for line in lines if REASON.fullmatch(line)]
        if code not in REFUSALS or not (reason or self.touches(faults.NOT_SAID)):
            raise Judged(Outcome.DIED, f"the start ended with {code}, and no reason")
        self.leaves_nothing()
        said = f"{code}: {reason[-1] if reason else ''}"
        if self.cell.program == "command" and any(line.startswith("Traceback") for line in lines):
            imports = any(map(IMPORTING.match, lines))
            raise Judged(Outcome.IMPORT if imports else Outcome.DIED, f"a traceback, {said}")
        raise Judged(Outcome.REFUSED, said)

    def leaves_nothing(self) -> None:
        with suppress(AssertionError):
            until(lambda: not self.program.remaining(), 2.0)
        if remaining := [title(entry.pid) or entry.name for entry in self.program.remaining()]:
            raise Judged(Outcome.LEFT, f"processes: {', '.join(remaining)}")
        files = sorted(path.name for path in self.program.run.iterdir())
        fault = self.cell.fault
        excused = self.touches(faults.NOT_REMOVED) or (
            fault is not None and fault.when == "always" and self.touches(faults.NOT_KNOWN)
        )
        if files and not excused:
            raise Judged(Outcome.LEFT, f"files: {', '.join(files)}")


def free_port() -> int:
    """Below those that the kernel gives to clients by itself."""
    while True:
        port = DICE.randrange(20000, 30000)
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port

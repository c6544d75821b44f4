"""What every figure is made with: running servers, their clocks, the two kinds of clients, medians.

Rules of this room: loopback only; every wait has a deadline; a process is ended by the pid that was started, and only
while it still is that process; a reply is right to the last byte or the measurement fails with `Wrong`.  Linux only:
CPU time is read from other processes' clocks in nanoseconds (/proc counts in ticks of 10 ms), states from /proc.
"""

from __future__ import annotations

import json
import os
import resource
import select
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

HERE = Path(__file__).resolve().parent
TICK_NS = 1_000_000_000 // os.sysconf("SC_CLK_TCK")
PATIENCE = 30.0  # seconds that any single wait may take
QUIET_NS = 20_000  # a server that used less CPU than this in one look has nothing to do
LOOK = 0.005  # seconds between two looks at a clock

median = statistics.median


class Wrong(Exception):
    """A reply was wrong or missing, or a server did not do what it must: there is no figure then."""


def jain(counts: Sequence[float]) -> float:
    """Jain's index of fairness: 1 if all are equal, 1/n if one has everything."""
    return sum(counts) ** 2 / (len(counts) * sum(c * c for c in counts))


# ---- processes and their clocks


def stat(pid: int) -> list[str]:
    """The fields of /proc/PID/stat from the state (field 3) on."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()


def family(root: int) -> list[int]:
    """*root* and its descendants."""
    found, todo = [], [root]
    while todo:
        pid = todo.pop()
        found.append(pid)
        try:
            for thread in os.listdir(f"/proc/{pid}/task"):
                todo += map(int, Path(f"/proc/{pid}/task/{thread}/children").read_text().split())
        except OSError:
            pass  # it left
    return found


def cpu_ns(pids: Sequence[int]) -> int:
    """CPU time of processes, dead threads included, and of the children that they reaped (these in ticks of 10 ms)."""
    total = 0
    for pid in pids:
        try:
            total += time.clock_gettime_ns((~pid << 3) | 2)  # the kernel's name for the CPU clock of a process
            fields = stat(pid)
            total += (int(fields[13]) + int(fields[14])) * TICK_NS
        except OSError:
            pass
    return total


def busy_ns() -> int:
    """CPU time that the whole machine has spent, also that which its hypervisor took, in ticks of 10 ms."""
    user, nice, system, _idle, _wait, hard, soft, stolen = map(int, Path("/proc/stat").read_text().split()[1:9])
    return (user + nice + system + hard + soft + stolen) * TICK_NS


def switches(pids: Sequence[int]) -> int:
    """Context switches of processes, voluntary ones (each a wake-up) and others, over all their threads."""
    total = 0
    for pid in pids:
        try:
            for thread in os.listdir(f"/proc/{pid}/task"):
                for line in Path(f"/proc/{pid}/task/{thread}/status").read_text().splitlines():
                    if "ctxt_switches" in line:
                        total += int(line.split()[1])
        except OSError:
            pass
    return total


def wait_until(condition: Callable[[], bool], what: str, seconds: float = PATIENCE, step: float = LOOK) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise Wrong(f"not in {seconds:g} s: {what}")
        time.sleep(step)


# ---- servers


@dataclass
class Server:
    """A server as a subprocess: a context manager from its first line, the port, to its end."""

    name: str
    command: list[str]
    workers: int = 2
    process: subprocess.Popen[bytes] = field(init=False)
    port: int = field(init=False)
    lines: Iterator[str] = field(init=False)  # of its standard output

    def start(self, cwd: str | None = None) -> None:
        self._stderr = tempfile.TemporaryFile()  # noqa: SIM115  # it lives as long as the server
        environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(HERE.parent), *sys.path[1:]])}
        self.process = subprocess.Popen(
            self.command, stdout=subprocess.PIPE, stderr=self._stderr, env=environment, cwd=cwd
        )
        self.lines = self._read_lines()

    def __enter__(self) -> Server:
        self.start()
        try:
            self.port = int(next(self.lines))
        except (Wrong, StopIteration):
            self.__exit__()
            raise Wrong(f"{self.name} did not start: {self.last_words()}") from None
        return self

    def __exit__(self, *_: object) -> None:
        """TERM, patience, and then KILL for what is left of the family, each process by pid and start time."""
        started = {}
        for pid in family(self.process.pid):
            with suppress(OSError):
                started[pid] = stat(pid)[19]
        self.process.terminate()
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        for pid, when in started.items():
            with suppress(OSError):
                if stat(pid)[19] == when:
                    os.kill(pid, signal.SIGKILL)
        assert self.process.stdout
        self.process.stdout.close()

    def last_words(self) -> str:
        self._stderr.seek(0)
        lines = self._stderr.read().decode(errors="replace").strip().splitlines()
        return lines[-1] if lines else f"exit status {self.process.poll()}"

    def _read_lines(self) -> Iterator[str]:
        assert self.process.stdout
        fd, data = self.process.stdout.fileno(), b""
        while True:
            line, newline, rest = data.partition(b"\n")
            if newline:
                data = rest
                yield line.decode()
            elif not select.select([fd], [], [], PATIENCE)[0]:
                raise Wrong(f"{self.name} is silent")
            else:
                read = os.read(fd, 65536)
                if not read:
                    return
                data += read

    def family(self) -> list[int]:
        return family(self.process.pid)

    def children(self) -> list[int]:
        return self.family()[1:]

    def cpu_ns(self) -> int:
        return cpu_ns(self.family())

    def wait_for_workers(self) -> None:
        """Until all workers are there and nobody works any more."""
        wait_until(lambda: len(self.children()) >= self.workers, f"{self.workers} workers of {self.name}")
        self.wait_quiet()

    def wait_quiet(self, done: Callable[[], bool] = lambda: True, seconds: float = PATIENCE) -> None:
        """Until two looks in a row found the family idle, and *done* says that the work is."""
        last, idle = self.cpu_ns(), 0

        def quiet() -> bool:
            nonlocal last, idle
            now = self.cpu_ns()
            idle = idle + 1 if now - last < QUIET_NS else 0
            last = now
            return idle >= 2 and done()

        wait_until(quiet, f"{self.name} is idle", seconds)

    @contextmanager
    def stopped(self) -> Iterator[None]:
        """The family under SIGSTOP: what is sent meanwhile waits in the kernel."""
        pids = self.family()
        try:
            for pid in pids:
                os.kill(pid, signal.SIGSTOP)
            wait_until(lambda: all(stat(pid)[0] in "TZ" for pid in pids), f"{self.name} is stopped")
            yield
        finally:
            for pid in reversed(pids):
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGCONT)


def python_server(name: str, kind: str, handler: str = "echo", workers: int = 2) -> Server:
    """One of servers.py; kinds that serve without workers (stdlib's) are given 0."""
    command = [sys.executable, str(HERE / "servers.py"), kind, handler, "--workers", str(workers)]
    return Server(name, command, workers)


# ---- C


class Tools:
    """The C programs, compiled when first asked for into a folder that goes away; None where there is no compiler."""

    def __init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="prefork-benchmarks-")
        self._compiler = shutil.which(os.environ.get("CC", "cc"))
        self._built: dict[str, str | None] = {}

    def __call__(self, name: str) -> str | None:
        if name not in self._built:
            self._built[name] = self._compile(name)
        return self._built[name]

    def _compile(self, name: str) -> str | None:
        if self._compiler is None:
            return None
        target = f"{self._folder.name}/{name}"
        subprocess.run([self._compiler, "-O2", "-Wall", "-o", target, str(HERE / f"{name}.c")], check=True)
        return target

    def yard(self, name: str, *arguments: str, workers: int = 2) -> Server | None:
        program = self("yard")
        return Server(name, [program, arguments[0], str(workers), *arguments[1:]], workers) if program else None

    def close(self) -> None:
        self._folder.cleanup()


@dataclass
class Load:
    """What closed-loop clients saw in a time."""

    good: int
    rate: float
    pids: dict[int, int]
    p50: float  # milliseconds
    p99: float


@contextmanager
def load(
    program: str,
    server: Server,
    clients: int,
    seconds: float,
    *mode: str,
    protocol: str = "tcp",
    patience: float = PATIENCE,
) -> Iterator[Callable[[], Load]]:
    """Closed-loop clients of `load.c`, running inside the block; the value waits for their result."""
    command = [program, protocol, str(server.port), str(clients), str(seconds), *mode]
    process = subprocess.Popen(command, stdout=subprocess.PIPE)

    def result() -> Load:
        try:
            told = json.loads(process.communicate(timeout=seconds + patience)[0])
        except (subprocess.TimeoutExpired, ValueError):  # it hangs in connect(), or ended without a word
            raise Wrong(f"{server.name}: the clients came to no end") from None
        if told["bad"] or not told["good"]:
            raise Wrong(f"{server.name}: {told['bad']} of {told['bad'] + told['good']} replies wrong or missing")
        pids = {int(pid): count for pid, count in told["pids"].items()}
        return Load(told["good"], told["good_in_time"] / told["seconds"], pids, told["p50"], told["p99"])

    try:
        yield result
    finally:
        process.kill()
        process.wait()


# ---- queued requests


def raise_descriptor_limit(wanted: int) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(wanted, hard) if hard > 0 else wanted, hard))


def drain_stream(server: Server, count: int) -> float:
    """CPU nanoseconds a connection: *count* complete requests are queued, then the stopped server goes on.

    The clients sleep meanwhile, so that nothing but the server runs; that all of them have their end of file is asked
    of the kernel without reading.
    """
    clients, finished = [], select.poll()
    try:
        with server.stopped():
            for _ in range(count):
                client = socket.create_connection(("127.0.0.1", server.port))
                request = os.urandom(64)
                client.sendall(request)
                clients.append((client, request))
                finished.register(client, select.POLLRDHUP)
            before = server.cpu_ns()
        server.wait_quiet(lambda: len(finished.poll(0)) == count)
        used = server.cpu_ns() - before
        for client, request in clients:
            client.setblocking(False)
            if client.recv(4096) != request or client.recv(1):
                raise Wrong(f"{server.name}: a reply is wrong")
    finally:
        for client, _ in clients:
            client.close()
    return used / count


def drain_datagrams(server: Server, count: int, sockets: int = 20) -> float:
    """CPU nanoseconds a datagram, as `drain_stream`; several sockets, so that the replies find room."""
    clients = [socket.socket(type=socket.SOCK_DGRAM) for _ in range(sockets)]
    sent: list[list[bytes]] = [[] for _ in clients]
    replies: list[list[bytes]] = [[] for _ in clients]

    def all_came() -> bool:
        for client, received in zip(clients, replies, strict=True):
            with suppress(BlockingIOError):
                while True:
                    received.append(client.recv(8192))
        return sum(map(len, replies)) >= count

    try:
        for client in clients:
            client.connect(("127.0.0.1", server.port))
            client.setblocking(False)
        with server.stopped():
            for number in range(count):
                request = os.urandom(64)
                clients[number % sockets].send(request)
                sent[number % sockets].append(request)
            before = server.cpu_ns()
        server.wait_quiet(all_came)
        used = server.cpu_ns() - before
    finally:
        for client in clients:
            client.close()
    if any(sorted(came) != sorted(went) for came, went in zip(replies, sent, strict=True)):  # two workers: no order
        raise Wrong(f"{server.name}: a reply is wrong")
    return used / count


def room_for_datagrams() -> int:
    """How many small datagrams a socket can hold here, of at most 1,000: the kernel counts about 800 bytes for each."""
    limit = int(Path("/proc/sys/net/core/rmem_max").read_text())
    return min(1000, 2 * min(limit, 1 << 20) // 1600)

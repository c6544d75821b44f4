"""Measures prefork's worker classes `wsgi` and `asgi` beside other HTTP servers for Python, and prints one table.

    python benchmarks/web.py [--quick] [--reps N] [--only NAME ...]

Everybody serves the same hello-world with two workers, and every answer is checked. CPU is that of all processes of the
server, from the kernel's clocks, a request: over a queue of 400 connections that was filled while the server was
stopped, so that hardly anybody else runs, and under closed-loop clients, which share the processors and see the rate.
With keep-alive few clients are another matter than many: almost each of their requests wakes a worker that sleeps.

All servers of a repetition run at once and are visited in turn; ratios are taken between two visits of one round. What
does not serve, or not in time, is left out, and said so. The exit status is always 0.

(Not `http.py`: a folder of scripts is on the module path, and the standard library has an `http`.)
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import platform
import select
import shutil
import signal
import socket
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field

from measure import HERE, Server, Tools, Wrong, load, median, wait_until
from rows import Bench, Goal, Row, Samples, ratios
from run import LAYOUT, line
from web_app import BODY

WORKERS = "2"
DEADLINE = 10.0  # seconds that a visit may take beyond the time of its clients


@dataclass(frozen=True)
class Mode:
    """How requests come: *clients* of `web.c`, or a queue that is there at once if there are none."""

    name: str
    protocol: str
    clients: int = 0


CLOSE = (Mode("close, queued", "close"), Mode("close, 32", "close", 32))
KEEP = (Mode("keep-alive, 2", "keep", 2), Mode("keep-alive, 8", "keep", 8), Mode("keep-alive, 32", "keep", 32))
MODES = CLOSE + KEEP


class Web(Server):
    """A server that is told its port, and is there when it can be connected to."""

    def __enter__(self) -> Web:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.command = [word.replace("PORT", str(port)) for word in self.command]
        self.start(cwd=str(HERE))
        self.port = port
        try:
            wait_until(self._connects, f"{self.name} listens")
        except Wrong:
            self.__exit__()
            raise Wrong(f"{self.name} did not start: {self.last_words()}") from None
        return self

    def _connects(self) -> bool:
        if self.process.poll() is not None:
            raise Wrong(f"{self.name} ended")
        with suppress(OSError), socket.create_connection(("127.0.0.1", self.port), 1.0):
            return True
        return False


@dataclass(frozen=True)
class Rival:
    """How a server is started, the module that must be importable for it, and why it has no figure in some modes."""

    name: str
    module: str
    command: tuple[str, ...]
    modes: tuple[Mode, ...] = MODES
    why_not: str = ""
    queue: int = 400  # connections that are queued

    def problem(self) -> str:
        """Why it is not measured, or nothing."""
        if importlib.util.find_spec(self.module) is None and not program(self.command[0]):
            return f"{self.module} is not installed"
        return ""

    def server(self) -> Web:
        first = self.command[0]
        head = [sys.executable, "-m", first[3:]] if first.startswith("-m ") else [program(first) or first]
        return Web(self.name, [*head, *self.command[1:]], 2)


def program(name: str) -> str | None:
    """A program that was installed beside the interpreter, or is on the path."""
    beside = os.path.join(os.path.dirname(sys.executable), name)
    return beside if os.access(beside, os.X_OK) else shutil.which(name)


PREFORK = ("-m prefork", "-b", "tcp://127.0.0.1:PORT", "-w", WORKERS, "--log-level", "warning")
UWSGI = ("uwsgi", "--master", "--die-on-term", "--processes", WORKERS, "--disable-logging", "--listen", "1024",
         "--module", "web_app:wsgi")  # fmt: skip
GRANIAN = ("granian", "--host", "127.0.0.1", "--port", "PORT", "--workers", WORKERS, "--no-access-log")
GUNICORN = ("gunicorn", "--bind", "127.0.0.1:PORT", "--workers", WORKERS, "--log-level", "warning")
UVICORN = ("uvicorn", "--port", "PORT", "--workers", WORKERS, "--no-access-log", "--log-level", "warning",
           "--no-proxy-headers")  # fmt: skip

PREFORK_NAME, UWSGI_NAME, GRANIAN_NAME = "prefork wsgi", "uWSGI", "granian wsgi"
OUR_ASGI, UVICORN_NAME = "prefork asgi", "uvicorn"
RIVALS = (
    Rival(PREFORK_NAME, "httptools", (*PREFORK, "--worker-class", "wsgi", "web_app:wsgi")),
    Rival(
        "prefork wsgi, 4 threads", "httptools", (*PREFORK, "--worker-class", "wsgi", "--threads", "4", "web_app:wsgi")
    ),
    # Its workers speak HTTP themselves: one request a connection, or with http11 any number, even if the client says
    # `Connection: close`. Only behind its router it can keep more connections than it has workers.
    Rival(UWSGI_NAME, "uwsgi", (*UWSGI, "--http-socket", "127.0.0.1:PORT"), CLOSE, "it keeps no connection"),
    Rival("uWSGI http11", "uwsgi", (*UWSGI, "--http11-socket", "127.0.0.1:PORT"), KEEP[:1],
          "a connection holds its worker until the client ends it"),
    Rival("uWSGI, router", "uwsgi", (*UWSGI, "--http", "127.0.0.1:PORT", "--http-keepalive=1")),
    Rival(GRANIAN_NAME, "granian", (*GRANIAN, "--interface", "wsgi", "web_app:wsgi")),
    Rival("gunicorn sync", "gunicorn", (*GUNICORN, "web_app:wsgi"), CLOSE, "it keeps no connection"),
    Rival("gunicorn gthread", "gunicorn", (*GUNICORN, "--threads", "4", "web_app:wsgi")),
    Rival(OUR_ASGI, "uvicorn", (*PREFORK, "--worker-class", "asgi", "web_app:asgi")),
    Rival(UVICORN_NAME, "uvicorn", (*UVICORN, "web_app:asgi")),
    Rival("gunicorn uvicorn_worker", "uvicorn_worker",
          (*GUNICORN, "-k", "uvicorn_worker.UvicornWorker", "web_app:asgi")),
    # Its workers have asyncio listen anew, with asyncio's backlog of 100, whatever `--backlog` says.
    Rival("gunicorn asgi", "gunicorn", (*GUNICORN, "-k", "asgi", "web_app:asgi"), queue=100),
    Rival("granian asgi", "granian", (*GRANIAN, "--interface", "asgi", "web_app:asgi")),
)  # fmt: skip
GOALS = (
    (CLOSE, PREFORK_NAME, UWSGI_NAME, 1.3),
    (CLOSE, PREFORK_NAME, GRANIAN_NAME, 0.6),
    (CLOSE, OUR_ASGI, UVICORN_NAME, 1.1),
    (KEEP, PREFORK_NAME, GRANIAN_NAME, 0.4),
    (KEEP, OUR_ASGI, UVICORN_NAME, 1.1),
)


def drain(server: Server, count: int) -> float:
    """CPU nanoseconds a connection: *count* complete requests are queued, then the stopped server goes on.

    A client sleeps until it has its answer and the end of its connection, and then closes at once, as clients do:
    gunicorn's workers wait for that, each time up to 2 s (RFC 9112, 9.6), before they go on.
    """
    request = (
        f"GET / HTTP/1.1\r\nHost: 127.0.0.1:{server.port}\r\nUser-Agent: web\r\nConnection: close\r\n\r\n".encode()
    )
    clients: dict[int, socket.socket] = {}
    ended, deadline = select.poll(), time.monotonic() + DEADLINE
    try:
        with server.stopped():
            for _ in range(count):
                client = socket.create_connection(("127.0.0.1", server.port), DEADLINE)
                client.sendall(request)
                clients[client.fileno()] = client
                ended.register(client, select.POLLRDHUP)
            before = server.cpu_ns()
        while clients:
            for fd, _ in ended.poll(DEADLINE * 1000):
                ended.unregister(fd)
                with clients.pop(fd) as client:
                    answer = client.recv(8192)
                if not (answer.startswith(b"HTTP/1.1 200 ") and answer.endswith(b"\r\n\r\n" + BODY)):
                    raise Wrong(f"{server.name}: an answer is wrong: {answer!r}")
            if time.monotonic() > deadline:
                raise Wrong(f"{len(clients)} of {count} queued requests have no answer after {DEADLINE:g} s")
        server.wait_quiet(seconds=DEADLINE)
        return (server.cpu_ns() - before) / count
    finally:
        for client in clients.values():
            client.close()


@dataclass
class Found:
    """What was measured: by mode and server, CPU nanoseconds a request and requests a second; or why not."""

    cpu: dict[Mode, Samples] = field(default_factory=lambda: {mode: {} for mode in MODES})
    rates: dict[tuple[Mode, str], list[float]] = field(default_factory=dict)
    missing: dict[tuple[str, str], list[str]] = field(default_factory=dict)  # modes, by server and why

    def leave_out(self, modes: Iterable[Mode], name: str, why: str) -> None:
        for mode in modes:
            self.cpu[mode].pop(name, None)
            if mode.name not in (names := self.missing.setdefault((name, why), [])):
                names.append(mode.name)

    def cell(self, mode: Mode, name: str) -> str:
        if name not in self.cpu[mode]:
            return f"{'-':>7} {'':>8}"
        cpu = median([median(values) for values in self.cpu[mode][name]]) / 1000
        return f"{cpu:7.1f} " + (f"{median(self.rates[mode, name]):8,.0f}" if mode.clients else f"{'':>8}")


def visit(rival: Rival, server: Server, mode: Mode, client: str, seconds: float) -> tuple[float, float]:
    """CPU nanoseconds a request, and requests a second."""
    if not mode.clients:
        return drain(server, rival.queue), 0.0
    before = server.cpu_ns()
    with load(
        client, server, mode.clients, seconds, BODY.decode(), protocol=mode.protocol, patience=DEADLINE
    ) as result:
        seen = result()
    return (server.cpu_ns() - before) / seen.good, seen.rate


def repetition(found: Found, bench: Bench, rivals: list[Rival], client: str, number: int) -> None:
    """Starts all servers and visits them in all modes, round by round, in an order that changes; one round warms up."""
    seconds, rounds = (0.25, 3) if bench.quick else (0.4, 5)
    with ExitStack() as stack:
        running = []
        for rival in rivals:
            try:
                server = stack.enter_context(rival.server())
                server.wait_for_workers()
                running.append((rival, server))
            except (Wrong, OSError) as error:
                found.leave_out(rival.modes, rival.name, str(error))
        for mode in MODES:
            for rival, _ in running:
                if mode in rival.modes and (number == 0 or rival.name in found.cpu[mode]):
                    found.cpu[mode].setdefault(rival.name, []).append([])
        for turn in range(rounds + 1):
            start = (number + turn) % len(running) if running else 0
            for mode in MODES:
                for rival, server in running[start:] + running[:start]:
                    if rival.name not in found.cpu[mode]:
                        continue
                    try:
                        cpu, rate = visit(rival, server, mode, client, seconds if turn else seconds / 4)
                    except (Wrong, OSError) as error:
                        found.leave_out([mode], rival.name, str(error))
                    else:
                        if turn:
                            found.cpu[mode][rival.name][-1].append(cpu)
                            found.rates.setdefault((mode, rival.name), []).append(rate)


def table(found: Found, rivals: list[Rival]) -> Iterator[str]:
    yield f"{'':26}" + "".join(f"  {mode.name:>16}" for mode in MODES)
    yield f"{'':26}" + "".join(f"  {'us':>7} {'/s' if mode.clients else '':>8}" for mode in MODES)
    for rival in rivals:
        yield (f"  {rival.name:24}" + "".join(f"  {found.cell(mode, rival.name)}" for mode in MODES)).rstrip()
    for (name, why), modes in found.missing.items():
        yield f"  {name}: left out ({'; '.join(modes)}): {why}"
    yield LAYOUT.format("CPU a request", "median", "", "goal", "met", "over the repetitions")
    for group, ours, other, bound in GOALS:
        for mode in group:
            yield line(Row(f"{mode.name}: {ours} / {other}", ratios(found.cpu[mode], ours, other), "x",
                           Goal("<=", bound, "x")))  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="fewer and shorter rounds: a look, not a figure")
    parser.add_argument("--reps", type=int, default=0, metavar="N", help="repetitions (3; 1 with --quick)")
    parser.add_argument("--only", action="append", metavar="NAME", help="servers whose name contains this")
    arguments = parser.parse_args()
    if sys.platform != "linux":
        print("these benchmarks read Linux's clocks; there is nothing to show here")
        return
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that the servers end too
    tools, started, found = Tools(), time.monotonic(), Found()
    rivals: list[Rival] = []
    try:
        client = tools("web")
        if client is None:
            print("there is no compiler, and the clients are in C; nothing is measured")
            return
        bench = Bench(tools, arguments.quick, max(1, arguments.reps or (1 if arguments.quick else 3)), True)
        print(f"Python {platform.python_version()}, Linux {platform.release()}, {os.cpu_count()} processors, "
              f"{WORKERS} workers, {bench.repetitions} repetitions", flush=True)  # fmt: skip
        for rival in RIVALS:
            if problem := rival.problem():
                print(f"  {rival.name}: left out, {problem}")
            elif not arguments.only or any(part in rival.name for part in arguments.only):
                rivals.append(rival)
                found.leave_out([mode for mode in MODES if mode not in rival.modes], rival.name, rival.why_not)
        for number in range(bench.repetitions):
            repetition(found, bench, rivals, client, number)
    except KeyboardInterrupt:
        print("interrupted")
        return
    finally:
        tools.close()
    for text in table(found, rivals):
        print(text)
    print(f"{time.monotonic() - started:.0f} s")


if __name__ == "__main__":
    main()

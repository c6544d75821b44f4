"""Measures prefork's worker classes `wsgi` and `asgi` beside other HTTP servers for Python, and prints one table.

    python benchmarks/web.py [--quick] [--reps N] [--only NAME ...]

Everybody serves the same hello-world with two workers, and every answer is checked. CPU is that of all processes of the
server, from the kernel's clocks, a request: with `close` over a queue of 400 connections that was filled while the
server was stopped, so that nobody else runs; with `keep-alive` under closed-loop clients. The rate is always that under
the clients, with which the server shares the processors.

All servers of a repetition run at once and are visited in turn; ratios are taken between two visits of one round. A
server that is not installed is left out, and said so. The exit status is always 0.

(Not `http.py`: a folder of scripts is on the module path, and the standard library has an `http`.)
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import platform
import select
import shutil
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass

from measure import HERE, Server, Tools, Wrong, load, median, wait_until
from rows import Bench, Goal, Row, in_turn, ratios
from run import LAYOUT, line
from web_app import BODY

WORKERS = "2"
CLIENTS = 32
CLOSE, KEEP = "close", "keep-alive"


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
    """How a server is started, and the module that must be importable for it."""

    name: str
    module: str
    command: tuple[str, ...]
    modes: tuple[str, ...] = (CLOSE, KEEP)

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
UWSGI = (
    "uwsgi",
    "--master",
    "--processes",
    WORKERS,
    "--disable-logging",
    "--listen",
    "1024",
    "--module",
    "web_app:wsgi",
)
GRANIAN = ("granian", "--host", "127.0.0.1", "--port", "PORT", "--workers", WORKERS, "--no-access-log")
GUNICORN = ("gunicorn", "--bind", "127.0.0.1:PORT", "--workers", WORKERS, "--log-level", "warning")
UVICORN = ("uvicorn", "--port", "PORT", "--workers", WORKERS, "--no-access-log", "--log-level", "warning",
           "--no-proxy-headers")  # fmt: skip

OURS, UWSGI_NAME, GRANIAN_NAME = "prefork wsgi", "uWSGI", "granian wsgi"
OUR_ASGI, UVICORN_NAME = "prefork asgi", "uvicorn"
RIVALS = (
    Rival(OURS, "httptools", (*PREFORK, "--worker-class", "wsgi", "web_app:wsgi")),
    Rival(
        "prefork wsgi, 4 threads", "httptools", (*PREFORK, "--worker-class", "wsgi", "--threads", "4", "web_app:wsgi")
    ),
    # http-socket: its workers speak HTTP themselves, one request a connection. Keep-alive takes its router in front
    # (with http11-socket a kept connection holds a worker, and more clients than workers are not served).
    Rival(UWSGI_NAME, "uwsgi", (*UWSGI, "--http-socket", "127.0.0.1:PORT"), (CLOSE,)),
    Rival("uWSGI, router", "uwsgi", (*UWSGI, "--http", "127.0.0.1:PORT", "--http-keepalive=1"), (KEEP,)),
    Rival(GRANIAN_NAME, "granian", (*GRANIAN, "--interface", "wsgi", "web_app:wsgi")),
    Rival("gunicorn sync", "gunicorn", (*GUNICORN, "web_app:wsgi"), (CLOSE,)),
    Rival("gunicorn gthread", "gunicorn", (*GUNICORN, "--threads", "4", "web_app:wsgi")),
    Rival(OUR_ASGI, "uvicorn", (*PREFORK, "--worker-class", "asgi", "web_app:asgi")),
    Rival(UVICORN_NAME, "uvicorn", (*UVICORN, "web_app:asgi")),
    Rival(
        "gunicorn uvicorn_worker", "uvicorn_worker", (*GUNICORN, "-k", "uvicorn_worker.UvicornWorker", "web_app:asgi")
    ),
    Rival("gunicorn asgi", "gunicorn", (*GUNICORN, "-k", "asgi", "web_app:asgi")),
    Rival("granian asgi", "granian", (*GRANIAN, "--interface", "asgi", "web_app:asgi")),
)
GOALS = (
    (CLOSE, OURS, UWSGI_NAME, Goal("<=", 1.3, "x")),
    (CLOSE, OURS, GRANIAN_NAME, Goal("<=", 0.6, "x")),
    (CLOSE, OUR_ASGI, UVICORN_NAME, Goal("<=", 1.1, "x")),
    (KEEP, OURS, GRANIAN_NAME, Goal("<=", 0.4, "x")),
    (KEEP, OUR_ASGI, UVICORN_NAME, Goal("<=", 1.1, "x")),
)


def drain(server: Server, count: int) -> float:
    """CPU nanoseconds a connection: *count* complete requests are queued, then the stopped server goes on alone."""
    clients, finished = [], select.poll()
    request = (
        f"GET / HTTP/1.1\r\nHost: 127.0.0.1:{server.port}\r\nUser-Agent: web\r\nConnection: close\r\n\r\n".encode()
    )
    try:
        with server.stopped():
            for _ in range(count):
                client = socket.create_connection(("127.0.0.1", server.port))
                client.sendall(request)
                clients.append(client)
                finished.register(client, select.POLLRDHUP)
            before = server.cpu_ns()
        server.wait_quiet(lambda: len(finished.poll(0)) == count)
        used = server.cpu_ns() - before
        for client in clients:
            answer = client.recv(8192)
            if not (answer.startswith(b"HTTP/1.1 200 ") and answer.endswith(b"\r\n\r\n" + BODY)):
                raise Wrong(f"{server.name}: an answer is wrong: {answer!r}")
    finally:
        for client in clients:
            client.close()
    return used / count


def figures(mode: str, bench: Bench, rivals: list[Rival], client: str) -> Iterator[Row]:
    """CPU and rate of each, and the ratios that there are goals for."""
    seconds = 0.4 if bench.quick else 1.0
    rates: dict[str, list[float]] = {}

    def visit(server: Server) -> float:
        before = server.cpu_ns()
        with load(
            client, server, CLIENTS, seconds, BODY.decode(), protocol="close" if mode == CLOSE else "keep"
        ) as run:
            result = run()
        rates.setdefault(server.name, []).append(result.rate)
        used = (server.cpu_ns() - before) / result.good
        return drain(server, 400) if mode == CLOSE else used

    measured = []
    for rival in rivals:
        if mode in rival.modes:
            try:
                with rival.server() as server:
                    server.wait_for_workers()
                    visit(server)
                measured.append(rival)
            except (Wrong, OSError) as error:
                yield Row(rival.name, [], note=f"does not serve here: {error}")
    rates.clear()
    samples = in_turn(bench, [rival.server for rival in measured], 3 if bench.quick else 5, visit)
    for name, repetitions in samples.items():
        yield Row(f"{name}: CPU", [median(values) / 1000 for values in repetitions], "us")
    for name in samples:
        yield Row(f"{name}: rate", [median(rates[name])], "/s")
    for wanted, ours, other, goal in GOALS:
        if wanted == mode:
            note = "" if {ours, other} <= samples.keys() else "not measured"
            yield Row(f"{ours} / {other}", ratios(samples, ours, other), "x", goal, note)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="fewer and shorter rounds: a look, not a figure")
    parser.add_argument("--reps", type=int, default=0, metavar="N", help="repetitions (3; 1 with --quick)")
    parser.add_argument("--only", action="append", metavar="NAME", help="servers whose name contains this")
    arguments = parser.parse_args()
    if sys.platform != "linux":
        print("these benchmarks read Linux's clocks; there is nothing to show here")
        return
    tools, started = Tools(), time.monotonic()
    try:
        client = tools("web")
        if client is None:
            print("there is no compiler, and the clients are in C; nothing is measured")
            return
        bench = Bench(tools, arguments.quick, max(1, arguments.reps or (1 if arguments.quick else 3)), True)
        print(f"Python {platform.python_version()}, Linux {platform.release()}, {os.cpu_count()} processors, "
              f"{WORKERS} workers, {CLIENTS} clients, {bench.repetitions} repetitions")  # fmt: skip
        rivals = []
        for rival in RIVALS:
            if problem := rival.problem():
                print(f"  {rival.name}: left out, {problem}")
            elif not arguments.only or any(part in rival.name for part in arguments.only):
                rivals.append(rival)
        print(LAYOUT.format("figure", "median", "", "goal", "met", "over the repetitions"))
        for mode in (CLOSE, KEEP):
            print(f"{mode}:", flush=True)
            try:
                for row in figures(mode, bench, rivals, client):
                    print(line(row), flush=True)
            except (Wrong, OSError, ValueError) as error:
                print(f"  failed: {type(error).__name__}: {error}")
    finally:
        tools.close()
    print(f"{time.monotonic() - started:.0f} s")


if __name__ == "__main__":
    main()

"""The same programs on each class of workers, as one table: rate, latency, CPU a request, memory a worker.

    python benchmarks/workers.py [--reps N] [--seconds S]

Programs: `echo` (64 bytes, a connection each), `slow` (the same echo while so many clients send one byte a second and
never finish), `check` (the same by a handler class that has `has_request()`), `cpu` (about 1 ms of bytecode a request).
Every pool has 2 workers, a `thread` worker 16 threads. The latency is that of the 8 fast clients, from connect to the
last byte. A row whose fast clients got nothing says so: that is a figure too. `wsgi`, with as many threads, serves a
hello-world; its slow clients send the head of a request.

Linux only; needs a C compiler for the clients. `serve CLASS PROGRAM` is what this file starts itself.
"""

from __future__ import annotations

import argparse
import os
import platform
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import web_app
from measure import HERE, Server, Tools, Wrong, load, median, raise_descriptor_limit
from servers import ADDRESS, BACKLOG, LIFE_SECONDS, Echo, Primes, announce, count_primes

WORKERS, THREADS, CLIENTS = 2, 16, 8
CLASSES = ("sync", "thread", "asyncio", "wsgi")
PROGRAMS = ("echo", "slow", "check", "cpu")
NAMES = {"slow": "echo", "check": "echo with has_request()"}
# How many slow clients: none to spare, one worker's worth, all but two threads, and far more than there are threads.
SLOW = {
    "sync": (1, 1000),
    "thread": (WORKERS * THREADS - 2, 1000),
    "asyncio": (WORKERS * THREADS - 2, 1000),
    "wsgi": (WORKERS * THREADS - 2, 1000),
}
CPU_LIMIT = 3000  # the number whose primes are counted

# ---- the servers


def handler(kind: str, program: str) -> Any:
    import prefork

    if kind == "wsgi":
        return {"echo": web_app.wsgi, "slow": web_app.wsgi, "cpu": _primes}[program]
    if kind != "asyncio":
        return {"echo": Echo, "cpu": Primes, "slow": _whole(prefork), "check": _checked(prefork)}[program]

    class AsyncEcho(prefork.AsyncStreamRequestHandler):
        async def handle(self) -> None:
            self.writer.write(await self.reader.read(4096))

    class AsyncWhole(prefork.AsyncStreamRequestHandler):
        async def handle(self) -> None:
            self.writer.write(await self.reader.readexactly(64))

    class AsyncPrimes(prefork.AsyncStreamRequestHandler):
        async def handle(self) -> None:
            self.writer.write(b"%d\n" % count_primes(int(await self.reader.read(64))))

    return {"echo": AsyncEcho, "slow": AsyncWhole, "cpu": AsyncPrimes}[program]


def _primes(environ: dict[str, Any], start_response: Callable[..., Any]) -> list[bytes]:
    body = b"%d\n" % count_primes(CPU_LIMIT)
    start_response("200 OK", [("Content-Type", "text/plain"), ("Content-Length", str(len(body)))])
    return [body]


def _whole(prefork: Any) -> Any:
    class Whole(prefork.StreamRequestHandler):  # type: ignore[misc]
        """Echoes 64 bytes once all of them are there."""

        def handle(self) -> None:
            self.wfile.write(self.rfile.read(64))

    return Whole


def _checked(prefork: Any) -> Any:
    class Checked(_whole(prefork)):  # type: ignore[misc]
        """Is asked, before it is given a thread, whether they are."""

        @staticmethod
        def has_request(data: bytes) -> bool:
            return len(data) >= 64

    return Checked


def serve(kind: str, program: str) -> None:
    import prefork

    signal.alarm(LIFE_SECONDS)
    raise_descriptor_limit(4096)
    attributes = {"workers": WORKERS, "threads": THREADS, "worker_class": kind, "request_queue_size": BACKLOG}
    pool = type("Pool", (prefork.PreforkTCPServer,), {**attributes, "graceful_timeout": 0.0})
    with pool(ADDRESS, handler(kind, program)) as server:
        announce(server)
        server.serve_forever()


# ---- the clients


@contextmanager
def slow_clients(port: int, count: int) -> Iterator[None]:
    """*count* connections that send a byte a second each, spread over the second.

    It is the head of a request that never ends, which to a server of echoes is as good as any other bytes.
    """
    text = b"GET / HTTP/1.1\r\nX: " + b"x" * 1000
    ended = threading.Event()
    clients = [socket.create_connection(("127.0.0.1", port)) for _ in range(count)]
    for client in clients:
        client.setblocking(False)

    def send() -> None:
        for second in range(len(text)):
            for number in range(10):
                for client in clients[number::10]:
                    with suppress(OSError):
                        client.send(text[second : second + 1])
                if ended.wait(0.1):
                    return

    thread = threading.Thread(target=send)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        for client in clients:
            client.close()


def private_bytes(pids: list[int]) -> float:
    """Memory that only these processes have, a process."""
    total = 0
    for pid in pids:
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            if line.startswith("Private_"):
                total += int(line.split()[1]) * 1024
    return total / len(pids)


# ---- the table


def row(tools: Tools, kind: str, program: str, slow: int, seconds: float) -> tuple[float, float, float, float]:
    """Rate a second, p99 in ms, CPU microseconds a request, and private MiB a worker."""
    web = kind == "wsgi"
    binary = tools("web" if web else "load")
    if binary is None:
        raise Wrong("no C compiler")
    primes = f"{count_primes(CPU_LIMIT)}\n" if program == "cpu" else ""
    if web:
        protocol, mode = "close", [primes or web_app.BODY.decode()]
    else:
        protocol, mode = "tcp", ["fixed", f"{CPU_LIMIT}\n", primes] if primes else ["echo"]
    command = [sys.executable, str(HERE / "workers.py"), "serve", kind, program]
    with Server(f"{kind} {program}", command, WORKERS) as server:
        server.wait_for_workers()
        with slow_clients(server.port, slow):
            if slow:
                time.sleep(0.5)  # so that the slow ones are served first
            before = server.cpu_ns()
            with load(binary, server, CLIENTS, seconds, *mode, protocol=protocol) as result:
                seen = result()
            spent = server.cpu_ns() - before
            return seen.rate, seen.p99, spent / 1e3 / seen.good, private_bytes(server.children()) / 1048576


def cases() -> Iterator[tuple[str, str, int]]:
    for program in PROGRAMS:
        for kind in CLASSES if program != "check" else ("thread",):
            for slow in {"slow": SLOW[kind], "check": (0, 1000)}.get(program, (0,)):
                yield program, kind, slow


def table(tools: Tools, repetitions: int, seconds: float) -> Iterator[str]:
    yield "| program | workers | requests a second | p99 | CPU a request | own memory a worker |"
    yield "|---|---|---|---|---|---|"
    found: dict[tuple[str, str, int], list[tuple[float, float, float, float]]] = {case: [] for case in cases()}
    failed: dict[tuple[str, str, int], str] = {}
    for _ in range(repetitions):
        for case in found:
            try:
                found[case].append(row(tools, case[1], case[0], case[2], seconds))
            except (Wrong, OSError, subprocess.SubprocessError) as error:
                failed[case] = str(error)
    for (program, kind, slow), rows in found.items():
        what = {"echo": "hello", "slow": "hello"}.get(program, program) if kind == "wsgi" else program
        what = NAMES.get(what, what)
        name = f"{slow} slow clients, {what}" if slow else what
        if (program, kind, slow) in failed:
            yield f"| {name} | {kind} | none: {failed[program, kind, slow]} | | | |"
            continue
        rate, p99, cpu, memory = (median(column) for column in zip(*rows, strict=True))
        yield f"| {name} | {kind} | {rate:,.0f} | {p99:.1f} ms | {cpu:,.0f} us | {memory:.1f} MiB |"


def main() -> None:
    if sys.argv[1:2] == ["serve"]:
        serve(*sys.argv[2:4])
        return
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--reps", type=int, default=3, metavar="N")
    parser.add_argument("--seconds", type=float, default=2.0, metavar="S", help="of load, a row")
    arguments = parser.parse_args()
    raise_descriptor_limit(4096)
    tools = Tools()
    print(f"Python {platform.python_version()}, Linux {platform.release()}, {os.cpu_count()} processors, "
          f"{WORKERS} workers, {THREADS} threads in a thread worker, {CLIENTS} fast clients, "
          f"medians of {arguments.reps}\n")  # fmt: skip
    try:
        for text in table(tools, arguments.reps, arguments.seconds):
            print(text, flush=True)
    finally:
        tools.close()


if __name__ == "__main__":
    main()

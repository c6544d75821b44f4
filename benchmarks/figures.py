"""The figures: each a function that measures and yields its rows.

Rules of this room: what is measured and which goal it has is said here and nowhere else; servers that are compared are
visited in turn (`in_turn`), everything that touches a process is in `measure`.
"""

from __future__ import annotations

import functools
import os
import signal
import socket
import time
from collections.abc import Iterator
from dataclasses import dataclass

from measure import (
    Load,
    Server,
    Wrong,
    busy_ns,
    drain_datagrams,
    drain_stream,
    jain,
    load,
    median,
    python_server,
    raise_descriptor_limit,
    room_for_datagrams,
    switches,
)
from rows import C_LOOP, NO_COMPILER, NO_PREFORK, Bench, Figure, Goal, Makers, Row, cost_rows, in_turn, ratio
from servers import count_primes

# ---- 1 and 2: the cost of a request


def drain(bench: Bench) -> Iterator[Row]:
    """CPU a TCP connection: 1,000 queued requests of 64 bytes, 2 workers, client asleep."""
    raise_descriptor_limit(2000)
    servers: Makers = [
        lambda: bench.tools.yard(C_LOOP, "tcp"),
        lambda: python_server("bare loop", "bare"),
        lambda: python_server("naive serve_forever", "naive"),
        lambda: python_server("ThreadingTCPServer", "threading", workers=0),
        lambda: python_server("ForkingTCPServer", "forking", workers=0),
    ]
    if bench.has_prefork:
        servers[2:2] = [
            lambda: python_server("prefork", "prefork"),
            lambda: python_server("prefork Stream", "prefork", "stream"),
        ]
    count = 300 if bench.quick else 1000

    def measure(server: Server) -> float:
        return drain_stream(server, count // 10 if server.name.startswith("Forking") else count)

    samples = in_turn(bench, servers, 4 if bench.quick else 9, measure)
    yield from cost_rows(samples, "us")
    for one, other, goal in (
        ("bare loop", C_LOOP, None),
        ("naive serve_forever", C_LOOP, None),
        ("ThreadingTCPServer", C_LOOP, None),
        ("ForkingTCPServer", C_LOOP, None),
        ("prefork", "bare loop", Goal("<=", 1.05)),
        ("prefork", C_LOOP, Goal("<=", 1.35)),
        ("prefork Stream", C_LOOP, Goal("<=", 1.7)),
        ("ThreadingTCPServer", "prefork", Goal(">=", 10)),
    ):
        yield ratio(samples, one, other, goal)


def udp(bench: Bench) -> Iterator[Row]:
    """UDP echo: CPU a datagram from a queue, 2 workers; and, with the goal, the rate with 64 clients."""
    servers: Makers = [
        lambda: bench.tools.yard(C_LOOP, "udp"),
        lambda: python_server("bare loop", "bare-datagram", "datagram"),
    ]
    if bench.has_prefork:
        servers += [lambda: python_server("prefork", "prefork-datagram", "datagram")]
    count = room_for_datagrams()
    samples = in_turn(bench, servers, 5 if bench.quick else 15, lambda server: drain_datagrams(server, count))
    yield from cost_rows(samples, "us")
    yield ratio(samples, C_LOOP, "bare loop")
    yield ratio(samples, "prefork", "bare loop")
    yield ratio(samples, C_LOOP, "prefork")

    program = bench.tools("load")
    if program is None:
        yield Row("rate", [], note=NO_COMPILER)
        return

    def rate(server: Server) -> float:
        with load(program, server, 64, 0.3 if bench.quick else 0.5, "echo", protocol="udp") as result:
            return result().rate

    samples = in_turn(bench, servers, 2 if bench.quick else 4, rate)
    yield ratio(samples, "bare loop", C_LOOP, label="rate: ")
    yield ratio(samples, "prefork", C_LOOP, Goal(">=", 0.65), label="rate: ")


# ---- 3: many workers


@dataclass
class Sharing:
    """How workers shared a load."""

    load: Load
    fairness: float
    switches: float


def share(bench: Bench, server: Server, program: str) -> Sharing:
    """Closed-loop clients for a second; workers that nobody woke count as zeros."""
    pids = server.children()
    before = switches(server.family())
    with load(program, server, 16, 0.5 if bench.quick else 1.5, "tag") as result:
        seen = result()
    if not set(seen.pids) <= set(pids):
        raise Wrong(f"{server.name}: replies from processes that are no workers: {set(seen.pids) - set(pids)}")
    counts = [seen.pids.get(pid, 0) for pid in pids]
    return Sharing(seen, jain(counts), (switches(server.family()) - before) / seen.good)


def fairness(bench: Bench) -> Iterator[Row]:
    """Requests a worker under closed-loop load of 16 clients: Jain's index; at 64 workers also switches and rate."""
    program = bench.tools("load")
    if program is None:
        yield Row("Jain's index", [], note=NO_COMPILER)
        return
    for workers in (2, 8, 64):
        found: dict[str, list[Sharing]] = {}

        def measure(server: Server, found: dict[str, list[Sharing]] = found) -> float:
            found.setdefault(server.name, []).append(share(bench, server, program))
            return found[server.name][-1].load.rate

        servers: Makers = [
            lambda workers=workers: bench.tools.yard(C_LOOP, "tcp", "tag", workers=workers)  # type: ignore[misc]
        ]
        if bench.has_prefork:
            servers.append(functools.partial(python_server, "prefork", "prefork", "tag", workers))
        rates = in_turn(bench, servers, 2, measure)
        for name, shares in found.items():
            goal = Goal(">=", 0.99) if name == "prefork" else None
            yield Row(f"Jain, {workers} workers: {name}", [s.fairness for s in shares], goal=goal)
        if workers == 64:
            for name, shares in found.items():
                goal = Goal("<=", 2) if name == "prefork" else None
                yield Row(f"switches a connection, 64 workers: {name}", [s.switches for s in shares], goal=goal)
            yield Row("rate, 64 workers: C loop", [median(values) for values in rates[C_LOOP]], "/s")
            yield ratio(rates, "prefork", C_LOOP, Goal(">=", 0.8), label="rate, 64 workers: ")


# ---- 4 to 6: a pool's life


def ready_ms(server: Server) -> tuple[float, float | None]:
    """From just before serve_forever() to the last worker's setup(), and to the line "pool ready", in milliseconds."""
    start, workers, ready = 0, [], None
    with server:
        for line in server.lines:
            event, _, when = line.split()
            if event == "start":
                start = int(when)
            elif event == "worker":
                workers.append(int(when))
            else:
                ready = (int(when) - start) / 1e6
            if len(workers) == server.workers and (ready or "prefork" not in server.name):
                break
    if len(workers) < server.workers:
        raise Wrong(f"{server.name}: {len(workers)} of {server.workers} workers")
    return (max(workers) - start) / 1e6, ready


def ready(bench: Bench) -> Iterator[Row]:
    """From serve_forever() to workers that are ready, by their own setup() and by the master's line in the log."""
    for workers, goal in ((64, Goal("<=", 200, "ms")), (256, Goal("<=", 400, "ms"))):
        bare, setups, lines = [], [], []
        for _ in range(bench.repetitions):
            bare.append(ready_ms(python_server("bare fork", "bare-ready", workers=workers))[0])
            if bench.has_prefork:
                last, line = ready_ms(python_server("prefork", "prefork-ready", workers=workers))
                setups.append(last)
                if line is not None:
                    lines.append(line)
        yield Row(f"{workers} bare forks", bare, "ms")
        note = "" if bench.has_prefork else NO_PREFORK
        yield Row(f"{workers} workers, last setup()", setups, "ms", goal, note)
        yield Row(f"{workers} workers, line in the log", lines, "ms", goal, note)


def ask(port: int, request: bytes = b"\n") -> tuple[socket.socket, int]:
    """A connection to a `Hold` handler, and the pid that answered it."""
    client = socket.create_connection(("127.0.0.1", port), timeout=10)
    client.sendall(request)
    return client, read_pid(client)


def read_pid(client: socket.socket) -> int:
    reply = b""
    while not reply.endswith(b"\n"):
        data = client.recv(64)
        if not data:
            raise Wrong("no pid came back")
        reply += data
    return int(reply)


def kill(bench: Bench) -> Iterator[Row]:
    """kill -9 of a worker to the next answer: of the only one; of one of two busy ones while a connection is queued."""
    if not bench.has_prefork:
        yield Row("kill -9", [], note=NO_PREFORK)
        return
    goal, kills = Goal("<=", 10, "ms"), 5 if bench.quick else 20
    alone, queued = [], []
    for _ in range(bench.repetitions):
        with python_server("prefork", "prefork", "hold", workers=1) as server:
            alone += [kill_the_only_worker(server) for _ in range(kills)]
        with python_server("prefork", "prefork", "hold", workers=2) as server:
            queued += [kill_a_busy_worker(server) for _ in range(kills)]
    for name, values in (("the only worker", alone), ("one of two busy, one connection queued", queued)):
        yield Row(name, values, "ms", goal)
        yield Row(f"{name}: the slowest of {len(values)}", [max(values)], "ms")


def kill_the_only_worker(server: Server) -> float:
    client, victim = ask(server.port)
    client.close()
    server.wait_for_workers()
    start = time.perf_counter()
    os.kill(victim, signal.SIGKILL)
    while True:
        try:
            client, successor = ask(server.port)
        except (ConnectionError, Wrong):  # the dying worker still took it; a client would ask again
            continue
        elapsed = (time.perf_counter() - start) * 1000
        client.close()
        if successor == victim:
            raise Wrong("a killed worker answered")
        return elapsed


def kill_a_busy_worker(server: Server) -> float:
    server.wait_for_workers()
    holders = [ask(server.port, b"hold\n") for _ in range(2)]
    with socket.create_connection(("127.0.0.1", server.port), timeout=10) as waiting:
        waiting.sendall(b"\n")
        start = time.perf_counter()
        os.kill(holders[0][1], signal.SIGKILL)
        read_pid(waiting)
        elapsed = (time.perf_counter() - start) * 1000
    for client, _ in holders:
        client.close()
    return elapsed


def idle(bench: Bench) -> Iterator[Row]:
    """A pool of 8 that nobody asks anything: context switches of the workers, and what the master does."""
    if not bench.has_prefork:
        yield Row("idle", [], note=NO_PREFORK)
        return
    seconds = 3 if bench.quick else 10
    with python_server("prefork", "prefork", workers=8) as server:
        server.wait_for_workers()
        time.sleep(1)
        workers, master = server.children(), [server.process.pid]
        before = switches(workers), switches(master), server.cpu_ns()
        time.sleep(seconds)
        after = switches(workers), switches(master), server.cpu_ns()
    yield Row(f"wake-ups of 8 workers in {seconds} s", [after[0] - before[0]], goal=Goal("<=", 0))
    yield Row(f"wake-ups of the master in {seconds} s", [after[1] - before[1]])
    yield Row("CPU of the pool a minute", [(after[2] - before[2]) / 1e6 * 60 / seconds], "ms", Goal("<=", 1, "ms"))


# ---- 7: work for the processors


def cpu(bench: Bench) -> Iterator[Row]:
    """Requests of about 3 ms of bytecode, a worker a processor, 8 clients: share of all processors used, and rate."""
    program = bench.tools("load")
    if program is None:
        yield Row("CPU-bound work", [], note=NO_COMPILER)
        return
    processors = len(os.sched_getaffinity(0))
    limit = limit_for(0.003)
    mode = ("fixed", f"{limit}\n", f"{count_primes(limit)}\n")
    seconds, edge = (1.0, 0.2) if bench.quick else (2.0, 0.25)
    used: dict[str, list[float]] = {}
    left: dict[str, list[float]] = {}

    def measure(server: Server) -> float:
        with load(program, server, 8, seconds + 2 * edge, *mode) as result:
            time.sleep(edge)
            start, before, machine = time.perf_counter(), server.cpu_ns(), busy_ns()
            time.sleep(seconds)
            available = (time.perf_counter() - start) * processors * 1e9
            spent = server.cpu_ns() - before
            others = busy_ns() - machine - spent
            used.setdefault(server.name, []).append(spent / available * 100)
            left.setdefault(server.name, []).append(spent / (available - others) * 100)
            return result().rate

    servers: Makers = [lambda: python_server("ThreadingTCPServer", "threading", "primes", workers=0)]
    if bench.has_prefork:
        servers += [lambda: python_server("prefork", "prefork", "primes", processors)]
    rates = in_turn(bench, servers, 1 if bench.quick else 2, measure)
    for name, repetitions in rates.items():
        goal = Goal(">=", 95, "%") if name == "prefork" else None
        yield Row(f"{name}: requests", [median(values) for values in repetitions], "/s")
        yield Row(f"{name}: of {processors} processors", used[name], "%", goal)
        yield Row(f"{name}: of what other programs left of them", left[name], "%")
    yield ratio(rates, "prefork", "ThreadingTCPServer", Goal(">=", 1.9))


def limit_for(seconds: float) -> int:
    """The number whose primes take about *seconds* to count here."""
    limit = 1000
    while True:
        start = time.process_time()
        count_primes(limit)
        if time.process_time() - start >= seconds:
            return limit
        limit += limit // 4


FIGURES: dict[str, Figure] = {
    "drain": drain, "udp": udp, "fairness": fairness, "ready": ready, "kill": kill, "idle": idle, "cpu": cpu,
}  # fmt: skip

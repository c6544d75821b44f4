"""The servers under measurement, each a program of its own: ``python servers.py KIND HANDLER [--workers N]``.

Rules of this room: a server binds a free port of 127.0.0.1 and prints it as its first line; it serves until TERM; every
kind has the same backlog and the same handlers, so that a ratio between two of them is the price of what is between the
kernel and the handler.  An alarm ends a server whose driver died.  Nothing here is tuned but prefork itself.
"""

from __future__ import annotations

import argparse
import logging
import os
import signal
import socket
import socketserver
import struct
import sys
import time
from collections.abc import Callable
from functools import lru_cache
from typing import Any

BACKLOG = 1024
RECEIVE_BUFFER = 1 << 20
LIFE_SECONDS = 900
ADDRESS = ("127.0.0.1", 0)


# ---- handlers: what every kind serves


class Echo(socketserver.BaseRequestHandler):
    def handle(self) -> None:
        self.request.sendall(self.request.recv(4096))


class EchoStream(socketserver.StreamRequestHandler):
    def handle(self) -> None:
        self.wfile.write(self.rfile.read1(4096))


class EchoDatagram(socketserver.BaseRequestHandler):
    def handle(self) -> None:
        data, sock = self.request
        sock.sendto(data, self.client_address)


class Tag(socketserver.BaseRequestHandler):
    """An echo followed by the pid that served it."""

    def handle(self) -> None:
        self.request.sendall(self.request.recv(4096) + own_tag())


class Hold(socketserver.BaseRequestHandler):
    """Answers with its pid; a client that said ``hold`` then keeps the worker until it leaves."""

    def handle(self) -> None:
        asked = self.request.recv(64)
        self.request.sendall(b"%d\n" % os.getpid())
        if asked == b"hold\n":
            self.request.recv(64)


class Primes(socketserver.BaseRequestHandler):
    """Work for a processor: how many primes are below the number asked."""

    def handle(self) -> None:
        self.request.sendall(b"%d\n" % count_primes(int(self.request.recv(64))))


@lru_cache(maxsize=1)
def own_tag() -> bytes:
    """First asked for by a worker, in its own process."""
    return struct.pack("=q", os.getpid())


def count_primes(limit: int) -> int:
    """Primes below *limit* by trial division: bytecode that holds the interpreter's lock, as much of it as is asked."""
    count = 0
    for n in range(2, limit):
        for divisor in range(2, int(n**0.5) + 1):
            if n % divisor == 0:
                break
        else:
            count += 1
    return count


HANDLERS: dict[str, type[socketserver.BaseRequestHandler]] = {
    "echo": Echo, "stream": EchoStream, "datagram": EchoDatagram, "tag": Tag, "hold": Hold, "primes": Primes,
}  # fmt: skip


# ---- rivals


def announce(server: socket.socket | socketserver.BaseServer) -> None:
    sock = server if isinstance(server, socket.socket) else server.socket  # type: ignore[attr-defined]
    if sock.type == socket.SOCK_DGRAM:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, RECEIVE_BUFFER)
    print(sock.getsockname()[1], flush=True)


def fork_workers(count: int, work: Callable[[], object]) -> None:
    """Runs *work* in *count* children until TERM: the least a prefork server can be."""
    pids = []
    signal.signal(signal.SIGTERM, lambda *_: sys.exit())
    for _ in range(count):
        pid = os.fork()
        if not pid:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            signal.alarm(LIFE_SECONDS)
            try:
                work()
            finally:
                os._exit(1)
        pids.append(pid)
    try:
        while True:
            signal.pause()
    finally:
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)


def bare_stream(handler: str, workers: int) -> None:
    """The loop that prefork's whole chain is compared with; it serves "echo" only."""
    listener = socket.create_server(ADDRESS, backlog=BACKLOG)
    announce(listener)

    def serve() -> None:
        while True:
            connection, _ = listener.accept()
            connection.sendall(connection.recv(4096))
            connection.close()

    fork_workers(workers, serve)


def bare_datagram(handler: str, workers: int) -> None:
    sock = socket.socket(type=socket.SOCK_DGRAM)
    sock.bind(ADDRESS)
    announce(sock)

    def serve() -> None:
        while True:
            data, peer = sock.recvfrom(8192)
            sock.sendto(data, peer)

    fork_workers(workers, serve)


class Threading(socketserver.ThreadingTCPServer):
    request_queue_size = BACKLOG
    daemon_threads = True


class Forking(socketserver.ForkingTCPServer):
    request_queue_size = BACKLOG


class Single(socketserver.TCPServer):
    request_queue_size = BACKLOG


def threading(handler: str, workers: int) -> None:
    serve_alone(Threading(ADDRESS, HANDLERS[handler]))


def forking(handler: str, workers: int) -> None:
    serve_alone(Forking(ADDRESS, HANDLERS[handler]))


def serve_alone(server: socketserver.BaseServer) -> None:
    signal.signal(signal.SIGTERM, lambda *_: os._exit(0))
    announce(server)
    server.serve_forever()


def naive(handler: str, workers: int) -> None:
    """What one writes first: fork, and call serve_forever() in each child."""
    server = Single(ADDRESS, HANDLERS[handler])
    server.socket.setblocking(False)
    announce(server)
    fork_workers(workers, server.serve_forever)


def bare_ready(handler: str, workers: int) -> None:
    """Forks children that say so and wait: the least time in which a pool can be ready."""
    listener = socket.create_server(ADDRESS, backlog=BACKLOG)
    announce(listener)

    def wait() -> None:
        stamp("worker")
        listener.accept()

    stamp("start")
    fork_workers(workers, wait)


# ---- prefork


def stamp(event: str) -> None:
    """One line, one write: the time of an event on the clock that all processes share."""
    os.write(1, b"%s %d %d\n" % (event.encode(), os.getpid(), time.monotonic_ns()))


def pool(handler: str, workers: int, server_class: str = "PreforkTCPServer", **attributes: Any) -> None:
    import prefork

    attributes |= {"workers": workers, "request_queue_size": BACKLOG}
    chosen = type("Pool", (getattr(prefork, server_class),), attributes)
    with chosen(ADDRESS, HANDLERS[handler]) as server:
        announce(server)
        if "worker_class" in attributes:
            stamp("start")
        server.serve_forever()


def pool_datagram(handler: str, workers: int) -> None:
    pool(handler, workers, "PreforkUDPServer")


def pool_ready(handler: str, workers: int) -> None:
    """Stamps each worker's setup(), and the master's own line "pool ready"."""
    import prefork

    class Stamping(prefork.SyncWorker):
        def setup(self) -> None:
            super().setup()
            stamp("worker")

    class ReadyLine(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if record.getMessage().startswith("pool ready"):
                stamp("ready")

    logging.basicConfig(level=logging.INFO, handlers=[ReadyLine()])
    pool(handler, workers, worker_class=Stamping)


KINDS: dict[str, Callable[[str, int], None]] = {
    "bare": bare_stream, "bare-datagram": bare_datagram, "bare-ready": bare_ready, "threading": threading,
    "forking": forking, "naive": naive, "prefork": pool, "prefork-datagram": pool_datagram, "prefork-ready": pool_ready,
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("kind", choices=KINDS)
    parser.add_argument("handler", choices=HANDLERS)
    parser.add_argument("--workers", type=int, default=2)
    arguments = parser.parse_args()
    signal.alarm(LIFE_SECONDS)
    KINDS[arguments.kind](arguments.handler, arguments.workers)


if __name__ == "__main__":
    main()

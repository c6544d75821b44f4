"""Pools whose handlers say when a request is complete, and clients that are slow to send one."""

import socket
from contextlib import ExitStack
from typing import Any

from . import Program, descriptors, dial, until
from .scripts import TCP, Start, launch, rest

UNIX = 'str(RUN / "s")'
# A pool of workers with two threads, whose handler waits for a line. `CLASS`, `HANDLER` and `SETTINGS` are bodies.
POOL = """
from prefork.workers.handlers.threaded import ThreadWorker
from work import Work

class Patient(ThreadWorker):
    CLASS

class Lines(Handler):
    HANDLER

    def handle(self):
        note("handled")
        super().handle()

BEFORE

class Pool(BASE):
    worker_class = Patient
    workers = 1
    threads = 2
    SETTINGS

with Pool(ADDRESS, Lines) as server:
    server.serve_forever()
"""
LINE = 'has_request = staticmethod(lambda data: b"\\n" in data)'
NONE = "PATIENCE = 30.0"


def pool(
    start: Start,
    *settings: str,
    worker: str = NONE,
    handler: str = LINE,
    base: str = "prefork.PreforkTCPServer",
    address: str = TCP,
    before: str = "",
    **options: Any,
) -> Program:
    body = (
        POOL.replace("CLASS", worker)
        .replace("HANDLER", handler)
        .replace("BEFORE", before)
        .replace("BASE", base)
        .replace("SETTINGS", "\n    ".join(settings))
        .replace("ADDRESS", address)
    )
    return launch(start, body, **options).ready()


def unix(start: Start, *settings: str, **options: Any) -> Program:
    return pool(start, *settings, base="prefork.PreforkUnixStreamServer", address=UNIX, **options)


class Slow:
    """Clients of a worker that have sent a part of their request, and that it has accepted; `beside` other sockets."""

    def __init__(
        self, program: Program, worker: int, stack: ExitStack, number: int, part: bytes = b"slow", beside: int = 1
    ) -> None:
        self.socks = [stack.enter_context(dial(program.address, 20)) for _ in range(number)]
        for index, sock in enumerate(self.socks):
            if part:
                sock.sendall(part + b"-%d" % index)
        until(lambda: descriptors(worker)["socket"] == beside + number, 5, f"{number} are accepted")

    def finish(self) -> list[bytes]:
        for sock in self.socks:
            sock.sendall(b"\n")
        return [rest(sock) for sock in self.socks]


def answers(worker: int, number: int, name: bytes = b"slow") -> list[bytes]:
    return [b"%d:%s-%d:done\n" % (worker, name, index) for index in range(number)]


def ended(sock: socket.socket) -> bytes:
    """All that comes until the end of the stream, which may be a reset."""
    try:
        return rest(sock)
    except ConnectionResetError:
        return b"reset"

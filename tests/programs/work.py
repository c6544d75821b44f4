"""The handlers of the test programs: a request is `ID [ORDER [ARGUMENT]]`, its answer `PID:ID[:RESULT]` and a newline.

Before anything is done, `PID ID` is appended to the ledger ($PREFORK_LEDGER), in one write with O_APPEND. No
import of prefork: the standard library's servers run them too.
"""

import functools
import hashlib
import os
import signal
import socketserver
import sys
import time


@functools.cache
def _ledger() -> int:
    return os.open(os.environ["PREFORK_LEDGER"], os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)


def note(name: str, line: str) -> None:
    """Append a line to the file that the environment variable `name` names, if it names one."""
    if path := os.environ.get(name):
        descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        os.write(descriptor, line.encode() + b"\n")
        os.close(descriptor)


def perform(order: str, argument: str) -> str | None:
    """Do what the client ordered; what it returns is in the answer."""
    match order:
        case "":
            return None
        case "pid":
            return str(os.getppid())
        case "sleep":
            time.sleep(float(argument))
        case "slices":  # a sleep in pieces: it needs the processor again and again
            for _ in range(int(float(argument) / 0.02)):
                time.sleep(0.02)
        case "spin":  # in C, with the interpreter's lock, deaf to Python's signal handlers
            sum(range(10**13))
        case "spin-free":  # in C, without the lock, as deaf
            hashlib.pbkdf2_hmac("sha256", b"a", b"b", 2**31 - 1)
        case "busy":  # in Python
            while True:
                pass
        case "stubborn":  # catches everything
            while True:
                try:
                    time.sleep(60)
                except BaseException as error:
                    note("PREFORK_NOTES", f"stubborn {os.getpid()} {type(error).__name__}")
        case "exit":
            os._exit(int(argument))
        case "leave":
            sys.exit(int(argument))
        case "interrupt":
            raise KeyboardInterrupt
        case "segfault":
            os.kill(os.getpid(), signal.SIGSEGV)
        case "raise":
            raise ValueError(argument)
        case "fill":
            return "x" * int(argument)
        case _:
            raise AssertionError(f"unknown order {order!r}")
    return None


class Orders(socketserver.BaseRequestHandler):
    """What the two handlers share: `rfile` and `wfile` are the streams, or the one datagram."""

    version = ""

    def handle(self) -> None:
        line = self.rfile.readline()  # type: ignore[attr-defined]  # of the class that stands beside
        identity, _, order = line.decode().strip().partition(" ")
        if not identity:
            return
        pid = os.getpid()
        os.write(_ledger(), f"{pid} {identity}\n".encode())
        name, _, argument = order.partition(" ")
        try:
            result = self.version if name == "version" else perform(name, argument)
        except BaseException as error:
            note("PREFORK_NOTES", f"raised {pid} {identity} {type(error).__name__}")
            raise
        answer = f"{pid}:{identity}\n" if result is None else f"{pid}:{identity}:{result}\n"
        self.wfile.write(answer.encode())  # type: ignore[attr-defined]


class Work(Orders, socketserver.StreamRequestHandler):
    """For streams."""


class DatagramWork(Orders, socketserver.DatagramRequestHandler):
    """For datagrams."""

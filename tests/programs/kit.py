"""What the small programs in the tests share: handlers that answer `PID:ID:RESULT`, notes, and a second way to be
steered.

A program is written beside its test, begins with `from kit import *`, and runs in a directory of its own: a file
that the test puts there
opens a gate or sets off what `when` was given. $PREFORK_NOTES is the file of notes.
"""

import logging
import os
import select
import signal
import socket
import socketserver
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import prefork
from work import note as _note

logging.basicConfig(level=logging.INFO, format="%(asctime)s prefork[%(process)d] %(levelname)s: %(message)s")

HOME = Path.cwd()
RUN = HOME.parent / "run"


def note(line: str) -> None:
    """Append a line, told apart by its first word."""
    _note("PREFORK_NOTES", line)


def pass_gate(name: str) -> None:
    """Wait until the test makes the file `name`."""
    while not (HOME / name).exists():
        select.select([], [], [], 0.005)


def linger(seconds: float) -> None:
    """Take so long, where an interrupt comes through at once."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        time.sleep(0.01)


def when(name: str, act: Callable[[], object]) -> threading.Thread:
    """Call `act` in a thread once the test makes the file `name`."""

    def run() -> None:
        pass_gate(name)
        act()
        note(f"done {name}")

    thread = threading.Thread(target=run, name=f"when-{name}", daemon=True)
    thread.start()
    return thread


def perform(order: str) -> str:
    """Do what a client ordered."""
    word, _, rest = order.partition(" ")
    match word:
        case "gate":
            note(f"begun {rest}")
            pass_gate(rest)
        case "thread":
            return threading.current_thread().name
        case "raise":
            raise ValueError("ordered trouble")
        case "leave":
            sys.exit(int(rest))
        case "interrupt":
            raise KeyboardInterrupt
        case "exit":
            os._exit(int(rest))
        case "run":
            return str(subprocess.run(["/bin/sh", "-c", f"exit {rest}"], check=False).returncode)
        case "hang":  # in Python: every signal is heard
            note(f"begun {os.getpid()}")
            while True:
                select.select([], [], [], 0.01)
        case "deaf":  # in C, with the interpreter's lock
            note(f"begun {os.getpid()}")
            sum(range(10**13))
    return "done"


class Answering(socketserver.BaseRequestHandler):
    """One line in, one line out; a subclass overrides `answer`."""

    server: Any

    def answer(self, order: str) -> str:
        return perform(order)

    def handle(self) -> None:
        line = self.rfile.readline().decode().strip()  # type: ignore[attr-defined]  # of the class that stands beside
        identity, _, order = line.partition(" ")
        if identity:
            result = self.answer(order)
            self.wfile.write(f"{os.getpid()}:{identity}:{result}\n".encode())  # type: ignore[attr-defined]


class Handler(Answering, socketserver.StreamRequestHandler):
    """For streams."""


class Datagrams(Answering, socketserver.DatagramRequestHandler):
    """For datagrams."""


__all__ = [
    "HOME",
    "RUN",
    "Any",
    "Callable",
    "Datagrams",
    "Handler",
    "Path",
    "linger",
    "logging",
    "note",
    "os",
    "pass_gate",
    "perform",
    "prefork",
    "select",
    "signal",
    "socket",
    "socketserver",
    "subprocess",
    "sys",
    "threading",
    "time",
    "when",
]

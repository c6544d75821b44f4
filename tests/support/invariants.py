"""What the tests of the design's invariants share: every kind of address, and requests that are in progress."""

import signal
import socket
from collections.abc import Callable
from contextlib import ExitStack

from . import Address, Ledger, Load, Program, ask, dial, patterns, until

Start = Callable[..., Program]
Run = Callable[..., Load]
TCP = "tcp://127.0.0.1:0"
UNIX = "unix:{run}/socket"
POLITE = {"tcp": TCP, "unix": UNIX}
EVERY = {**POLITE, "udp": "udp://127.0.0.1:0", "unixgram": "unixgram:{run}/socket"}
APP = """
from work import Work

class Handler(Work):
    version = "{version}"
"""


def in_hand(address: Address, stack: ExitStack, *orders: str) -> list[socket.socket]:
    """Connections whose orders are being obeyed, one a worker."""
    connections = []
    for order in orders:
        connection = stack.enter_context(dial(address))
        connection.sendall(f"hold {order}\n".encode())
        connections.append(connection)
    return connections


def wait_busy(ledger: Ledger, number: int) -> None:
    until(lambda: len(ledger.read().served) + len(ledger.twice) >= number, 5, f"{number} requests have begun")


def reload(program: Program, timeout: float = 20.0) -> None:
    """HUP, until the new generation serves and the workers of the old one are gone."""
    before, mark = program.children(), program.mark
    program.send(signal.SIGHUP)
    program.wait_for(patterns.RELOADED, timeout, since=mark)
    until(lambda: not set(before).intersection(program.children()), timeout, "the old generation is gone")


def command(*arguments: object) -> tuple[object, ...]:
    return ("prefork", "app:Handler", "-b", TCP, "-w", 2, *arguments)


def check_still_serves(program: Program, version: str) -> None:
    for _ in range(8):
        assert ask(program.address, "version").result == version

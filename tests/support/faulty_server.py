"""Servers in which a call of the system fails while the test's file `refuse` exists, and what must hold then."""

import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from .clients import ask
from .control import within
from .program import Program
from .scripts import Start, launch

SERVER = """
class Server(prefork.PreforkTCPServer):
    workers = 2
    request_timeout = {timeout}

with Server(("127.0.0.1", 0), {handler}) as server:
    server.serve_forever()
"""

REFUSE = """
import errno, selectors

def refusing(call, error, *, times=None):
    left = [times]
    def replaced(*arguments, **named):
        if (HOME / "refuse").exists() and left[0] != 0:
            if left[0]:
                left[0] -= 1
            raise OSError(error, os.strerror(error))
        return call(*arguments, **named)
    return replaced
"""


def begin(start: Start, before: str, timeout: float | None = None, handler: str = "Handler", **options: Any) -> Program:
    program = launch(start, REFUSE + before + SERVER.format(timeout=timeout, handler=handler), **options).ready()
    program.wait_ready(2)
    return program


@contextmanager
def soon(seconds: float) -> Iterator[None]:
    """The block takes no longer than this."""
    begun = time.monotonic()
    yield
    within(time.monotonic() - begun, seconds)


def check_alive(program: Program) -> None:
    """It answers, has its size, replaces a worker, and obeys."""
    ask(program.address)
    workers = program.wait_ready(2)
    program.kill_workers(workers[0])
    program.wait_ready(2, without=workers[:1])
    program.send(signal.SIGTTIN)
    program.wait_ready(3)
    assert program.stop().code == 0

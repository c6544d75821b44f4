"""An epoll that has no room (ENOSPC of epoll_ctl, fs.epoll.max_user_watches) costs a connection, and never a worker."""

import functools
from collections.abc import Callable
from contextlib import ExitStack, suppress
from pathlib import Path

import pytest

from support import Address, Program, ask, dial, until
from support.clients import queued
from support.faults import failing
from support.scripts import Start, path_of_modules, rest
from support.web import Unanswered, Web

pytestmark = pytest.mark.timeout(60)

PROGRAMS = """
import asyncio
from kit import *
import prefork.workers.asgi.worker
from prefork.workers.eventloop.asyncio_worker import AsyncioWorker

def wsgi(environ, start_response):
    start_response("200 OK", [("Content-Length", "2")])
    return [b"ok"]

async def asgi(scope, receive, send):
    assert scope["type"] == "http"
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]})
    await send({"type": "http.response.body", "body": b"ok"})

def new_loop(worker):
    return asyncio.SelectorEventLoop()

class PlainASGI(prefork.workers.asgi.worker.ASGIWorker):
    new_loop = new_loop

class PlainAsyncio(AsyncioWorker):
    new_loop = new_loop

class Filtered(Handler):
    has_request = staticmethod(lambda data: b"\\n" in data)

class Coroutine(prefork.AsyncStreamRequestHandler):
    async def handle(self):
        identity = (await self.reader.readline()).decode().split()
        if identity:
            self.writer.write(f"{os.getpid()}:{identity[0]}:done\\n".encode())
"""

CLASSES = {
    "wsgi": ("wsgi", "wsgi", ()),
    "wsgi with threads": ("wsgi", "wsgi", ("--threads", 3)),
    "asgi": ("asgi", "programs:PlainASGI", ()),
    "asyncio": ("Coroutine", "programs:PlainAsyncio", ()),
    "has_request": ("Filtered", "thread", ()),
    "has_request, two listeners": ("Filtered", "thread", ("-b", "unix:{run}/s")),
    "sync, two listeners": ("Handler", "sync", ("-b", "unix:{run}/s")),
    "thread, two listeners": ("Handler", "thread", ("-b", "unix:{run}/s")),
}
HTTP = ("wsgi", "wsgi with threads", "asgi")
BLOCKING = ("sync, two listeners", "thread, two listeners")  # a handler has a connection, and waits for its client


def serve(start: Start, kind: str) -> Program:
    """One worker of a class."""
    name, worker_class, flags = CLASSES[kind]
    argv = [f"programs:{name}", "-b", "tcp://127.0.0.1:0", "--worker-class", worker_class, "-w", 1, *flags]
    program: Program = start("prefork", *argv, files={"programs.py": PROGRAMS}, env=path_of_modules())
    return program.ready()


def held(address: Address, stack: ExitStack, kind: str) -> Callable[[], None]:
    """A connection that waits; what is returned uses it, and asserts that it is served."""
    if kind in HTTP:
        client = stack.enter_context(Web(address))
        assert client.get().body == b"ok"

        def again() -> None:
            assert client.get().body == b"ok"

        return again
    sock = stack.enter_context(dial(address))
    sock.sendall(b"held")
    until(lambda: not queued(address), 5, "it is accepted")

    def go_on() -> None:
        sock.sendall(b"-1\n")
        assert rest(sock).endswith(b":held-1:done\n")

    return go_on


def watched(pid: int) -> int:
    """How many descriptors the epolls of a process wait for."""
    number = 0
    for file in Path(f"/proc/{pid}/fdinfo").iterdir():
        with suppress(OSError):  # it was closed meanwhile
            number += file.read_text().count("tfd:")
    return number


def is_served(address: Address, kind: str, timeout: float = 5.0) -> bool:
    """A new client; one that is not served sees the end of its connection, or waits in the queue."""
    try:
        if kind in HTTP:
            with Web(address, timeout) as client:
                return client.get().body == b"ok" and client.get().body == b"ok"
        return ask(address, timeout=timeout).result == "done"
    except (Unanswered, ConnectionError, TimeoutError):
        return False
    except AssertionError:  # of `ask()`, about an answer that is none
        return False


def waiting(kind: str) -> int:
    """How many connections may wait beside a new one, in one worker."""
    return {"sync, two listeners": 0, "thread, two listeners": 3}.get(kind, 10)


@pytest.mark.parametrize("kind", CLASSES)
def test_no_room_for_one(start: Start, kind: str) -> None:
    """Whichever call of epoll_ctl is refused while a new client comes, the worker lives, those who wait are served, and
    so are new clients at every listener."""
    program = serve(start, kind)
    (worker,) = program.wait_ready(1)
    with ExitStack() as stack:
        others = [held(program.address, stack, kind) for _ in range(waiting(kind))]
        assert is_served(program.address, kind)
        until(lambda: watched(worker) >= (0 if kind in BLOCKING else len(others)), 5, "they all wait")
        for number in range(1, 6):
            with failing(worker, "epoll_ctl", "ENOSPC", str(number)):
                is_served(program.address, kind)
            for address in program.addresses:
                until(functools.partial(is_served, address, kind), 5, "a new client is served")
            if kind in HTTP:
                for other in others:
                    other()
        for other in others:
            other()
    assert program.wait_ready(1) == [worker]
    program.finish()


@pytest.mark.parametrize("kind", CLASSES)
def test_no_room_at_all(start: Start, kind: str) -> None:
    """While every call of epoll_ctl is refused, those who wait are served, new clients are served, see the end of
    their connection or wait in the queue, and the log has a line a second. Then all is as before."""
    program = serve(start, kind)
    (worker,) = program.wait_ready(1)
    with ExitStack() as stack:
        others = [held(program.address, stack, kind) for _ in range(waiting(kind))]
        assert is_served(program.address, kind)
        until(lambda: watched(worker) >= (0 if kind in BLOCKING else len(others)), 5, "they all wait")
        with failing(worker, "epoll_ctl", "ENOSPC"):
            for _ in range(3):
                for address in program.addresses:
                    is_served(address, kind, 0.2)
            for other in others[:5]:
                other()
        for other in others[5:]:
            other()
        for address in program.addresses:
            until(lambda address=address: is_served(address, kind), 5, "a new client is served")  # type: ignore[misc]
    assert program.wait_ready(1) == [worker]
    said = program.log.count("fs.epoll.max_user_watches")
    assert 1 <= said <= 4, said
    program.finish()

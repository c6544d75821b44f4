"""The lifespan of an ASGI application decides about a boot."""

import contextlib
import signal
from contextlib import ExitStack

import pytest

from support import patterns
from support.asgi import APP, FRAMEWORKS, TCP, Client, get, pid_of, serve
from support.scripts import Notes, Start, noted, path_of_modules

pytestmark = pytest.mark.timeout(60)


def test_lifespan(start: Start, notes: Notes) -> None:
    """Each worker starts the application before it is ready, requests see its state, and the end comes after the last
    request."""
    program = serve(start, "-w", 2)
    workers = program.wait_ready(2)
    assert sorted(notes("startup")) == sorted(map(str, workers))
    assert get(program, "/state") in notes("startup")
    with ExitStack() as stack:
        client = stack.enter_context(contextlib.closing(Client(program.address)))
        client.request("GET", "/gate/go")
        noted(notes, "begun")
        program.send(signal.SIGTERM)
        noted(notes, "shutdown", 1)
        program.write("go", "")
        answer = client.getresponse()
        assert answer.status == 200
        last = answer.read().decode().split(":")[0]
    assert program.wait_exit().code == 0
    assert notes("shutdown")[1:] == [last]
    assert sorted(notes("shutdown")) == sorted(map(str, workers))
    program.finish()


BROKEN = {
    "raises": "await receive()\n    raise ValueError('ordered trouble')",
    "says": "await receive()\n    await send({'type': 'lifespan.startup.failed', 'message': 'ordered trouble'})",
    "both": "await receive()\n    await send({'type': 'lifespan.startup.failed', 'message': ''})\n"
    "    raise ValueError('ordered trouble')",
    "hangs": "await receive()\n    await asyncio.sleep(60)",
}


@pytest.mark.parametrize("how", BROKEN)
def test_a_broken_start_keeps_the_old_generation(start: Start, how: str) -> None:
    """A lifespan that fails to start fails the reload, with its own words, and the old workers serve on."""
    program = serve(start, "-w", 1, "--boot-timeout", 2 if how == "hangs" else 20)
    (worker,) = program.wait_ready(1)
    head, _, tail = APP.partition("async def lifespan(scope, receive, send):\n    await receive()")
    program.write("app.py", head + "async def lifespan(scope, receive, send):\n    " + BROKEN[how] + tail)
    program.send(signal.SIGHUP)
    program.wait_for(patterns.RELOAD_FAILED, 10)
    assert ("boot_timeout" if how == "hangs" else "ordered trouble") in program.log
    assert pid_of(program) == worker
    program.finish(allow=[patterns.TRACEBACK, patterns.FAULT])


def test_a_broken_first_start(start: Start) -> None:
    """If the application does not start at all, the command ends with its traceback."""
    text = FRAMEWORKS["starlette"].replace('note("startup")', 'raise ValueError("ordered trouble")')
    program = start(
        "prefork",
        "app:app",
        "--worker-class",
        "asgi",
        "-b",
        TCP,
        "-w",
        1,
        files={"app.py": text},
        env=path_of_modules(),
    )
    assert program.wait_exit(20).code == 3
    assert "ValueError: ordered trouble" in program.log and "in lifespan" in program.log
    program.finish(code=3, allow=[patterns.ANYTHING])


@pytest.mark.parametrize(
    "body",
    [
        "assert scope['type'] == 'http'",
        "await send({'type': 'http.response.start', 'status': 200, 'headers': []})",
        "await receive()\n    await send({'type': 'http.response.start', 'status': 200, 'headers': []})",
        "return",
    ],
)
def test_without_a_lifespan(start: Start, body: str) -> None:
    """An application that knows nothing of lifespans is served."""
    head, _, tail = APP.partition("async def lifespan(scope, receive, send):\n    await receive()")
    text = head + "async def lifespan(scope, receive, send):\n    " + body + tail
    program = serve(start, "-w", 1, text=text)
    assert get(program, "/version") == "one"
    program.finish()


def test_a_class_without_a_lifespan(start: Start) -> None:
    """An application that refuses the lifespan in the call itself, and not when it is awaited, has none."""
    app = """
class app:
    def __init__(self, scope, receive, send):
        assert scope["type"] == "http"
        self.send = send

    def __await__(self):
        return self.answer().__await__()

    async def answer(self):
        await self.send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"4")]})
        await self.send({"type": "http.response.body", "body": b"done"})
"""
    program = serve(start, "-w", 1, text=app)
    assert get(program, "/") == "done"
    program.finish()


def test_a_broken_end(start: Start) -> None:
    """A lifespan that fails to end is shown, and the worker leaves all the same."""
    text = APP.replace('note(f"shutdown {os.getpid()}")', 'raise ValueError("ordered trouble")')
    program = serve(start, "-w", 1, text=text, allow=[patterns.TRACEBACK])
    assert program.stop().code == 0
    assert "ValueError: ordered trouble" in program.log
    program.finish()

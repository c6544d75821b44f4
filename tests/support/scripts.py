"""Starts the small programs that are written beside their tests; see `kit` for what they share."""

import os
import textwrap
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

from .clients import Address, dial
from .program import PROGRAMS, Program
from .waiting import until

Start = Callable[..., Program]
Notes = Callable[[str], list[str]]

TCP = '("127.0.0.1", 0)'

# Two applications for programs that do not import `kit`. Every request is answered by `done`.
APPLICATIONS = """
def application(environ, start_response):
    start_response("200 OK", [("Content-Type", "text/plain")])
    return [b"done"]

async def asgi(scope, receive, send):
    assert scope["type"] == "http"
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"4")]})
    await send({"type": "http.response.body", "body": b"done"})

"""


def handler_text(result: str = "done") -> str:
    """A handler for programs that do not import `kit`; `result` is the text of an f-string."""
    return f"""
import os
import socketserver

class Handler(socketserver.StreamRequestHandler):
    def handle(self):
        identity = self.rfile.readline().decode().split()[0]
        self.wfile.write(f"{{os.getpid()}}:{{identity}}:{result}\\n".encode())

"""


def path_of_modules() -> dict[str, str]:
    """The environment in which a program finds `kit` and `work`."""
    parts = [str(PROGRAMS), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {"PYTHONPATH": os.pathsep.join(parts)}


def launch(start: Start, body: str, *arguments: object, env: dict[str, str] | None = None, **options: Any) -> Program:
    """Run a program whose text is `body`."""
    text = "from kit import *\n\n" + textwrap.dedent(body)
    files = {"app.py": text, **options.pop("files", {})}
    return start("{work}/app.py", *arguments, files=files, env={**path_of_modules(), **(env or {})}, **options)


def noted(notes: Notes, word: str, number: int = 1, timeout: float = 10.0) -> list[str]:
    """The notes that begin with a word, once there are so many of them."""

    def enough() -> list[str] | None:
        found = notes(word)
        return found if len(found) >= number else None

    found = until(enough, timeout, f"{number} notes of {word!r}")
    assert found is not None
    return found


def hold(address: Address, stack: ExitStack, order: str, identity: str = "held", timeout: float = 20.0) -> Any:
    """A connected client whose request was sent."""
    sock = stack.enter_context(dial(address, timeout))
    sock.sendall(f"{identity} {order}".strip().encode() + b"\n")
    return sock


def rest(sock: Any) -> bytes:
    """All that comes until the end of the stream."""
    parts = []
    while part := sock.recv(65536):
        parts.append(part)
    return b"".join(parts)

"""What prefork has to log is logged whatever a program of the command does to logging."""

import contextlib
import re
import textwrap
from typing import Any

import pytest

from support import Program, patterns, until
from support.scripts import Start, path_of_modules
from support.web import Web

pytestmark = pytest.mark.timeout(60)

TCP = "tcp://127.0.0.1:0"
RAISED = [patterns.HANDLER_ERROR, patterns.TRACEBACK, r"Exception in ASGI.*", r".*\^+.*", r"handle: .*"]

APPLICATIONS = {
    "wsgi": """
        def app(environ, start_response):
            configure("request")
            raise ValueError("ordered trouble")
        """,
    "asgi": """
        async def app(scope, receive, send):
            if scope["type"] == "http":
                configure("request")
                raise ValueError("ordered trouble")
        """,
    "sync": """
        class app(Handler):
            def answer(self, order):
                configure("request")
                raise ValueError("ordered trouble")
        """,
    "asyncio": """
        class app(prefork.AsyncStreamRequestHandler):
            async def handle(self):
                configure("request")
                raise ValueError("ordered trouble")
        """,
}
APPLICATIONS["thread"] = APPLICATIONS["sync"]
HOSTILE = {
    "dictConfig": 'logging.config.dictConfig({"version": 1})',
    "fileConfig": """
        Path("conf").write_text(
            "[loggers]\\nkeys=root\\n[handlers]\\nkeys=\\n[formatters]\\nkeys=\\n[logger_root]\\nhandlers=\\n"
        )
        logging.config.fileConfig("conf")
        """,
    "levels": """
        logging.disable(logging.CRITICAL)
        logging.getLogger().setLevel(logging.CRITICAL)
        logging.raiseExceptions = False
        logging.logProcesses = False
        logging.shutdown()
        """,
    "nobody": """
        for logger in (logging.getLogger("prefork"), logging.getLogger("uvicorn.error")):
            logger.addFilter(lambda record: 1 / 0)
        """,
}


def serve(start: Start, body: str, kind: str, *flags: object, **options: Any) -> Program:
    """The command over `app` of a module with this text."""
    files = {"app.py": "import logging.config\nfrom kit import *\n\n" + textwrap.dedent(body)}
    env = {**path_of_modules(), **options.pop("env", {})}
    flags = ("-b", TCP, "-w", 1, "--worker-class", kind, *flags)
    program: Program = start("prefork", "app:app", *flags, files=files, env=env, **options)
    return program.ready()


def tell(program: Program, text: bytes = b"GET /x HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n") -> bytes:
    with Web(program.address) as web:
        return web.send(text).rest()


@pytest.mark.parametrize("hostile", HOSTILE)
@pytest.mark.parametrize("when", ["import", "request"])
@pytest.mark.parametrize("kind", APPLICATIONS)
def test_program_that_configures_logging(start: Start, kind: str, when: str, hostile: str) -> None:
    """Whatever a program of the command does to logging, when it is imported or in a request, the tracebacks of its
    requests are logged, and access lines are written."""
    body = (
        "logging.root.handlers.clear()  # of the kit\n"
        f"def configure(here):\n    if here == {when!r}:\n"
        + textwrap.indent(textwrap.dedent(HOSTILE[hostile]).strip(), " " * 8)
        + '\n\nconfigure("import")\n'
        + textwrap.dedent(APPLICATIONS[kind])
    )
    web = kind in ("wsgi", "asgi")
    program = serve(start, body, kind, *(["--access-log", "access.log"] if web else []), allow=RAISED)
    for number in (1, 2):
        with contextlib.suppress(ConnectionResetError):  # of a handler that raised before it read all
            tell(program)
        program.wait_for("ValueError: ordered trouble", number=number)
    if web:
        access = program.work / "access.log"
        until(lambda: len(re.findall(r'"GET /x HTTP/1.1" 500', access.read_text())) == 2, what="two access lines")
    program.kill_workers(*program.wait_ready(1))
    program.wait_for(patterns.LEFT)
    program.finish()


def test_what_a_program_wants_of_the_logger(start: Start) -> None:
    """A program of the command that configures the logger `prefork` has what it wants: handlers, format, level."""
    program = serve(
        start,
        """
        logging.config.dictConfig({
            "version": 1,
            "formatters": {"own": {"format": "own %(levelname)s %(message)s"}},
            "handlers": {"own": {"class": "logging.FileHandler", "filename": "own.log", "formatter": "own"}},
            "loggers": {"prefork": {"handlers": ["own"], "level": "ERROR"}},
        })

        def app(environ, start_response):
            raise ValueError("ordered trouble")
        """,
        "wsgi",
    )
    tell(program)
    own = program.work / "own.log"
    until(lambda: "ordered trouble" in own.read_text())
    assert own.read_text().startswith("own ERROR worker ")
    assert ": the application raised at GET /x [PF0607]\nTraceback" in own.read_text()
    assert "ordered trouble" not in program.log
    program.finish()


def test_protocol_in_pure_python(start: Start) -> None:
    """Also uvicorn's protocol on h11 writes access lines where logging is configured by the program."""
    program = serve(
        start,
        """
        class H11(prefork.ASGIWorker):
            uvicorn_options = {"http": "h11"}

        async def app(scope, receive, send):
            if scope["type"] == "http":
                logging.config.dictConfig({"version": 1})
                await send({"type": "http.response.start", "status": 204, "headers": []})
                await send({"type": "http.response.body"})
        """,
        "app:H11",
        "--access-log",
        "-",
    )
    tell(program)
    line = until(
        lambda: re.fullmatch(r'(\S+ \S+) 127\.0\.0\.1:\d+ - "GET /x HTTP/1.1" 204\n', program.out_path.read_text())
    )
    assert line and re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3}", line[1])
    program.finish()


@pytest.mark.parametrize("kind", ["asgi", "asyncio"])
def test_callbacks_of_a_loop(start: Start, kind: str) -> None:
    """What a callback of an event loop raises is logged where the program has disabled the loggers that were there."""
    program = serve(
        start,
        """
        import asyncio
        logging.root.handlers.clear()

        def fail():
            logging.config.dictConfig({"version": 1})
            asyncio.get_running_loop().call_soon(lambda: 1 / 0)

        class app(prefork.AsyncStreamRequestHandler):
            async def handle(self):
                fail()
        """
        if kind == "asyncio"
        else """
        import asyncio
        logging.root.handlers.clear()

        async def app(scope, receive, send):
            if scope["type"] == "http":
                logging.config.dictConfig({"version": 1})
                asyncio.get_running_loop().call_soon(lambda: 1 / 0)
                await send({"type": "http.response.start", "status": 204, "headers": []})
                await send({"type": "http.response.body"})
        """,
        kind,
        allow=RAISED,
    )
    tell(program)
    program.wait_for("ZeroDivisionError: division by zero")
    program.finish()

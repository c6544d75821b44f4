"""Every stream that a pool writes to may be full, a pipe, a terminal, a file: serving and signals go on, and what
was dropped is counted."""

import contextlib
import os
import pty
import re
import resource
import signal
import termios
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from support import Address, Program, ask, patterns, until, within
from support.pipes import drained, fill, pipe
from support.scripts import Start, launch, path_of_modules
from support.web import Web

pytestmark = pytest.mark.timeout(60)

TCP = "tcp://127.0.0.1:0"
REQUESTS = 50
APP = """
import sys

def app(environ, start_response):
    if environ["PATH_INFO"] == "/own":
        for stream in (sys.stderr, environ["wsgi.errors"]):
            print("a line of the application's own", file=stream)
    start_response("200 OK", [("Content-Length", "2")])
    return [b"ok"]

async def asgi(scope, receive, send):
    if scope["type"] == "http":
        if scope["path"] == "/own":
            print("a line of the application's own", file=sys.stderr)
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]})
        await send({"type": "http.response.body", "body": b"ok"})
"""
KINDS = {"wsgi": "app:app", "asgi": "app:asgi"}


def serve(start: Start, kind: str, *flags: object, **options: Any) -> Program:
    flags = ("-b", TCP, "-w", 1, "--worker-class", kind, *flags)
    program: Program = start("prefork", KINDS[kind], *flags, files={"app.py": APP}, env=path_of_modules(), **options)
    return program


def check_serves(address: Address, number: int = REQUESTS, path: str = "/x") -> None:
    with Web(address) as web:
        for _ in range(number):
            assert web.get(path).body == b"ok"


def check_stops(program: Program) -> None:
    within(program.stop().seconds, 1.0)
    program.finish()


class Place:
    """Where access lines go that is full, and how there is room again."""

    def __init__(self, flag: str, make_room: Callable[[], bytes], stdout: int | None = None) -> None:
        self.flag, self.make_room, self.stdout = flag, make_room, stdout
        self.name = "standard output" if flag == "-" else flag


@contextlib.contextmanager
def full_pipe(where: Path) -> Iterator[Place]:
    with pipe() as (reader, end):
        fill(end)
        yield Place("-", lambda: drained(reader), end)


@contextlib.contextmanager
def full_fifo(where: Path) -> Iterator[Place]:
    os.mkfifo(where / "fifo")
    reader = os.open(where / "fifo", os.O_RDONLY | os.O_NONBLOCK)
    end = os.open(where / "fifo", os.O_WRONLY)
    fill(end)
    yield Place(str(where / "fifo"), lambda: drained(reader))
    os.close(reader)
    os.close(end)


@contextlib.contextmanager
def full_socket(where: Path) -> Iterator[Place]:
    import socket

    ours, theirs = socket.socketpair()
    with ours, theirs:
        fill(ours.fileno())
        yield Place("-", lambda: drained(theirs.fileno()), ours.fileno())


@contextlib.contextmanager
def stopped_terminal(where: Path) -> Iterator[Place]:
    master, slave = pty.openpty()
    termios.tcflow(slave, termios.TCOOFF)

    def make_room() -> bytes:
        termios.tcflow(slave, termios.TCOON)
        return drained(master).replace(b"\r", b"")

    yield Place("-", make_room, slave)
    os.close(master)
    os.close(slave)


def known(text: bytes, name: str) -> int:
    """How many access lines are there, or were said to be dropped. One is written after its answer, so that it may come
    before there is room, or after."""
    note = rf"prefork\[\d+\]: (\d+) access lines were dropped because {re.escape(name)} was full \[PF0501\]\n"
    told = re.findall(note, text.decode())
    assert len(told) <= 1
    return sum(map(int, told)) + text.count(b'"GET /x HTTP/1.1" 200')


PLACES = {place.__name__: place for place in (full_pipe, full_fifo, full_socket, stopped_terminal)}


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("kind", KINDS)
def test_access_log_is_full(start: Start, tmp_path: Path, kind: str, place: str) -> None:
    """Requests go on when nobody takes the access lines; their number is said once somebody does; a stop is prompt."""
    with PLACES[place](tmp_path) as full:
        program = serve(start, kind, "--access-log", full.flag, stdout=full.stdout).ready()
        check_serves(program.address)
        program.wait_for(r" WARNING: access lines are dropped: .*: Resource temporarily unavailable")
        text = bytearray(full.make_room())
        check_serves(program.address, 1)

        def all_are_known() -> bool:
            text.extend(full.make_room())
            return known(bytes(text), full.name) == REQUESTS + 1

        until(all_are_known, what="each line is there or was counted")
        assert len(program.found(re.compile("access lines are dropped"))) == 1
        check_stops(program)


@pytest.mark.parametrize("kind", KINDS)
def test_worker_that_leaves_reports(start: Start, kind: str) -> None:
    """What a worker has dropped is said at the latest when it leaves."""
    with pipe() as (reader, end):
        fill(end)
        program = serve(start, kind, "--access-log", "-", stdout=end).ready()
        check_serves(program.address)
        text = drained(reader)
        check_stops(program)
        assert known(text + drained(reader), "standard output") == REQUESTS


@pytest.mark.parametrize("kind", KINDS)
def test_access_log_on_a_full_disk(start: Start, kind: str) -> None:
    """On a full disk requests go on, and the log has the reason."""
    program = serve(start, kind, "--access-log", "/dev/full").ready()
    check_serves(program.address)
    program.wait_for(r" WARNING: access lines are dropped: /dev/full: No space left on device")
    check_stops(program)


@pytest.mark.parametrize("kind", KINDS)
def test_access_log_at_a_limit_of_size(start: Start, kind: str) -> None:
    """At the limit of a file's size (RLIMIT_FSIZE) requests go on, in the same worker."""
    size = 16384
    program = serve(start, kind, "--access-log", "access.log", limits={resource.RLIMIT_FSIZE: size}).ready()
    workers = program.wait_ready(1)
    check_serves(program.address, 300)
    assert (program.work / "access.log").stat().st_size == size
    program.wait_for(r" WARNING: access lines are dropped: \S+: File too large")
    assert program.wait_ready(1) == workers
    check_stops(program)


@pytest.mark.parametrize("kind", KINDS)
def test_access_log_in_a_fifo_without_reader(start: Start, tmp_path: Path, kind: str) -> None:
    """A FIFO that nobody reads yet holds up no boot; lines that fit are there for who comes."""
    os.mkfifo(tmp_path / "fifo")
    program = serve(start, kind, "--access-log", tmp_path / "fifo").ready()
    check_serves(program.address, 3)
    reader = os.open(tmp_path / "fifo", os.O_RDONLY | os.O_NONBLOCK)
    text = bytearray()

    def three() -> bool:
        text.extend(drained(reader))
        return text.count(b'"GET /x HTTP/1.1" 200') == 3

    until(three)
    os.close(reader)
    check_stops(program)


def test_access_log_that_cannot_be_opened_again(start: Start, tmp_path: Path) -> None:
    """A rotation that leaves no place for the file is said, and the former file goes on."""
    (tmp_path / "logs").mkdir()
    path = tmp_path / "logs" / "access.log"
    program = serve(start, "wsgi", "--access-log", path).ready()
    check_serves(program.address, 1)
    path.rename(tmp_path / "old")
    path.mkdir()
    program.send(signal.SIGUSR1)
    program.wait_for(rf" ERROR: {path} cannot be opened again: Is a directory")
    check_serves(program.address, 1)
    until(lambda: (tmp_path / "old").read_text().count("GET /x") == 2)
    check_stops(program)


@pytest.mark.parametrize("kind", [*KINDS, "sync"])
def test_standard_error_is_full(start: Start, kind: str) -> None:
    """Where nobody reads standard error, applications that write to it are served, and tracebacks hold nobody up."""
    with pipe() as (_, end):
        fill(end)
        text = "from kit import *\n" + APP
        name, flags = (KINDS[kind], ["--worker-class", kind]) if kind in KINDS else ("app:Handler", [])
        program = start(
            "prefork",
            name,
            "-b",
            "unix:{run}/socket",
            "-w",
            2,
            *flags,
            files={"app.py": text},
            env=path_of_modules(),
            stderr=end,
        )
        workers = program.wait_ready(2, timeout=10)
        address = Address("unix", str(program.run / "socket"))
        if kind == "sync":
            for _ in range(REQUESTS):
                with contextlib.suppress(AssertionError, ConnectionError):
                    ask(address, "raise")
            assert ask(address).result == "done"
        else:
            check_serves(address, path="/own")
        assert program.wait_ready(2) == workers
        check_stops(program)


# -- what a program prints itself --------------------------------------------------------------------------------------

PRINTS = """
class Handler(Handler):
    def answer(self, order):
        print("x" * int(order or 0), end="")
        return "done"

class Server(prefork.PreforkTCPServer):
    workers = 2

print("y" * 5000, end="")
with Server(("127.0.0.1", 0), Handler) as server:
    server.serve_forever()
"""


def test_output_that_is_kept_back(start: Start) -> None:
    """What a program has printed, and its stream keeps back, holds up neither master nor workers where nobody reads it,
    and is there once afterwards."""
    with pipe() as (reader, end):
        fill(end)
        taken = os.read(reader, 4096)  # room for less than the 5000 bytes that the program keeps back
        program = launch(start, PRINTS, stdout=end, env={"PYTHONUNBUFFERED": ""}).ready()
        for _ in range(4):
            assert ask(program.address, "1000").result == "done"
        victims = program.wait_ready(2)
        program.kill_workers(*victims)
        program.wait_ready(2, without=victims)
        assert taken
        drained(reader)
        check_stops(program)
        assert drained(reader).count(b"y") == 5000


def test_output_of_a_worker_that_leaves(start: Start) -> None:
    """What the stream of a worker keeps back when it leaves is written as far as there is room, and not waited for."""
    with pipe() as (reader, end):
        program = launch(start, PRINTS, stdout=end, env={"PYTHONUNBUFFERED": ""}).ready()
        program.wait_ready(2)
        drained(reader)
        assert ask(program.address, "6000").result == "done"
        fill(end)
        os.read(reader, 4096)
        program.send(signal.SIGTTOU)
        program.wait_for(patterns.LEFT)
        check_stops(program)

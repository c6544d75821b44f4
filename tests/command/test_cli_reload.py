"""The command reloads the program: new code, broken code, code that hangs, another address."""

import os
import signal
import time

import pytest

from support import Program, ask, elapse, patterns, until
from support.commands import APP, TCP, command
from support.scripts import Start

pytestmark = pytest.mark.timeout(60)


def versions(program: Program, number: int = 6) -> set[str]:
    return {ask(program.address, "version").result for _ in range(number)}


def reload(program: Program) -> None:
    mark = program.mark
    program.send(signal.SIGHUP)
    program.wait_for(patterns.RELOADED, 10, since=mark)


def fails(program: Program, timeout: float = 10.0) -> str:
    mark = program.mark
    program.send(signal.SIGHUP)
    program.wait_for(patterns.RELOAD_FAILED, timeout, since=mark)
    return program.log_path.read_bytes()[mark:].decode()


def test_reload_loads_new_code(start: Start) -> None:
    """HUP loads the program anew, also a module that it imports; each time, without a connection refused."""
    program = command(
        start,
        "app:Versioned",
        "-b",
        TCP,
        "-w",
        2,
        app=APP.replace('VERSION = "one"', "from part import VERSION"),
        files={"part.py": "VERSION = 'part one'"},
    ).ready()
    assert versions(program) == {"part one"}
    for number in ("two", "three"):
        program.write("part.py", f"VERSION = 'part {number}' ")
        reload(program)
        program.wait_ready(2)
        assert versions(program) == {f"part {number}"}
    program.finish()


@pytest.mark.parametrize(
    ("fault", "says"),
    [
        ("def broken(:\n", "SyntaxError"),
        ("import os\nos._exit(1)\n", "ended the process"),
        (APP.replace("class Versioned", "class Renamed").split("class Ready")[0], "Versioned"),
        (APP.replace("class Versioned(Handler)", "class Versioned(Datagrams)").split("class Ready")[0], "datagrams"),
    ],
    ids=["syntax", "exit", "renamed", "kind"],
)
def test_reload_of_a_broken_program(start: Start, fault: str, says: str) -> None:
    """HUP with a program that cannot be served changes nothing and says why; the mended one is loaded."""
    program = command(start, "app:Versioned", "-b", TCP, "-w", 2, allow=[patterns.ANYTHING]).ready()
    workers = program.wait_ready(2)
    program.write("app.py", fault)
    assert says in fails(program)
    assert program.wait_ready(2) == workers and versions(program) == {"one"}
    program.write("app.py", APP.replace('"one"', '"mended"'))
    reload(program)
    program.wait_ready(2)
    assert versions(program) == {"mended"}
    program.finish()


def test_reload_of_a_hanging_program(start: Start) -> None:
    """While a reload's import hangs the pool serves, is resized, and stops at once when told to."""
    program = command(
        start, "app:Versioned", "-b", TCP, "-w", 2, "--boot-timeout", 1, allow=[patterns.ANYTHING]
    ).ready()
    workers = program.wait_ready(2)
    program.write("app.py", "import threading\nthreading.Event().wait()\n")
    begun = time.monotonic()
    assert "boot_timeout" in fails(program)
    assert 0.9 <= time.monotonic() - begun < 5
    assert program.wait_ready(2) == workers
    assert versions(program) == {"one"}
    program.send(signal.SIGHUP)
    until(lambda: len(program.children()) == 3, 5, "the probe runs")
    assert program.stop().seconds < 1
    program.finish()


@pytest.mark.parametrize(
    ("now", "says"), [('("127.0.0.1", 1)', "tcp://127.0.0.1:1"), ('str(RUN / "other")', "restart")]
)
def test_reload_with_another_address(start: Start, now: str, says: str) -> None:
    """A program that names another address than it was started with takes a new start: HUP says so and changes
    nothing."""
    app = APP.replace("return Ready(address)", "return Ready(address)") + (
        "\ndef make_here():\n    return prefork.PreforkTCPServer(('127.0.0.1', 0), Versioned)\n"
    )
    program = command(start, "app:make_here", "-w", 2, app=app, allow=[patterns.ANYTHING]).ready()
    workers = program.wait_ready(2)
    kind = "PreforkUnixStreamServer" if "RUN" in now else "PreforkTCPServer"
    changed = app.replace("prefork.PreforkTCPServer(('127.0.0.1', 0)", f"prefork.{kind}({now}")
    program.write("app.py", changed)
    text = fails(program)
    assert says in text or "ermission" in text, text
    assert program.wait_ready(2) == workers
    ask(program.address)
    assert os.listdir(program.run) == []
    program.finish()


def test_twenty_hups(start: Start) -> None:
    """HUPs that come while a reload is under way are one more reload, not twenty."""
    program = command(start, "app:Versioned", "-b", TCP, "-w", 2).ready()
    program.write("app.py", APP.replace('"one"', '"two"'))
    for _ in range(20):
        program.send(signal.SIGHUP)
    program.wait_for(patterns.RELOADED, 10)
    program.wait_ready(2)
    until(lambda: versions(program) == {"two"}, 10, "the new code")
    elapse(0.5)
    assert 1 <= len(program.found(patterns.RELOADED)) <= 4
    program.finish()

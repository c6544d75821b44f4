"""The command: addresses, what NAME may be, and flags."""

import os
import shutil
import signal
import stat
import subprocess
import sys
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import pytest

from support import Address, ask, children, dial, elapse, patterns, pids_serving, title, until
from support.clients import hear
from support.commands import APP, TCP, command
from support.scripts import Notes, Start, hold, noted, path_of_modules, rest

pytestmark = pytest.mark.timeout(60)


# -- what is served --------------------------------------------------------------------------------

ADDRESSES = {
    "tcp": (TCP, "Versioned"),
    "tcp6": ("tcp://[::1]:0", "Versioned"),
    "name": ("tcp://localhost:0", "Versioned"),
    "udp": ("udp://127.0.0.1:0", "Datagrams"),
    "udp6": ("udp://[::1]:0", "Datagrams"),
    "unix": ("unix:{run}/s", "Versioned"),
    "unixgram": ("unixgram:{run}/s", "Datagrams"),
}


@pytest.mark.parametrize("form", ADDRESSES)
def test_addresses(start: Start, form: str) -> None:
    """Every form of -b is bound, named in the log as it was typed, and served."""
    bind, handler = ADDRESSES[form]
    program = command(start, f"app:{handler}", "-b", bind, "-w", 2).ready()
    assert program.address.kind == bind.partition(":")[0]
    workers = program.wait_ready(2)
    assert pids_serving(program.address, 2) == set(workers)
    if program.address.is_unix:
        assert stat.S_IMODE(os.stat(program.address.where).st_mode) == 0o600
    assert program.stop().code == 0
    program.finish()


def test_several_addresses(start: Start) -> None:
    """-b may be repeated: all are served by the same workers, through a reload too."""
    program = command(start, "app:Versioned", "-b", TCP, "-b", "unix:{run}/s", "-b", "tcp://[::1]:0", "-w", 2).ready()
    workers = program.wait_ready(2)
    assert len(program.addresses) == 3
    for address in program.addresses:
        assert ask(address).pid in workers
    program.send(signal.SIGHUP)
    program.wait_for(patterns.RELOADED)
    program.wait_ready(2, without=workers)
    for address in program.addresses:
        assert ask(address).pid not in workers
    program.finish()


@pytest.mark.parametrize(
    ("name", "binds", "workers"),
    [
        ("Versioned", [TCP], 2),
        ("Nested.Inside", [TCP], 2),
        ("Ready", [TCP], 3),
        ("Plain", [TCP], 2),
        ("make", [TCP], 3),
        ("make_own", [], 3),
        ("make_pair", [], 3),
        ("make_own()", [], 3),
        ("made", [], 3),
        ("make_handler()", [TCP], 2),
        ("functools_partial", [], 3),
    ],
)
def test_names(start: Start, name: str, binds: list[str], workers: int) -> None:
    """NAME is a handler, a server class (of prefork or not), a server, or a callable that returns servers; NAME() is
    what a call of it returns. Their settings count."""
    app = APP + "\nimport functools\nfunctools_partial = functools.partial(make, ('127.0.0.1', 0))\n"
    if name == "made":
        app += "\nmade = make_own()\n"
    arguments: list[object] = [f"app:{name}"]
    for bind in binds:
        arguments += ["-b", bind]
    if workers == 2:
        arguments += ["-w", 2]
    program = command(start, *arguments, app=app).ready()
    program.wait_ready(workers)
    for address in program.addresses:
        assert ask(address, "" if address.kind == "udp" else "version").result in ("one", "done")
    program.finish()


def test_module_in_a_package(start: Start, tmp_path: Path) -> None:
    """MODULE may be dotted, found on PYTHONPATH, and its package finds its own modules."""
    package = tmp_path / "one"
    package.mkdir()
    for name, text in {
        "__init__": "",
        "part": "VERSION = 'deep'",
        "two": APP + "\nfrom one.part import VERSION\n",
    }.items():
        (package / f"{name}.py").write_text(text)
    path = path_of_modules()["PYTHONPATH"]
    program = command(start, "one.two:Versioned", "-b", TCP, env={"PYTHONPATH": f"{tmp_path}:{path}"}).ready()
    assert ask(program.address, "version").result == "deep"
    program.finish()


def test_the_program_runs_where_the_command_was_started(start: Start) -> None:
    """The working directory is on the path, and is the workers' own."""
    app = APP.replace('VERSION if order == "version"', 'f"{os.getcwd()} {__file__}" if order == "where"')
    program = command(start, "app:Versioned", "-b", TCP, "-w", 2, app=app).ready()
    assert ask(program.address, "where").result == f"{program.work} {program.work / 'app.py'}"
    program.finish()


def test_only_children_import_the_program(start: Start, notes: Notes) -> None:
    """The import runs once in the child that binds and once in each worker, never in the master."""
    app = APP + "\nnote(f'import {os.getpid()} {os.getppid()}')\n"
    program = command(start, "app:Versioned", "-b", TCP, "-w", 2, app=app).ready()
    workers = program.wait_ready(2)
    rows = [tuple(map(int, row.split())) for row in noted(notes, "import", 3)]
    assert {parent for _, parent in rows} == {program.pid}
    assert len(rows) == 3 and {pid for pid, _ in rows[1:]} == set(workers)
    assert rows[0][0] not in workers
    program.finish()


def test_titles(start: Start) -> None:
    """ps shows what the command serves, and where."""
    program = command(start, "app:Versioned", "-b", TCP, "-w", 1).ready()
    assert title(program.pid) == f"prefork: master app:Versioned {program.address}"
    (worker,) = program.wait_ready(1)
    assert title(worker) == f"prefork: worker 0 {program.address} generation 1 ready"
    program.finish()


# -- flags -----------------------------------------------------------------------------------------

WORKER = (
    APP
    + """
class Own(prefork.SyncWorker):
    def setup(self):
        note(f"setup {self.slot} " + repr([getattr(self.options, name) for name in NAMES]))

NAMES = ["workers", "request_timeout", "boot_timeout", "graceful_timeout", "max_requests", "max_requests_jitter",
         "max_memory", "max_lifetime", "max_surge"]
"""
)


def test_every_limit_has_a_flag(start: Start, notes: Notes) -> None:
    """--worker-class and each limit reach the workers; sizes may be written with K, M and G."""
    program = command(
        start, "app:Versioned", "-b", TCP, "--workers", 2, "--worker-class", "app:Own", "--request-timeout", 5,
        "--boot-timeout", 6.5, "--graceful-timeout", 7, "--max-requests", 800, "--max-requests-jitter", 9,
        "--max-memory", "512M", "--max-lifetime", 1000, "--max-surge", 2, app=WORKER,
    ).ready()  # fmt: skip
    expected = "[2, 5.0, 6.5, 7.0, 800, 9, 536870912, 1000.0, 2]"
    assert sorted(noted(notes, "setup", 2)) == [f"0 {expected}", f"1 {expected}"]
    program.finish()


def test_a_flag_beats_the_program(start: Start) -> None:
    """What the server class sets is the default; the flag wins."""
    program = command(start, "app:Ready", "-b", TCP, "-w", 1).ready()
    program.wait_ready(1)
    program.finish()


def test_limits_act(start: Start) -> None:
    """--request-timeout and --max-requests do what they say."""
    program = command(
        start, "app:Versioned", "-b", TCP, "-w", 1, "--request-timeout", 0.4, "--max-requests", 4,
        "--max-requests-jitter", 0, allow=[patterns.HANDLER_ERROR],
    ).ready()  # fmt: skip
    with dial(program.address) as sock:
        sock.sendall(b"x hang\n")
        assert rest(sock) == b""
    assert "RequestTimeout" in program.log
    for _ in range(5):
        ask(program.address)
    assert "recycled" in program.wait_for(patterns.LEFT)[4]
    program.finish()


@pytest.mark.parametrize(("level", "info"), [("info", True), ("error", False)])
def test_log_level(start: Start, level: str, info: bool) -> None:
    """--log-level decides what is said of an ordinary life."""
    program = command(start, "app:Versioned", "-b", "unix:{run}/s", "-w", 1, "--log-level", level)
    until(lambda: (program.run / "s").exists(), 10)
    program.wait_ready(1)
    assert program.stop().code == 0
    assert bool(program.log) is info
    program.finish()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGQUIT])
def test_stops_with_zero(start: Start, notes: Notes, number: signal.Signals) -> None:
    """An ordered stop, of whichever kind, is exit code 0; TERM answers what is in progress."""
    program = command(start, "app:Versioned", "-b", TCP, "-w", 2).ready()
    with ExitStack() as stack:
        held = hold(program.address, stack, "gate go")
        noted(notes, "begun")
        program.send(number)
        program.wait_for(patterns.STOPPING)
        program.write("go", "")
        if number == signal.SIGTERM:
            assert rest(held).endswith(b":held:done\n")
        assert program.wait_exit().code == 0
    program.finish()


IGNORING = """
import os, runpy, signal
for number in (signal.SIGINT, signal.SIGQUIT, signal.SIGTERM):
    signal.signal(number, signal.SIG_IGN)
runpy.run_module("prefork", run_name="__main__")
"""


@pytest.mark.parametrize("ignored", [False, True])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGQUIT])
def test_signal_while_the_program_is_imported(start: Start, number: signal.Signals, ignored: bool) -> None:
    """A stop that is ordered while the program is still being imported ends the command at once, and leaves nothing;
    also where it was started with these signals ignored, as a shell does in the background."""
    program = start(
        "{work}/ignoring.py" if ignored else "prefork", "app:Versioned", "-b", TCP,
        files={"ignoring.py": IGNORING, "app.py": "import threading\nthreading.Event().wait()\n"},
        allow=[patterns.ANYTHING],
    )  # fmt: skip
    until(lambda: any(title(pid) == "prefork: probe" for pid in program.children()), 10, "the import began")
    program.send(number)
    assert program.wait_exit(2).code == (130 if number is signal.SIGINT else 0)
    program.finish(code=None)


UNSHARE = ["unshare", "--pid", "--fork", "--mount-proc", "--kill-child"]
CONTAINER = (
    shutil.which("unshare") and subprocess.run([*UNSHARE, "true"], capture_output=True, check=False).returncode == 0
)
ORPHANS = (
    APP
    + """
class Daemons(Handler):
    def answer(self, order):
        if os.fork() == 0:
            if os.fork() == 0:
                select.select([], [], [], 0.05)
            os._exit(0)
        os.wait()
        return "done"
"""
)


@pytest.mark.skipif(not CONTAINER, reason="needs a pid namespace of its own")
def test_process_1_of_a_container(tmp_path: Path) -> None:
    """As process 1 the master collects the orphans that handlers leave, and obeys TERM."""
    (tmp_path / "app.py").write_text(ORPHANS)
    socket_path = tmp_path / "s"
    with subprocess.Popen(
        [*UNSHARE, sys.executable, "-m", "prefork", "app:Daemons", "-b", f"unix:{socket_path}", "-w", "2"],
        cwd=tmp_path, env={**os.environ, **path_of_modules()}, stderr=subprocess.PIPE, text=True,
    ) as outer:  # fmt: skip
        try:
            log = outer.stderr
            assert log
            until(lambda: "pool ready" in log.readline(), 10, "it is ready")
            (master,) = children(outer.pid)
            workers = set(map(str, children(master)))
            for _ in range(10):
                assert ask(Address("unix", str(socket_path)), "").result == "done"
            listed = Path(f"/proc/{master}/task/{master}/children")  # zombies too
            until(lambda: set(listed.read_text().split()) == workers, 5, "no orphan is left")
            os.kill(master, signal.SIGTERM)
            outer.wait(10)
            assert outer.returncode == 0
        finally:
            outer.kill()


def test_datagrams_by_the_command(start: Start) -> None:
    """A datagram handler answers each of many clients with its own."""
    program = command(start, "app:Datagrams", "-b", "udp://127.0.0.1:0", "-w", 2).ready()
    with ExitStack() as stack:
        clients = [stack.enter_context(dial(program.address)) for _ in range(20)]
        for number, sock in enumerate(clients):
            sock.sendall(f"n{number}\n".encode())
        for number, sock in enumerate(clients):
            assert hear(sock, program.address).split(b":")[1] == f"n{number}".encode()
    program.finish()


def test_usr2_and_winch_do_no_harm(start: Start) -> None:
    """WINCH, and USR2 as long as it means nothing, are ignored."""
    program = command(start, "app:Versioned", "-b", TCP, "-w", 2).ready()
    workers = program.wait_ready(2)
    send: Callable[[int], None] = program.send
    for number in (signal.SIGWINCH, signal.SIGUSR2, signal.SIGUSR1):
        send(number)
    ask(program.address)
    elapse(0.1)
    assert program.wait_ready(2) == workers
    program.finish()

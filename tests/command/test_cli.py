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


# -- what is refused -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (["app:Versioned"], 2, "-b"),
        (["app", "-b", TCP], 2, "MODULE:NAME"),
        ([":Versioned", "-b", TCP], 2, "MODULE:NAME"),
        (["app:", "-b", TCP], 2, "MODULE:NAME"),
        (["app:Versioned", "-b", "127.0.0.1:9"], 2, "tcp://HOST:PORT"),
        (["app:Versioned", "-b", "tcp://127.0.0.1"], 2, "port"),
        (["app:Versioned", "-b", "tcp://127.0.0.1:x"], 2, "'x'"),
        (["app:Versioned", "-b", "tcp://127.0.0.1:70000"], 2, "70000"),
        (["app:Versioned", "-b", "tcp://::1:80"], 2, "[::1]"),
        (["app:Versioned", "-b", "unix:"], 2, "path"),
        (["app:Versioned", "-b", "unix:/tmp/" + "x" * 120], 2, "107"),
        (["app:Versioned", "-b", "http://127.0.0.1:80"], 2, "http://"),
        (["app:Versioned", "-b", "udp://127.0.0.1:0"], 2, "streams"),
        (["app:Datagrams", "-b", TCP], 2, "datagrams"),
        (["app:Ready", "-b", "udp://127.0.0.1:0"], 2, "Ready"),
        (["app:Ready", "-b", "unix:nowhere/s"], 2, "Ready"),
        (["app:make_own", "-b", TCP], 2, "without an address"),
        (["app:make"], 2, "with an address"),
        (["app:Versioned", "-b", TCP, "--worker-class", "nothing"], 2, "worker_class"),
        (["app:Versioned", "-b", TCP, "--worker-class", "app:number"], 2, "worker_class"),
        (["app:Versioned", "-b", TCP, "--worker-class", "nowhere:Worker"], 2, "worker_class"),
        (["app:Versioned", "-b", TCP, "--worker-class", ":Worker"], 2, "worker_class"),
        (["app:Versioned", "-b", TCP, "--worker-class", "app:"], 2, "worker_class"),
        (["app:Versioned", "-b", TCP, "--worker-class", ".app:Worker"], 2, "worker_class"),
        (["app:make_own()", "-b", TCP], 2, "leave -b out"),
        (["app:application", "-b", TCP], 2, "--worker-class"),
        (["app:nothing", "-b", TCP], 4, "nothing"),
        (["app:number", "-b", TCP], 4, "7"),
        (["app:make_nothing"], 4, "None"),
        (["nowhere:Versioned", "-b", TCP], 4, "nowhere"),
        (["app.inner:Versioned", "-b", TCP], 4, "app"),
        (["app:Versioned", "-b", "unix:nowhere/s"], 1, "No such file"),
        (["app:Versioned", "-b", "tcp://192.0.2.1:0"], 1, "192.0.2.1"),
        (["app:Versioned", "-b", "tcp://no.such.name.invalid:0"], 1, "no.such.name.invalid"),
    ],
)
def test_refused(tmp_path: Path, arguments: list[str], code: int, says: str) -> None:
    """What cannot be served ends the command with its exit code and one line that says what and why; nothing is
    left."""
    found, out, err = run(tmp_path, *arguments)
    line = complaint(err)
    assert (found, out) == (code, ""), err
    assert line.startswith("prefork: error: ") and says in line, line
    assert sorted(set(os.listdir(tmp_path)) - {"__pycache__"}) == ["app.py"]


@pytest.mark.parametrize(
    "arguments",
    [
        ["-w", "0"],
        ["-w", "many"],
        ["-w", "1.5"],
        ["-w", "100000"],
        ["--request-timeout", "0"],
        ["--request-timeout", "nan"],
        ["--boot-timeout", "-1"],
        ["--graceful-timeout", "inf"],
        ["--max-memory", "1X"],
        ["--max-memory", "-5M"],
        ["--max-requests", "-1"],
        ["--log-level", "loud"],
        ["--no-such-flag"],
    ],
)
def test_refused_flags(tmp_path: Path, arguments: list[str]) -> None:
    """A flag out of range or of the wrong type is a usage error that names the flag and what was given."""
    code, _, err = run(tmp_path, "app:Versioned", "-b", TCP, *arguments)
    assert code == 2
    last = err.splitlines()[-1]
    assert last.startswith("prefork: error: ") and arguments[0] in last, err
    assert "Traceback" not in err


@pytest.mark.parametrize(
    ("fault", "says"),
    [
        ("def broken(:\n", "SyntaxError"),
        ("import no_such_module_at_all\n", "no_such_module_at_all"),
        ("def deep():\n    1 // 0\n\ndeep()\n", "in deep"),
        ("raise SystemExit('no')\n", "SystemExit"),
        ("open('/no/such/file')\n", "/no/such/file"),
    ],
)
def test_import_errors(tmp_path: Path, fault: str, says: str) -> None:
    """A program that cannot be imported: exit code 4 and its own traceback, without a line of prefork's or the
    import system's."""
    code, _, err = run(tmp_path, "app:Versioned", "-b", TCP, app=fault)
    assert code == 4, err
    assert err.startswith("prefork: error: app:Versioned: ") and says in err
    files = re.findall(r'File "([^"]+)"', err)
    assert files and all(name == str(tmp_path / "app.py") for name in files), err


def test_a_factory_that_raises(tmp_path: Path) -> None:
    """What NAME() raises is shown as an import's trouble is: exit code 4, the program's own traceback."""
    code, _, err = run(tmp_path, "app:make_trouble()", "-b", TCP)
    assert code == 4 and "LookupError: no database" in err, err
    assert re.findall(r'File "([^"]+)"', err) == [str(tmp_path / "app.py")], err


def test_a_directory_that_was_removed(tmp_path: Path) -> None:
    """A working directory that is gone only matters to a program that lies in it."""
    elsewhere, place = tmp_path / "elsewhere", tmp_path / "place"
    elsewhere.mkdir()
    (elsewhere / "there.py").write_text("number = 7\n")
    for name, says in (("there:number", "there:number is 7"), ("app:number", "no module 'app'")):
        place.mkdir()
        # Python 3.13.0 itself fails to import much without a directory: that comes first.
        inside = (
            f"import prefork.command.cli, shutil, sys; shutil.rmtree({str(place)!r}); sys.path[0] = {str(elsewhere)!r}"
        )
        (place / "app.py").write_text("number = 7\n")
        done = subprocess.run(
            [sys.executable, "-c", f"{inside}; sys.exit(prefork.command.cli.main())", name, "-b", TCP],
            cwd=place, capture_output=True, text=True, timeout=20, check=False,
        )  # fmt: skip
        assert done.returncode == 4 and says in complaint(done.stderr), done.stderr


def test_import_that_hangs(tmp_path: Path) -> None:
    """An import that does not end is given up at boot_timeout, with a line that says so."""
    begun = time.monotonic()
    code, _, err = run(
        tmp_path, "app:Versioned", "-b", TCP, "--boot-timeout", 0.5, app="import threading\nthreading.Event().wait()\n"
    )
    assert code == 4 and "boot_timeout" in complaint(err)
    assert time.monotonic() - begun < 10


def test_import_that_ends_the_process(tmp_path: Path) -> None:
    """An import that calls os._exit is an error with a line of its own."""
    code, _, err = run(tmp_path, "app:Versioned", "-b", TCP, app="import os\nos._exit(0)\n")
    assert code == 4 and "ended the process" in complaint(err)


def test_no_worker_gets_ready(tmp_path: Path) -> None:
    """Workers that cannot boot: exit code 3, with the traceback of the program."""
    app = APP + textwrap.dedent(
        """
        class Broken(prefork.SyncWorker):
            def setup(self):
                raise ValueError("ordered trouble")
        """
    )
    code, _, err = run(tmp_path, "app:Versioned", "-b", TCP, "--worker-class", "app:Broken", app=app)
    assert code == 3, err
    assert "prefork: error: no worker became ready" in err and "ValueError: ordered trouble" in err


@pytest.mark.parametrize(("kind", "library"), [("wsgi", "httptools"), ("asgi", "uvicorn")])
def test_a_library_that_is_not_there(tmp_path: Path, kind: str, library: str) -> None:
    """A worker class whose library is not installed: exit code 2, and one line that says what to install."""
    app = f"""
        import sys
        sys.modules[{library!r}] = None
        application = print
        from prefork.servers.worker_class import resolve
        Kind = resolve({kind!r})
    """
    arguments = ("app:application", "-b", TCP, "--worker-class", "app:Kind")
    code, _, err = run(tmp_path, *arguments, app=textwrap.dedent(app))
    assert code == 2, err
    line = complaint(err)
    assert library in line and f"pip install 'prefork[{kind}]'" in line and line.count("worker_class") == 1


def test_address_in_use(tmp_path: Path) -> None:
    """An address that somebody listens on: exit code 1, and one line that names it."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        bind = f"tcp://127.0.0.1:{taken.getsockname()[1]}"
        code, _, err = run(tmp_path, "app:Versioned", "-b", bind)
    assert code == 1
    line = complaint(err)
    assert bind in line and "in use" in line


def test_second_address_in_use(tmp_path: Path) -> None:
    """Where the second of two addresses cannot be bound, the first is given back, its file too."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        bind = f"tcp://127.0.0.1:{taken.getsockname()[1]}"
        code, _, err = run(tmp_path, "app:Versioned", "-b", f"unix:{tmp_path}/s", "-b", bind)
    assert code == 1 and bind in complaint(err)
    assert sorted(set(os.listdir(tmp_path)) - {"__pycache__"}) == ["app.py"]


def test_help_and_version(tmp_path: Path) -> None:
    """--help names every flag, --version the version; both end with 0."""
    code, out, err = run(tmp_path, "--help")
    assert (code, err) == (0, "")
    for flag in ("--bind", "--workers", "--worker-class", "--request-timeout", "--max-memory", "--log-level"):
        assert flag in out
    code, out, err = run(tmp_path, "--version")
    assert (code, err) == (0, "") and out.startswith("prefork ")


# -- reload ----------------------------------------------------------------------------------------


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
    until(lambda: len(program.children()) == 3, 5, "the trial runs")
    assert program.stop().seconds < 1
    program.finish()


@pytest.mark.parametrize(
    ("now", "says"), [('("127.0.0.1", 1)', "tcp://127.0.0.1:1"), ('str(RUN / "other")', "new start")]
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
    """An ordered stop, of whichever kind, is exit code 0; TERM answers what is in hand."""
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

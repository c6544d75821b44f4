"""The command refuses what it cannot serve, with an exit code and one clear line."""

import os
import re
import socket
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

import pytest

from support import patterns
from support.commands import APP, TCP
from support.scripts import path_of_modules

pytestmark = pytest.mark.timeout(60)


def run(directory: Path, *arguments: object, **options: Any) -> tuple[int, str, str]:
    """The command to its end: exit code, standard output, standard error."""
    (directory / "app.py").write_text(options.pop("app", APP))
    done = subprocess.run(
        [sys.executable, "-m", "prefork", *map(str, arguments)],
        cwd=directory,
        env={**os.environ, **path_of_modules()},
        capture_output=True,
        text=True,
        timeout=20,
        check=False,
        **options,
    )
    return done.returncode, done.stdout, done.stderr


def complaint(text: str) -> str:
    """The one line on standard error that is not the log's."""
    lines = [line for line in text.splitlines() if not patterns.LOG_LINE.match(line)]
    assert len(lines) == 1, text
    return lines[0]


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        ([":Versioned", "-b", TCP], 2, "MODULE:NAME"),
        (["app:", "-b", TCP], 2, "MODULE:NAME"),
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
        (["app:make_own", "-b", TCP], 2, "leave -b out"),
        (["app:Versioned", "-b", TCP, "--worker-class", "nothing"], 2, "worker_class"),
        (["app:Versioned", "-b", TCP, "--worker-class", "app:number"], 2, "worker_class"),
        (["app:Versioned", "-b", TCP, "--worker-class", "nowhere:Worker"], 2, "worker_class"),
        (["app:Versioned", "-b", TCP, "--worker-class", ":Worker"], 2, "worker_class"),
        (["app:Versioned", "-b", TCP, "--worker-class", "app:"], 2, "worker_class"),
        (["app:Versioned", "-b", TCP, "--worker-class", ".app:Worker"], 2, "worker_class"),
        (["app:make_own()", "-b", TCP], 2, "leave -b out"),
        (["app:application", "-b", TCP, "-k", "sync"], 2, "-k wsgi"),
        (["app:Versioned", "-b", TCP, "-k", "wsgi"], 2, "-k sync"),
        (["app:anything", "-b", TCP], 2, "-k wsgi or -k asgi"),
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


def test_signals_at_the_end(tmp_path: Path) -> None:
    """A signal that comes when the exit code is decided changes nothing, and nothing is printed for it."""
    script = """
import os, signal, sys
from prefork.command.cli import main
code = main(["no_such_module:app"])
for number in (signal.SIGTERM, signal.SIGQUIT, signal.SIGINT):
    os.kill(os.getpid(), number)
sys.exit(code)
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 4
    assert "no_such_module" in complaint(done.stderr)


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

"""Where a control socket comes about: by default where there is room for it, else at the path that was asked for."""

import errno
import os
import re
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from support import Program, ask, patterns, until
from support.commands import TCP, command
from support.operations import asked, control_of, done, pool, steer
from support.scripts import Start, launch

pytestmark = pytest.mark.timeout(60)

NONE = re.compile(r"INFO: no control socket: (.*)")
MADE = re.compile(r"INFO: control socket: (\S+)")


def by_default(start: Start, *arguments: object, **environment: str) -> Program:
    """The command without --control, in an environment that names these folders and no other."""
    env = {"RUNTIME_DIRECTORY": "", "XDG_RUNTIME_DIR": "", **environment}
    return command(start, "app:Versioned", "-b", TCP, "-w", 1, *arguments, env=env).ready()


@pytest.fixture
def session(tmp_path: Path) -> Path:
    """A folder as a session has it."""
    folder = tmp_path / "session"
    folder.mkdir(mode=0o700)
    return folder


def test_in_the_folder_of_a_session(start: Start, session: Path) -> None:
    """The command makes its socket in a folder of prefork's own in XDG_RUNTIME_DIR, with the pid in its name."""
    program = by_default(start, XDG_RUNTIME_DIR=str(session))
    path = session / "prefork" / f"prefork-{program.pid}.sock"
    assert program.found(MADE)[0][1] == str(path)
    assert asked(path, "status")["path"] == str(path)
    assert path.parent.stat().st_mode & 0o777 == 0o700
    program.finish()
    assert os.listdir(path.parent) == []


def test_in_the_folder_of_a_service(start: Start, session: Path, tmp_path: Path) -> None:
    """The folder that systemd gives to a service comes first."""
    service = tmp_path / "service"
    service.mkdir()
    program = by_default(start, XDG_RUNTIME_DIR=str(session), RUNTIME_DIRECTORY=f"{service}:/other")
    assert os.listdir(session) == []
    assert asked(service / f"prefork-{program.pid}.sock", "status")["pid"] == program.pid
    program.finish()


def test_two_instances_in_one_folder(start: Start, session: Path) -> None:
    """Two pools of one program in one directory have a socket each; a command asks which one is meant."""
    env = {"XDG_RUNTIME_DIR": str(session)}
    one, two = (by_default(start, **env) for _ in range(2))
    result = steer("status", env=env)
    assert result.returncode == 2 and "several pools" in result.stderr
    assert f"prefork-{one.pid}.sock" in result.stderr and f"prefork-{two.pid}.sock" in result.stderr
    listed = done("ps", env=env)
    assert listed.count("app:Versioned") == 2 and str(one.pid) in listed and str(two.pid) in listed
    two.finish()
    assert f"pid {one.pid}" in done("status", env=env)
    one.finish()


@pytest.mark.parametrize("off", ["none", "no folder"])
def test_without(start: Start, off: str, session: Path) -> None:
    """With `--control none`, or where the environment names no folder, the pool serves without a control socket."""
    if off == "none":
        program = by_default(start, "--control", "none", XDG_RUNTIME_DIR=str(session))
        assert not program.found(NONE)
    else:
        program = by_default(start)
        assert "neither RUNTIME_DIRECTORY nor XDG_RUNTIME_DIR" in program.found(NONE)[0][1]
    ask(program.address)
    assert os.listdir(session) == [] and not program.found(MADE)
    program.finish()


@pytest.fixture
def unusable(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    """A folder in which nothing can be made: it is missing, a file, on a read-only or on a full file system."""
    folder = tmp_path / "unusable"
    if request.param == "missing":
        yield folder
        return
    if request.param == "file":
        folder.write_text("")
        yield folder
        return
    folder.mkdir()
    size = "4k" if request.param == "full" else "64k"
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size},nr_inodes=3", "prefork-test", folder])
    if mounted.returncode:
        pytest.skip("a file system cannot be mounted here")
    try:
        if request.param == "full":
            fill(folder)
        else:
            subprocess.run(["mount", "-o", "remount,ro", folder], check=True)
        yield folder
    finally:
        subprocess.run(["umount", folder], check=True)


def fill(folder: Path) -> None:
    """Leave room for nothing."""
    for number in range(100):
        try:
            (folder / f"file-{number}").write_bytes(b"x" * 4096)
        except OSError as error:
            assert error.errno == errno.ENOSPC
            return
    raise AssertionError("the file system does not become full")


@pytest.mark.parametrize("unusable", ["missing", "file", "read-only", "full"], indirect=True)
def test_where_none_can_be_made(start: Start, unusable: Path) -> None:
    """Where the folder takes no socket the log says so at level info, and the pool serves."""
    for name in ("RUNTIME_DIRECTORY", "XDG_RUNTIME_DIR"):
        program = by_default(start, **{name: str(unusable)})
        ((reason,),) = [match.groups() for match in program.found(NONE)]
        assert str(unusable) in reason
        ask(program.address)
        program.finish()


@pytest.mark.parametrize("unusable", ["missing", "read-only"], indirect=True)
def test_a_path_that_was_asked_for(start: Start, unusable: Path) -> None:
    """A control socket at a path that was given must come about: else the command ends with code 1, and names it."""
    program = command(start, "app:Versioned", "-b", TCP, "--control", unusable / "control")
    assert program.wait_exit(10).code == 1
    assert f"error: cannot listen on {unusable / 'control'}" in program.log
    program.finish(code=1, allow=[r"prefork: error: .*"])


def test_a_path_that_is_too_long(start: Start) -> None:
    """A path that no socket can have is one clear line."""
    program = command(start, "app:Versioned", "-b", TCP, "--control", "{run}/" + "x" * 120)
    assert program.wait_exit(10).code == 1
    assert "too long" in program.log
    program.finish(code=1, allow=[r"prefork: error: .*"])


def test_a_path_that_is_taken(start: Start) -> None:
    """Of two pools with one control path the second is refused, and the first serves on."""
    first = pool(start)
    second = command(start, "app:Versioned", "-b", TCP, "--control", control_of(first))
    assert second.wait_exit(10).code == 1
    assert "another server is running on this path" in second.log
    second.finish(code=1, allow=[r"prefork: error: .*"])
    assert asked(control_of(first), "status")["pid"] == first.pid
    first.finish()


def test_after_a_kill(start: Start) -> None:
    """After kill -9 of the master a new start takes the stale socket over."""
    first = pool(start)
    first.send(signal.SIGKILL)
    first.wait_exit()
    assert control_of(first).exists()
    until(lambda: not first.remaining(), 5, "the workers are gone")
    second = pool(start, directory=first.directory)
    assert asked(control_of(first), "status")["pid"] == second.pid
    second.finish()
    first.finish(code=-signal.SIGKILL)


def test_a_stale_socket_by_default(start: Start, session: Path) -> None:
    """What a killed master has left is no pool to the commands, and is removed by whoever looks next."""
    env = {"XDG_RUNTIME_DIR": str(session)}
    for remover in ("ps", "start"):
        killed = by_default(start, **env)
        path = session / "prefork" / f"prefork-{killed.pid}.sock"
        killed.send(signal.SIGKILL)
        killed.wait_exit()
        assert path.exists()
        if remover == "ps":
            assert done("ps", env=env) == ""
        else:
            by_default(start, **env).finish()
        assert os.listdir(path.parent) == []
        killed.finish(code=-signal.SIGKILL)


def test_what_is_no_socket_stays(start: Start, session: Path) -> None:
    """A file that is no socket, and a socket that somebody else listens on, are nobody's to remove."""
    folder = session / "prefork"
    folder.mkdir()
    (folder / "prefork-1.sock").write_text("mine")
    program = by_default(start, XDG_RUNTIME_DIR=str(session))
    done("ps", env={"XDG_RUNTIME_DIR": str(session)})
    assert (folder / "prefork-1.sock").read_text() == "mine"
    program.finish()


LIBRARY = """
    class Server(prefork.PreforkTCPServer):
        workers = 1
        {setting}

    with Server(("127.0.0.1", 0), Handler) as server:
        server.serve_forever()
"""


def test_in_a_program_of_its_own(start: Start, session: Path) -> None:
    """A server has a control socket where its attribute `control` names one, and none otherwise."""
    env = {"XDG_RUNTIME_DIR": str(session)}
    quiet = launch(start, LIBRARY.format(setting=""), env=env).ready()
    assert os.listdir(session) == [] and "control" not in quiet.log
    quiet.finish()
    program = launch(start, LIBRARY.format(setting='control = str(RUN / "control")'), env=env).ready()
    answer = asked(control_of(program), "status")
    assert (answer["pid"], answer["program"]) == (program.pid, "app.py")
    done("stop", "--wait", "--control", control_of(program))
    program.wait_exit()
    program.finish()


def test_the_programs_own_attribute(start: Start) -> None:
    """Under the command the server's attribute counts where no flag is given; a reload does not change it."""
    app = 'from kit import *\nclass Server(prefork.PreforkTCPServer):\n    control = str(RUN / "control")\n'
    app += "    workers = 1\n    RequestHandlerClass = Handler\n"
    program = command(start, "app:Server", "-b", TCP, app=app).ready()
    program.write("app.py", app.replace("control", "other", 2).replace("other", "control", 1))
    program.reload()
    program.wait_for(r"control: a change needs a restart")
    assert asked(control_of(program), "status")["generation"] == 2
    program.finish(allow=[patterns.ANYTHING])

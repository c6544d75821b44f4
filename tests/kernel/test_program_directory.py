"""The directory in which a program lives: by its name, so that a deploy may move a link; and what is relative to it."""

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from support import Program, ask, patterns, until
from support.scripts import APPLICATIONS, Start, handler_text, path_of_modules
from support.web import Web

pytestmark = pytest.mark.timeout(60)

TCP = "tcp://127.0.0.1:0"

# `shelf` is in a folder beside the program's, by PYTHONPATH.
APP = "from pathlib import Path\nimport shelf\n" + handler_text(
    "{VERSION} {shelf.VERSION} {Path('data').read_text()} {os.getcwd()} {__file__}"
)


def release(root: Path, number: int) -> Path:
    """A release of a program; all files of all releases are equally old, as out of an archive."""
    folder = root / str(number)
    (folder / "lib").mkdir(parents=True)
    (folder / "app.py").write_text(f"VERSION = {number}\n{APP}")
    (folder / "lib" / "shelf.py").write_text(f"VERSION = {number}\n")
    (folder / "data").write_text(f"data-{number}")
    if number > 1:
        (folder / "new.py").write_text("")
        (folder / "app.py").write_text(f"import new\nVERSION = {number}\n{APP}")
    for path in [*folder.rglob("*"), folder]:
        os.utime(path, (1e9, 1e9))
    return folder


def link(root: Path, number: int) -> None:
    (root / "new").symlink_to(str(number))
    (root / "new").replace(root / "current")


def expected(root: Path, number: int) -> str:
    return f"{number} {number} data-{number} {root / str(number)} {root / 'current' / 'app.py'}"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    root = tmp_path / "srv"
    release(root, 1)
    link(root, 1)
    return root


HOW = {
    "shell": "cd {root}/current && exec {python} -m prefork {arguments}",
    "script": "cd {root}/current && exec {bin}/prefork {arguments}",
    "chdir": "cd {root} && exec {python} -m prefork {arguments} --chdir current",
    "absolute": "cd / && exec {python} -m prefork {arguments} --chdir {root}/current",
}


def begin(start: Start, root: Path, how: str, *arguments: object) -> Program:
    """The command, started by a shell."""
    words = " ".join(map(str, ["app:Handler", "-b", TCP, "-w", 1, *arguments]))
    shell = HOW[how].format(root=root, arguments=words, python=sys.executable, bin=os.path.dirname(sys.executable))
    paths = {"shell": "lib", "script": "lib", "chdir": "current/lib", "absolute": f"{root}/current/lib"}
    environment = {"PYTHONPATH": paths[how], "PYTHONDONTWRITEBYTECODE": "1"}
    return start("{work}/shell.py", files={"shell.py": SHELL}, env={**environment, "SHELL_LINE": shell})


SHELL = """
import os
os.execv("/bin/sh", ["sh", "-c", os.environ["SHELL_LINE"]])
"""


@pytest.mark.parametrize("how", HOW)
def test_a_deploy_by_a_link(start: Start, root: Path, how: str) -> None:
    """A reload serves what the name of the directory stands for then: code, other modules, files and all; so do those
    who are respawned after it."""
    program = begin(start, root, how).ready()
    workers = program.wait_ready(1)
    assert ask(program.address).result == expected(root, 1)
    release(root, 2)
    link(root, 2)
    assert ask(program.address).result == expected(root, 1)
    program.reload()
    workers += program.wait_ready(1, without=workers)
    assert ask(program.address).result == expected(root, 2)
    shutil.rmtree(root / "1")
    program.kill_workers(workers[-1])
    program.wait_ready(1, without=workers)
    assert ask(program.address).result == expected(root, 2)
    program.finish()


def test_a_directory_that_is_gone(start: Start, root: Path) -> None:
    """Where there is no directory of that name a reload says so, and the old generation serves on; when there is one
    again, it is what a reload and a respawn serve."""
    program = begin(start, root, "shell").ready()
    workers = program.wait_ready(1)
    (root / "current").unlink()
    program.send(signal.SIGHUP)
    program.wait_for(patterns.RELOAD_FAILED)
    assert f"there is no module 'app' in {root}/current (which was removed)" in program.log
    assert ask(program.address).result == expected(root, 1)
    release(root, 2)
    link(root, 2)
    program.reload()
    program.wait_ready(1, without=workers)
    assert ask(program.address).result == expected(root, 2)
    program.finish()


@pytest.mark.parametrize("name", ["", "/", "relative", "/nonexistent"])
def test_a_name_that_is_another_directorys(start: Start, root: Path, name: str) -> None:
    """$PWD is believed only where it is the name of the current directory."""
    environment = {"PWD": name, "PYTHONPATH": str(root / "current" / "lib")}
    program = start(
        "prefork", "app:Handler", "-b", TCP, "-w", 1, files={"app.py": f"VERSION = 3\n{APP}"}, env=environment
    )
    program.write("data", "data-3")
    program.ready()
    assert ask(program.address).result == f"3 1 data-3 {program.work} {program.work / 'app.py'}"
    program.finish()


@pytest.mark.parametrize("name", ["missing", "file"])
def test_a_directory_that_there_is_not(tmp_path: Path, name: str) -> None:
    """--chdir to what is no directory ends the command with 2 and one line."""
    (tmp_path / "file").write_text("")
    done = subprocess.run(
        [sys.executable, "-m", "prefork", "app:Handler", "--chdir", name],
        cwd=tmp_path, capture_output=True, text=True, timeout=20, check=False,
    )  # fmt: skip
    assert done.returncode == 2
    assert (
        done.stderr.startswith(f"prefork: error: --chdir: cannot change to {name!r}: ") and done.stderr.count("\n") == 1
    )


# -- what is relative --------------------------------------------------------------------------------------------------

MOVING = (
    'import os\nfrom kit import *\nos.chdir("/")\n'
    + APPLICATIONS
    + """
class Server(prefork.PreforkTCPServer):
    workers = 1
    worker_class = "wsgi"
    access_log = "logs/access"

    def __init__(self, address, application=application):
        super().__init__(address, application)

def serve():
    with Server(("127.0.0.1", 0)) as server:
        server.serve_forever()
"""
)


SERVING = """
import os
here = os.getcwd()
import app
os.chdir(here)
app.Server.service_actions = lambda server: os.chdir("/")
app.serve()
"""


@pytest.mark.parametrize("how", ["wsgi", "asgi", "server", "chdir", "script"])
def test_a_relative_access_log(start: Start, tmp_path: Path, how: str) -> None:
    """A relative path of the access log begins where the command was started, or was told to go, and in a script where
    serving starts, whatever the application does to its directory; also after a reload."""
    work = tmp_path / "work"
    where = work / "inner" if how == "chdir" else work
    (where / "logs").mkdir(parents=True)
    (where / "app.py").write_text(MOVING)
    arguments: list[object] = ["prefork", "app:Server", "-b", TCP, "-w", 1]
    if how == "script":
        (work / "serving.py").write_text(SERVING)
        arguments = ["{work}/serving.py"]
    elif how != "server":
        kind = "asgi" if how == "asgi" else "wsgi"
        arguments[1] = f"app:{'asgi' if how == 'asgi' else 'application'}"
        arguments += ["--worker-class", kind, "--access-log", "logs/access"]
    if how == "chdir":
        arguments += ["--chdir", "inner"]
    program = start(*arguments, directory=tmp_path, env=path_of_modules()).ready()
    workers = program.wait_ready(1)
    check_log(program, where, 1)
    program.reload()
    program.wait_ready(1, without=workers)
    check_log(program, where, 2)
    program.finish()


def check_log(program: Program, where: Path, number: int) -> None:
    with Web(program.address) as web:
        assert web.get().status == 200
    path = where / "logs" / "access"
    until(lambda: path.exists() and path.read_text().count("\n") == number, 5, f"{number} lines in the access log")


@pytest.mark.parametrize("scheme", ["unix", "unixgram"])
def test_a_relative_unix_path(start: Start, tmp_path: Path, scheme: str) -> None:
    """So does a Unix path of the command line; its files are removed in the end, also where a deploy has moved the link
    by which the directory was named."""
    root = tmp_path / "srv"
    for number in (1, 2):
        (root / str(number)).mkdir(parents=True)
        (root / str(number) / "app.py").write_text(MOVING)
    link(root, 1)
    name = "Handler" if scheme == "unix" else "Datagrams"
    arguments = [f"app:{name}", "-b", f"{scheme}:s", "-w", 1, "--chdir", str(root / "current")]
    program = start("prefork", *arguments, env=path_of_modules()).ready()
    assert (root / "1" / "s").is_socket() and ask(program.address).result == "done"
    link(root, 2)
    program.reload()
    assert program.stop().code == 0
    assert not list(root.rglob("s")) and not list(root.rglob("s.lock"))
    program.finish()


def test_a_relative_unix_path_in_a_deep_directory(start: Start, tmp_path: Path) -> None:
    """A relative path is bound where a whole one would be longer than a Unix socket may have."""
    deep = tmp_path / ("d" * 60) / ("e" * 60)
    deep.mkdir(parents=True)
    (deep / "app.py").write_text("from kit import *")
    program = start("prefork", "app:Handler", "-b", "unix:s", "-w", 1, "--chdir", str(deep), env=path_of_modules())
    program.ready()
    assert (deep / "s").is_socket()
    assert program.stop().code == 0
    assert not (deep / "s").exists()
    program.finish()

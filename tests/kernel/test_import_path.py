"""Modules and their names: a program's own harm nobody but itself, and what prefork needs is there, whatever becomes of
its files while it runs."""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

import prefork
from support import Program, ask
from support.scripts import APPLICATIONS, Start, handler_text
from support.web import Web

pytestmark = pytest.mark.timeout(60)

TCP = "tcp://127.0.0.1:0"

APP = "import prefork\n" + handler_text() + APPLICATIONS
AWAITING = """
class Handler(prefork.AsyncStreamRequestHandler):
    async def handle(self):
        identity = (await self.reader.readline()).decode().split()[0]
        self.writer.write(f"{os.getpid()}:{identity}:done\\n".encode())

"""
KINDS = {"sync": "Handler", "thread": "Handler", "asyncio": "Handler", "wsgi": "application", "asgi": "asgi"}

# What is imported by prefork or by what it stands on, and not by the interpreter itself on its way to a module.
STANDARD = (
    *("queue", "heapq", "select", "selectors", "socket", "socketserver", "threading", "logging", "http", "json"),
    *("asyncio", "argparse", "concurrent", "inspect", "ctypes", "traceback", "random", "resource", "mmap", "ssl"),
    *("multiprocessing", "email", "wsgiref", "urllib", "dataclasses", "string", "csv", "ast", "signal"),
)
OTHERS = ("psutil", "setproctitle", "httptools", "uvicorn", "uvloop", "websockets", "h11", "click")


def text(kind: str) -> str:
    """A program with a handler or application, and a server class that names its class of workers."""
    server = f"""
class Server(prefork.PreforkTCPServer):
    worker_class = {kind!r}

    def __init__(self, address, handler=None):
        super().__init__(address, {KINDS[kind]})
"""
    return APP + (AWAITING if kind == "asyncio" else "") + server


def shadows(*names: str) -> dict[str, str]:
    return {f"{name}.py": "raise RuntimeError('of the program')\n" for name in names}


SERVE = """
import logging
logging.basicConfig(level=logging.INFO, format="%(asctime)s prefork[%(process)d] %(levelname)s: %(message)s")
Server.workers = 1
with Server(("127.0.0.1", 0)) as pool:
    pool.serve_forever()
"""


def check_answer(program: Program, kind: str) -> None:
    if kind in ("wsgi", "asgi"):
        with Web(program.address) as web:
            assert web.get().body == b"done"
    else:
        assert ask(program.address).result == "done"


# -- the program's names -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["flag", "server"])
@pytest.mark.parametrize("kind", KINDS)
def test_files_with_the_names_of_other_modules(start: Start, kind: str, how: str) -> None:
    """Files in the program's folder that have the names of modules which prefork needs harm nobody: whether the command
    is told the class of workers, or the server says it; at the start, at a reload, and at a respawn."""
    arguments = [f"app:{KINDS[kind]}", "--worker-class", kind] if how == "flag" else ["app:Server"]
    files = {"app.py": text(kind), **shadows(*STANDARD, *OTHERS)}
    program = start("prefork", *arguments, "-b", TCP, "-w", 1, files=files).ready()
    workers = program.wait_ready(1)
    check_answer(program, kind)
    program.reload()
    workers += program.wait_ready(1, without=workers)
    program.kill_workers(workers[-1])
    program.wait_ready(1, without=workers)
    check_answer(program, kind)
    program.finish()


CONSOLE = [sysconfig.get_path("scripts") + "/prefork"]
MODULE = [sys.executable, "-m", "prefork"]


@pytest.mark.parametrize(
    "command,path,others",
    [(CONSOLE, None, OTHERS), (CONSOLE, ".", ()), (MODULE, ".", ())],
    ids=["script", "script with PYTHONPATH", "module with PYTHONPATH"],
)
def test_however_the_command_is_started(
    tmp_path: Path, command: list[str], path: str | None, others: tuple[str, ...]
) -> None:
    """So it is by the script `prefork`, and where PYTHONPATH names the folder; there what is not Python's own is taken
    from the folder, as an order."""
    app = text("thread").replace("PreforkTCPServer", "PreforkUnixStreamServer")
    for name, content in {"app.py": app, **shadows(*STANDARD, *others)}.items():
        (tmp_path / name).write_text(content)
    environment = {**os.environ, **({"PYTHONPATH": path} if path else {})}
    with subprocess.Popen(
        [*command, "app:Server", "-b", f"unix:{tmp_path / 's'}", "-w", "1"],
        cwd=tmp_path, env=environment, stderr=subprocess.PIPE, text=True,
    ) as process:  # fmt: skip
        try:
            assert process.stderr
            log = ""
            while "pool ready" not in log:
                line = process.stderr.readline()
                log += line
                assert line, log
        finally:
            process.terminate()
        assert process.wait(10) == 0


def test_the_program_imports_its_own(start: Start) -> None:
    """A module of the program's own that has the name of a standard one which prefork does not need is found."""
    own = {"queue.py": "VERSION = 'own'\n", "csv.py": "import queue\n"}
    app = "import csv\n" + APP.replace(":done", ":{csv.queue.VERSION}")
    program = start("prefork", "app:Handler", "-b", TCP, "-w", 1, files={"app.py": app, **own}).ready()
    assert ask(program.address).result == "own"
    program.reload()
    program.finish()


def test_a_script_keeps_its_own(start: Start) -> None:
    """A script that has imported its own `queue` keeps it, beside a class of workers that needs the standard one."""
    app = "import queue\n" + text("thread").replace(":done", ":{queue.VERSION}") + SERVE
    program = start("{work}/app.py", files={"app.py": app, "queue.py": "VERSION = 'own'\n"}).ready()
    assert ask(program.address).result == "own"
    program.finish()


@pytest.mark.parametrize(
    "name,content,kind,says",
    [
        ("select", APP, "sync", r"/select\.py cannot be imported: 'select' is the name of .*; rename it"),
        ("time", APP, "sync", r"/time\.py cannot be imported: 'time' is the name of .* built into Python; rename it"),
        ("json/__init__", APP, "sync", r"/json/__init__\.py cannot be imported: .* /.*/json/__init__\.py, .*"),
        ("app", "import queue\n" + text("thread"), "", r"/queue\.py has the name of a standard module .*; rename it"),
        ("os", "", "sync", r"/os\.py cannot be imported: 'os' is the name of .*; rename it"),
    ],
    ids=["standard", "built in", "package", "imported", "frozen"],
)
def test_a_module_that_cannot_be_had_is_named(tmp_path: Path, name: str, content: str, kind: str, says: str) -> None:
    """A program that lies in a module of a name which is taken, or has imported one that its workers cannot have, is
    refused in one line that names the file."""
    module = name.partition("/")[0]
    (tmp_path / "json").mkdir()
    (tmp_path / f"{name}.py").write_text(content)
    (tmp_path / "queue.py").write_text("VERSION = 'own'\n")
    arguments = [f"{module}:Handler", "--worker-class", kind] if kind else [f"{module}:Server"]
    done = subprocess.run(
        [*MODULE, *arguments, "-b", TCP], cwd=tmp_path, capture_output=True, text=True, timeout=20, check=False
    )
    assert done.returncode == 4, done.stderr
    pattern = rf"prefork: error: \S+: {tmp_path}{says} \[PF0127\]\n"
    assert re.fullmatch(pattern, done.stderr), done.stderr


# -- prefork's own files -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["removed", "garbled"])
@pytest.mark.parametrize("kind", [*KINDS, "server", "http", "script"])
def test_an_upgrade_under_a_running_master(start: Start, tmp_path: Path, kind: str, how: str) -> None:
    """Workers boot, are replaced and reloaded though prefork's files are no longer there, or are others: whatever class
    they are of, whichever of prefork's modules the program uses, and in a script, too."""
    installed = tmp_path / "installed"
    shutil.copytree(Path(prefork.__file__).parent, installed / "prefork")
    flags: list[str] = []
    app, command = text("asgi"), ["prefork", "app:Server"]
    if kind in KINDS:
        flags = ["--worker-class", kind, "--max-memory", "1G", "--max-requests", "1"]
        app, command = text(kind), ["prefork", f"app:{KINDS[kind]}", *flags]
    elif kind == "script":
        app, command = app + SERVE, ["{work}/app.py"]
    elif kind == "http":
        app = "import prefork.servers.http\n" + text("sync")
    speaks = kind if kind in KINDS else "sync" if kind == "http" else "asgi"
    if kind != "script":
        command += ["-b", TCP, "-w", "1"]
    program = start(*command, files={"app.py": app}, env={"PYTHONPATH": str(installed)}).ready()
    workers = program.wait_ready(1)
    for path in (installed / "prefork").rglob("*.py"):
        if how == "removed":
            path.unlink()
        else:
            path.write_text("raise RuntimeError('of another version')\n")
    for cache in list((installed / "prefork").rglob("__pycache__")):
        shutil.rmtree(cache)
    check_answer(program, speaks)
    if flags:
        workers += program.wait_ready(1, without=workers)  # recycled
    program.kill_workers(*program.children())
    workers += program.wait_ready(1, without=workers)
    program.reload()
    check_answer(program, speaks)
    program.finish()

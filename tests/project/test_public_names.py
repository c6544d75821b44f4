"""The names that a program of the first release uses: each is where it was, in every way in which it is documented."""

import importlib.metadata
import subprocess
import sys
from pathlib import Path

import pytest

import prefork
import prefork.workers
from support import ask
from support.scripts import Notes, Start, launch

pytestmark = pytest.mark.timeout(60)

# A list of its own: a name that disappears from the package disappears from `prefork.__all__`, too.
NAMES = [
    *("ASGIWorker", "AsyncDatagramRequestHandler", "AsyncStreamRequestHandler", "AsyncioWorker"),
    *("BaseRequestHandler", "BootError", "BufferedHTTPMixIn", "DatagramRequestHandler", "OptionError"),
    *("PreforkError", "PreforkHTTPServer", "PreforkMixIn", "PreforkTCPServer", "PreforkUDPServer"),
    *("PreforkUnixDatagramServer", "PreforkUnixStreamServer", "ProgramError", "Reason", "RequestTimeout"),
    *("StreamRequestHandler", "SyncWorker", "ThreadWorker", "WSGIWorker", "Worker", "WorkerExit", "serve"),
]
CLASSES = ["ASGIWorker", "AsyncioWorker", "SyncWorker", "ThreadWorker", "WSGIWorker", "Worker"]


def python(code: str) -> str:
    """What the code prints in an interpreter of its own that sees only what is installed."""
    done = subprocess.run(
        [sys.executable, "-I", "-W", "error", "-c", code], capture_output=True, text=True, timeout=30, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout.strip()


def test_the_list_is_whole() -> None:
    """`prefork.__all__` is the list of public names, and __version__ is beside it."""
    assert sorted(prefork.__all__) == NAMES == sorted(NAMES)
    imported = python("from prefork import *; from prefork import __version__; print(*dir())").split()
    assert {*NAMES, "__version__"} <= set(imported)


@pytest.mark.parametrize("name", NAMES)
def test_a_name_of_the_package(name: str) -> None:
    """Each name can be the first that is imported, and is an attribute of the package."""
    code = f"from prefork import {name} as first; import prefork; print(first is prefork.{name}, first.__name__)"
    assert python(code) == f"True {name}"


@pytest.mark.parametrize("name", CLASSES)
def test_a_class_of_workers(name: str) -> None:
    """Each class is a name of prefork.workers, whichever of the two packages is asked first."""
    same = f"print(first is prefork.{name} is prefork.workers.{name}, first.__name__)"
    assert python(f"from prefork.workers import {name} as first; import prefork; {same}") == f"True {name}"
    assert python(f"import prefork.workers; first = prefork.{name}; {same}") == f"True {name}"


@pytest.mark.parametrize("package", [prefork, prefork.workers])
def test_a_name_that_is_not_there(package: object) -> None:
    """Any other name is an AttributeError in the words of Python."""
    where = getattr(package, "__name__", "")
    with pytest.raises(AttributeError, match=f"^module '{where}' has no attribute 'NoSuchThing'$"):
        getattr(package, "NoSuchThing")  # noqa: B009


@pytest.mark.parametrize("word", ["sync", "thread", "asyncio", "wsgi", "asgi", "prefork:ThreadWorker"])
def test_a_setting_names_a_class(word: str) -> None:
    """The setting `worker_class` takes each short name, and MODULE:NAME."""
    code = f"""
import prefork
class Server(prefork.PreforkTCPServer):
    worker_class = {word!r}
    request_timeout = -1
with Server(("127.0.0.1", 0), prefork.BaseRequestHandler) as server:
    try: server.serve_forever()
    except prefork.OptionError as error: print(error)
"""
    assert python(code).startswith("request_timeout: must be")


def test_names_of_testing() -> None:
    """`prefork.testing` has the pool for every runner, and for pytest its fixture and hook."""
    code = "from prefork.testing import Pool, pool; from prefork import testing; print(testing.pool is pool)"
    assert python(code) == "True"
    imported = python("import pytest; from prefork.testing import *; print(*dir())").split()
    assert {"Pool", "pool", "prefork_pool", "pytest_runtest_makereport"} <= set(imported)


def test_the_fixture(tmp_path: Path) -> None:
    """`pytest_plugins` brings the fixture."""
    (tmp_path / "conftest.py").write_text('pytest_plugins = ["prefork.testing"]\n')
    (tmp_path / "test_it.py").write_text("def test_it(prefork_pool): assert callable(prefork_pool)\n")
    words = [sys.executable, "-I", "-m", "pytest", "-q", "-p", "no:cacheprovider", "-W", "ignore", str(tmp_path)]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, timeout=30, check=False)
    assert done.returncode == 0, done.stdout


def test_the_command() -> None:
    """The command is installed under its name, and as a module."""
    (command,) = importlib.metadata.entry_points(group="console_scripts", name="prefork")
    assert callable(command.load())
    done = subprocess.run([sys.executable, "-I", "-m", "prefork", "--version"], capture_output=True, check=False)
    assert done.stdout.split() == [b"prefork", prefork.__version__.encode()]


def test_heavy_modules_are_not_imported() -> None:
    """`import prefork` leaves alone what only some names stand on, and no such name is made before it is asked for."""
    heavy = [
        "argparse",
        "asyncio",
        "email",
        "http",
        "multiprocessing",
        "psutil",
        "ssl",
        "uvicorn",
        "httptools",
        "h11",
        "pytest",
    ]
    rooms = [f"prefork.workers.{room}" for room in ("asgi", "eventloop", "wsgi", "handlers.threaded")]
    rooms += ["prefork.servers.http", "prefork.command", "prefork.testing"]
    code = f"import sys, prefork, prefork.workers; print(sorted({set(heavy + rooms)} & sys.modules.keys()))"
    assert python(code) == "[]"


PROGRAM = """
import prefork
from prefork import OptionError, PreforkUnixStreamServer, Reason, RequestTimeout, WorkerExit, serve

class Counting(prefork.SyncWorker):
    def setup(self):
        super().setup()
        self.server.number = f"{self.slot} {self.generation}"

    def teardown(self):
        note("left " + self.server.number)
        super().teardown()

class Answers(prefork.StreamRequestHandler):
    def handle(self):
        identity, order = self.rfile.readline().decode().split()
        worker = self.server.worker
        assert isinstance(worker, prefork.Worker) and worker.options.workers == 1 and not worker.draining
        if order == "hang":
            worker.extend_deadline(0.4)
            try:
                select.select([], [], [], 30)
            except RequestTimeout:
                order = "late"
        if order == "recycle":
            worker.recycle()
        self.wfile.write(f"{os.getpid()}:{identity}:{order}\\n".encode())

class Server(prefork.PreforkMixIn, socketserver.TCPServer):
    worker_class = Counting
    workers = 1
    request_timeout = 0.5
    graceful_timeout = 5.0

    def worker_exited(self, report: WorkerExit):
        if report.reason is Reason.RECYCLED:
            note(f"recycled {report.slot}")
            self.scale(1)

with Server(("127.0.0.1", 0), Answers) as first, PreforkUnixStreamServer("second", Answers) as second:
    try:
        first.scale(0)
    except OptionError:
        note("refused 0")
    serve(first, second)
note(f"active {first.active_children}")
"""


def test_a_program_of_the_first_release(start: Start, notes: Notes) -> None:
    """It runs unchanged: servers, settings, hooks, its own class of workers, deadlines, recycling, reports of exits."""
    program = launch(start, PROGRAM).ready()
    (worker,) = program.wait_ready(1)
    assert ask(program.address, "hang").result == "late"
    assert ask(program.address, "recycle").pid == worker
    (successor,) = program.wait_ready(1, without=[worker])
    assert ask(program.address, "plain").pid == successor
    program.finish(check_log=False)
    assert notes("refused") == ["0"] and notes("active") == ["set()"]
    assert len(notes("recycled")) == 1 and len(notes("left")) == 2

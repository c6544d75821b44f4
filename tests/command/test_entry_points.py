"""Worker classes of other distributions, found by the name under which these register them."""

import importlib.metadata
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import prefork
import prefork.servers.worker_class as worker_class
from prefork import OptionError
from support import ask, patterns
from support.scripts import Start, launch, path_of_modules

pytestmark = pytest.mark.timeout(60)

PROJECT = """
[build-system]
requires = ["hatchling"]
build-backend = "hatchling.build"

[project]
name = "prefork-shouting"
version = "1.0"

[project.entry-points."prefork.workers"]
shouting = "shouting.worker:ShoutingWorker"
absent = "shouting.absent:Worker"
broken = "shouting.broken:Worker"
raising = "shouting.raising:Worker"
torn = "shouting.torn:Worker"
unnamed = "shouting.worker:NoSuchName"
handler = "shouting.worker:Handler"
function = "shouting.worker:make"
sync = "shouting.worker:ShoutingWorker"

[tool.hatch.build.targets.wheel]
packages = ["shouting"]
"""

FILES = {
    "pyproject.toml": PROJECT,
    "shouting/__init__.py": "",
    "shouting/worker.py": """
import socketserver
import prefork

class ShoutingWorker(prefork.SyncWorker):
    def setup(self):
        self.server.shout = f"by {type(self).__name__} in slot {self.slot}"

class Handler(socketserver.BaseRequestHandler):
    pass

def make():
    return ShoutingWorker
""",
    "shouting/broken.py": "import no_such_module_of_anybody\n",
    "shouting/raising.py": "raise ValueError('no\\nluck')\n",
    "shouting/torn.py": "class Worker(:\n",
}

APP = """
from kit import *

class Shouted(Handler):
    def answer(self, order):
        return getattr(self.server, "shout", "nobody")

class Named(prefork.PreforkTCPServer):
    workers = 1
    worker_class = "shouting"
    RequestHandlerClass = Shouted

    def __init__(self, address, handler=Shouted):
        super().__init__(address, handler)
"""


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder into which a distribution with entry points was installed, as pip does it."""
    source, target = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("target")
    for name, text in FILES.items():
        path = source / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    options = ["--no-deps", "--no-build-isolation", "--no-index", "--quiet", "--disable-pip-version-check"]
    done = subprocess.run(
        [sys.executable, "-m", "pip", "install", *options, "--target", target, source],
        capture_output=True,
        text=True,
        timeout=50,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return target


@pytest.fixture
def here(installed: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The distribution, seen by the test's own process."""
    monkeypatch.syspath_prepend(installed)
    yield
    for name in [name for name in sys.modules if name.partition(".")[0] == "shouting"]:
        del sys.modules[name]


def environment(installed: Path) -> dict[str, str]:
    return {"PYTHONPATH": os.pathsep.join([path_of_modules()["PYTHONPATH"], str(installed)])}


def test_the_command_finds_it(start: Start, installed: Path) -> None:
    """`--worker-class NAME` takes the class that another distribution registered under that name."""
    arguments = ["app:Shouted", "-b", "tcp://127.0.0.1:0", "-w", 1, "--worker-class", "shouting"]
    program = start("prefork", *arguments, files={"app.py": APP}, env=environment(installed)).ready()
    assert ask(program.address).result == "by ShoutingWorker in slot 0"
    program.finish()


def test_a_server_finds_it(start: Start, installed: Path) -> None:
    """`worker_class = "NAME"` of a server does, by the command and in a program of one's own."""
    program = start("prefork", "app:make", files={"app.py": APP + MAKE}, env=environment(installed)).ready()
    assert ask(program.address).result == "by ShoutingWorker in slot 0"
    program.finish()
    body = APP + MAKE + "\nwith make() as server:\n    server.serve_forever()\n"
    program = launch(start, body, env=environment(installed)).ready()
    assert ask(program.address).result == "by ShoutingWorker in slot 0"
    program.finish()


MAKE = """
def make():
    return Named(("127.0.0.1", 0))
"""


def test_it_is_found_in_a_program(here: None) -> None:
    """The name is resolved to the class itself; a name of our own is not to be had by anybody else."""
    found = worker_class.resolve("shouting")
    assert found.__module__ == "shouting.worker" and issubclass(found, prefork.SyncWorker)
    assert worker_class.resolve("sync") is prefork.SyncWorker
    assert "prefork-shouting" in {one.name for one in importlib.metadata.distributions()}


WRONG = {
    "no-such-name": r"there is no 'no-such-name'; use sync, .*MODULE:NAME, or a name .* entry points prefork\.workers$",
    "absent": r"'absent' cannot be imported: No module named 'shouting\.absent'",
    "broken": r"'broken' cannot be imported: No module named 'no_such_module_of_anybody'",
    "raising": r"'raising' cannot be imported: ValueError: no luck$",
    "torn": r"'torn' cannot be imported: SyntaxError: invalid syntax \(torn\.py, line 1\)$",
    "unnamed": r"'unnamed' cannot be imported: module 'shouting\.worker' has no attribute 'NoSuchName'",
    "handler": r"'handler' is not a subclass of prefork\.Worker",
    "function": r"'function' is not a subclass of prefork\.Worker",
}


@pytest.mark.parametrize("name", WRONG)
def test_what_cannot_be_used(here: None, name: str) -> None:
    """A name that nobody registered, or that stands for no worker class, is refused with what is wrong."""
    with pytest.raises(OptionError, match=r"^worker_class: " + WRONG[name]):
        worker_class.resolve(name)


@pytest.mark.parametrize("name", ["no-such-name", "absent", "raising", "handler"])
def test_the_command_says_what_is_wrong(installed: Path, tmp_path: Path, name: str) -> None:
    """The command ends with 2 and one clear line, whether the flag or the server says the name."""
    (tmp_path / "app.py").write_text(APP.replace('"shouting"', repr(name)))
    for arguments in (["app:Shouted", "--worker-class", name], ["app:Named"]):
        done = subprocess.run(
            [sys.executable, "-m", "prefork", *arguments, "-b", "tcp://127.0.0.1:0"],
            cwd=tmp_path,
            env={**os.environ, **environment(installed)},
            capture_output=True,
            text=True,
            timeout=20,
            check=False,
        )
        lines = [line for line in done.stderr.splitlines() if not patterns.LOG_LINE.match(line)]
        assert done.returncode == 2 and len(lines) == 1, done.stderr
        assert lines[0].startswith("prefork: error: worker_class: ")

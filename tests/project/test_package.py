"""What is installed: its files, its names, and what an import of it costs. Run against the wheel (`make test`)."""

import importlib.metadata
import importlib.util
import os
import subprocess
import sys
import sysconfig
import tomllib
from pathlib import Path

import pytest

import prefork
import prefork.workers

ROOT = Path(__file__).resolve().parents[2]
HOME = Path(prefork.__file__).parent
# Set by whoever tests the checkout on purpose (an editable install); everything else here must hold there too.
CHECKOUT = os.environ.get("PREFORK_TEST_CHECKOUT") == "1"


def isolated(code: str) -> str:
    """What the code prints in an interpreter that sees only what is installed."""
    done = subprocess.run(
        [sys.executable, "-I", "-W", "error", "-c", code], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout.strip()


def test_the_wheel_is_under_test() -> None:
    """The prefork that the tests import is the installed one, not the folder beside them."""
    if CHECKOUT:
        assert HOME == ROOT / "prefork"
    else:
        assert HOME.parent == Path(sysconfig.get_path("purelib"))
        assert str(ROOT) not in sys.path


def test_version() -> None:
    """The module, its metadata and pyproject.toml say one version."""
    stated = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert prefork.__version__ == stated == importlib.metadata.version("prefork")


def test_every_file_is_shipped() -> None:
    """The installed package is the source, file by file, with the worker's side and the typing marker as real files."""
    folders = {"": ROOT / "prefork", "workers/": ROOT / "prefork" / "workers"}
    source = {
        prefix + path.name: path.read_bytes()
        for prefix, folder in folders.items()
        for path in folder.iterdir()
        if path.suffix == ".py" or path.name == "py.typed"
    }
    shipped = {
        path.relative_to(HOME).as_posix(): path.read_bytes()
        for path in [*HOME.iterdir(), *(HOME / "workers").iterdir()]
        if path.is_file() and path.suffix != ".pyc"
    }
    assert {"py.typed", "__init__.py", "workers/__init__.py"} <= shipped.keys()
    assert shipped == source
    assert CHECKOUT or not (HOME / "workers").is_symlink()


def test_nothing_else_is_shipped() -> None:
    """The wheel claims no import name but prefork."""
    files = importlib.metadata.files("prefork") or []
    tops = {file.parts[0] for file in files if not file.parts[0].endswith(".dist-info") and ".." not in file.parts}
    assert CHECKOUT or tops == {"prefork"}


def test_workers_is_a_link() -> None:
    """In the repository the package sees the folder `workers` through a link, so that there is one copy of it."""
    if (ROOT / "workers").exists():  # it does not in an unpacked sdist, where prefork/workers is the folder
        assert os.readlink(ROOT / "prefork" / "workers") == os.path.join("..", "workers")


def test_workers_is_not_a_top_level_name() -> None:
    """`import workers` finds nothing of prefork, and its file refuses any other name than prefork.workers."""
    assert prefork.workers.__name__ == "prefork.workers"
    absent = "ImportError" if CHECKOUT else "ModuleNotFoundError"
    assert isolated(f"try: import workers\nexcept {absent}: print('none')") == "none"
    spec = importlib.util.spec_from_file_location("workers", prefork.workers.__file__)
    assert spec and spec.loader
    with pytest.raises(ImportError, match=r"prefork\.workers"):
        spec.loader.exec_module(importlib.util.module_from_spec(spec))


def test_import_is_light() -> None:
    """Importing prefork imports nothing that only some of its users need."""
    heavy = {"argparse", "asyncio", "multiprocessing", "psutil"}
    assert isolated(f"import sys, prefork; print(sorted({heavy} & sys.modules.keys()))") == "[]"


def test_import_changes_nothing() -> None:
    """Importing prefork starts no thread, sets no signal handler, keeps no descriptor and configures no logging."""
    program = """
import logging, os, signal, socketserver, threading
def state():
    handlers = {number: signal.getsignal(number) for number in signal.valid_signals()}
    wakeup = signal.set_wakeup_fd(-1)
    files, log = sorted(os.listdir("/dev/fd")), (logging.root.handlers[:], logging.root.level)
    return threading.enumerate(), handlers, wakeup, files, log
before = state()
import prefork
print(before == state())
"""
    assert isolated(program) == "True"


def test_the_command_is_installed() -> None:
    """The command `prefork` stands beside the interpreter, and explains itself."""
    command = Path(sysconfig.get_path("scripts"), "prefork")
    done = subprocess.run([command, "--help"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("usage: prefork")

"""Holds the house to its rules by reading its source: floors, purity, the one place that forks and kills, and names."""

import ast
import graphlib
import os
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

KINDS = ("sync", "threaded", "aio", "wsgi", "asgi")  # the shipped classes of workers

# A module imports only from floors below its own.
FLOORS = (
    {"errors", "cpus", "addresses", "imports", "originals", "exits", "options", "states", "reports"},
    {"signals", "listeners", "processes", "scoreboard", "lifeline", "writer", "logs"},
    {"pool", "policy", "stop_sequence"},
    {"workers", "workers.accept", "workers.chain", "workers.child", "workers.request", "workers.base"}
    | {"workers.disconnect"}
    | {"workers.share", "workers.sync", "workers.filter", "workers.threaded"}
    | {"workers.gate", "workers.loop", "workers.coroutines", "workers.aio"}
    | {"workers.protocols", "workers.site", "workers.asgi", "workers.wsgi"}
    | {"workers.http", "workers.response", "workers.access", "workers.turns", "workers.polling"},
    {"crew", "master"},
    {"service", "server", "http"},
    {"scout", "program", "cli", "__main__", "testbed", "testing"},
)
FLOOR = {module: number for number, modules in enumerate(FLOORS) for module in modules}
TOP = len(FLOORS) - 1
FLOOR["__init__"] = TOP  # the face: sees every floor under the top, and nobody in the house imports it
# What may be imported on the same floor, beside the top floor's modules among themselves.
NEXT_DOOR = {
    *(("workers.base", f"workers.{part}") for part in ("accept", "chain", "child", "request")),
    *((f"workers.{kind}", f"workers.{of}") for kind in KINDS for of in ("accept", "chain", "child", "request", "base")),
    ("workers.filter", "workers.accept"),
    ("workers.threaded", "workers.filter"),
    *(("workers.aio", f"workers.{part}") for part in ("coroutines", "disconnect")),
    *((f"workers.{kind}", f"workers.{of}") for kind in ("aio", "asgi") for of in ("gate", "loop")),
    ("workers.asgi", "workers.site"),
    *(("workers.site", f"workers.{part}") for part in ("protocols", "request")),
    *(("workers.gate", f"workers.{part}") for part in ("accept", "share")),
    *(("workers.loop", f"workers.{part}") for part in ("accept", "request", "base", "share")),
    *(("workers.wsgi", f"workers.{part}") for part in ("http", "response", "access", "polling")),
    ("workers.response", "workers.http"),
    *(("workers.access", f"workers.{part}") for part in ("http", "response")),
    *(("workers.polling", f"workers.{part}") for part in ("accept", "child", "base", "share")),
    *(("workers.polling", f"workers.{part}") for part in ("http", "response", "turns")),
    *(("workers.turns", f"workers.{part}") for part in ("child", "http")),
    *(("options", part) for part in ("errors", "cpus")),
    ("processes", "writer"),
    *(("logs", part) for part in ("processes", "writer")),
    ("originals", "errors"),
    ("lifeline", "processes"),
    ("listeners", "processes"),
    ("signals", "processes"),
    ("pool", "policy"),
    ("master", "crew"),
    ("server", "service"),
    ("http", "server"),
}

PURE = FLOORS[2]
IMPURE_MODULES = {
    *("os", "time", "socket", "select", "signal", "threading", "subprocess", "psutil"),
    *("asyncio", "datetime", "io", "logging", "multiprocessing", "pathlib", "selectors", "sys"),
}
IMPURE_BUILTINS = {"open", "print", "input"}

# The only fork, wait and kill are in `processes`.
KERNEL = re.compile(r"os\.(fork|wait|kill|pidfd_|posix_spawn|spawn)\w*|signal\.pidfd_\w+|psutil\.wait_procs")

AVOIDED = {"arbiter", "manage", "manager", "watcher", "monitor", "mold", "zygote", "murder", "nuke", "util"}


def sources(folder: str) -> dict[str, ast.Module]:
    """Every module under a folder, parsed, by its dotted name; links are followed, for prefork/workers is one."""
    found = {}
    for path, folders, files in os.walk(ROOT / folder, followlinks=True):
        folders[:] = [name for name in folders if name != "__pycache__" and not name.startswith(".")]
        for file in files:
            if file.endswith(".py"):
                where = Path(path, file)
                parts = list(where.relative_to(ROOT / folder).with_suffix("").parts)
                if parts[-1] == "__init__" and len(parts) > 1:
                    parts.pop()
                found[".".join(parts)] = ast.parse(where.read_bytes(), str(where))
    return found


def imports(tree: ast.AST) -> Iterator[tuple[int, str, str]]:
    """(line, module, name) of every import in a module; `import x` has no name, a relative one has its dots."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name, ""
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                yield node.lineno, "." * node.level + (node.module or ""), alias.name


def references(tree: ast.AST) -> Iterator[tuple[ast.expr | ast.ImportFrom, str]]:
    """Every use of something imported, by its full dotted name: `import os as o; o.kill` is os.kill."""
    known = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                bound = alias.name if alias.asname else alias.name.partition(".")[0]
                known[alias.asname or bound] = bound
        elif isinstance(node, ast.ImportFrom) and not node.level:
            for alias in node.names:
                known[alias.asname or alias.name] = f"{node.module}.{alias.name}"
                yield node, f"{node.module}.{alias.name}"
    for node in ast.walk(tree):
        parts: list[str] = []
        inner: ast.AST = node
        while isinstance(inner, ast.Attribute):
            parts.insert(0, inner.attr)
            inner = inner.value
        if isinstance(node, ast.Attribute | ast.Name) and isinstance(inner, ast.Name) and inner.id in known:
            yield node, ".".join([known[inner.id], *parts])


def neighbours(tree: ast.AST) -> set[str]:
    """The modules of the house that a module imports."""
    found = set()
    for _, module, name in imports(tree):
        whole = f"{module}.{name}".removeprefix("prefork.")
        if module.partition(".")[0] == "prefork" and whole in FLOOR:
            found.add(whole)
        elif module.startswith("prefork."):
            found.add(module.removeprefix("prefork."))
    return found


def wrong_imports(module: str, tree: ast.AST) -> Iterator[str]:
    """What a module imports that its floor does not allow."""
    for line, imported, name in imports(tree):
        if imported == "prefork":
            yield f"{module}:{line}: imports {name or 'it'} from the face; import from prefork.{name or 'x'} itself"
        elif imported.startswith(".") or imported.partition(".")[0] == "workers":
            yield f"{module}:{line}: imports {imported}; in the house every import is absolute, from prefork"
    floor = FLOOR.get(module, -1)
    for other in sorted(neighbours(tree)):
        same_room = (module, other) in NEXT_DOOR or (floor == TOP and module != "__init__")
        if other not in FLOOR:
            yield f"{module}: imports prefork.{other}, which has no floor"
        elif FLOOR[other] > floor or (FLOOR[other] == floor and not same_room):
            yield f"{module} (floor {floor}): imports prefork.{other} (floor {FLOOR[other]})"


def impurities(module: str, tree: ast.AST) -> Iterator[str]:
    """What a pure module does that needs the world: the system, a clock of its own, dice of its own."""
    for line, imported, _ in imports(tree):
        if imported.partition(".")[0] in IMPURE_MODULES:
            yield f"{module}:{line}: imports {imported}"
    for node, name in references(tree):
        if name.startswith("random.") and name != "random.Random":
            yield f"{module}:{node.lineno}: {name}; the dice are an injected random.Random"
    dice = {id(node) for node, name in references(tree) if name == "random.Random"}
    for call in [node for node in ast.walk(tree) if isinstance(node, ast.Call)]:
        if id(call.func) in dice:
            yield f"{module}:{call.lineno}: makes its own random.Random; it is injected"
        elif isinstance(call.func, ast.Name) and call.func.id in IMPURE_BUILTINS:
            yield f"{module}:{call.lineno}: {call.func.id}()"


def kernel_calls(module: str, tree: ast.AST) -> Iterator[str]:
    """Where a module forks, waits or kills."""
    for node, name in references(tree):
        if KERNEL.fullmatch(name):
            yield f"{module}:{node.lineno}: {name}; only prefork.kernel.processes does that"


def definitions(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Every identifier that a module makes up (not those of others that it only uses)."""
    for node in ast.walk(tree):
        match node:
            case ast.FunctionDef() | ast.AsyncFunctionDef() | ast.ClassDef():
                yield node.lineno, node.name
            case ast.arg():
                yield node.lineno, node.arg
            case ast.Name(ctx=ast.Store()):
                yield node.lineno, node.id
            case ast.Attribute(ctx=ast.Store()):
                yield node.lineno, node.attr
            case ast.alias(asname=str(name)):
                yield node.lineno, name
            case ast.ExceptHandler(name=str(name)):
                yield node.lineno, name


def avoided_names(module: str, tree: ast.AST) -> Iterator[str]:
    """The identifiers with a word in them that the project does not use."""
    for line, identifier in [(1, module), *definitions(tree)]:
        words = [word.lower() for word in re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+", identifier)]
        for word in words:
            if AVOIDED & {word, word.removesuffix("s")}:
                yield f"{module}:{line}: {identifier}"


def silent_tests(module: str, tree: ast.AST) -> Iterator[str]:
    """The tests that do not say what must be true."""
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    for node in functions:
        if node.name.startswith("test") and not (ast.get_docstring(node) or "").strip():
            yield f"{module}:{node.lineno}: {node.name} has no docstring"


def sleeps(module: str, tree: ast.AST) -> Iterator[str]:
    """Where a test, or a program it runs, sleeps instead of waiting for a state with a deadline."""
    for node, name in references(tree):
        if name == "time.sleep":
            yield f"{module}:{node.lineno}: {name}"


def none_of(problems: Iterable[str]) -> None:
    """Fail with every problem on a line of its own."""
    found = sorted(problems)
    assert not found, "\n" + "\n".join(found)


PACKAGE = sources("prefork")
TESTS = sources("tests")


def test_every_module_has_a_floor() -> None:
    """Each module of the package stands on a floor, and the child's side is among them."""
    assert set(PACKAGE) - set(FLOOR) == set()
    assert {"__init__", "workers"} <= set(PACKAGE)


def test_imports_go_down() -> None:
    """A module imports only from floors below it, absolutely, and never from the package's face."""
    none_of(problem for module, tree in PACKAGE.items() for problem in wrong_imports(module, tree))


def test_no_circle() -> None:
    """No module imports itself, by whatever way round."""
    graphlib.TopologicalSorter({module: neighbours(tree) for module, tree in PACKAGE.items()}).prepare()


def test_deciding_is_pure() -> None:
    """What decides has no system, no input or output, no clock and no dice of its own."""
    assert PURE & set(PACKAGE)
    none_of(problem for module in PURE & set(PACKAGE) for problem in impurities(module, PACKAGE[module]))


def test_one_module_forks_waits_and_kills() -> None:
    """Fork, wait and kill are in one module, so that there is one place to get them right, and it does have them."""
    others = PACKAGE.keys() - {"processes"}
    none_of(problem for module in others for problem in kernel_calls(module, PACKAGE[module]))
    assert list(kernel_calls("processes", PACKAGE["processes"]))


@pytest.mark.parametrize("folder", ["prefork", "tests", "examples", "benchmarks"])
def test_names_are_the_fields_own(folder: str) -> None:
    """No identifier has a word in it that the project does not use."""
    none_of(problem for module, tree in sources(folder).items() for problem in avoided_names(module, tree))


def test_tests_speak() -> None:
    """Every test says in a docstring what must be true."""
    none_of(problem for module, tree in TESTS.items() for problem in silent_tests(module, tree))


def test_tests_do_not_sleep() -> None:
    """No test sleeps. A program under test may: a slow handler is what some tests are about."""
    none_of(p for module, tree in TESTS.items() if not module.startswith("programs") for p in sleeps(module, tree))


@pytest.mark.parametrize(
    ("rule", "module", "source", "problems"),
    [
        (wrong_imports, "pool", "from prefork.settings.settings import Options\nimport prefork.rules.states", 0),
        (wrong_imports, "pool", "from prefork.master.loop import Master", 1),
        (wrong_imports, "pool", "def late():\n    import prefork.servers.mixin", 1),
        (wrong_imports, "signals", "from prefork.kernel.listener import Listener", 1),
        (wrong_imports, "signals", "from prefork import errors", 1),
        (wrong_imports, "signals", "from prefork import pool", 2),
        (wrong_imports, "signals", "import prefork", 1),
        (wrong_imports, "signals", "from . import errors\nfrom .errors import OptionError", 2),
        (wrong_imports, "signals", "import prefork.secrets", 1),
        (wrong_imports, "workers.sync", "from prefork.workers.base import Worker", 0),
        (wrong_imports, "workers.base", "from prefork.workers import sync", 1),
        (wrong_imports, "workers.base", "from workers import sync", 1),
        (wrong_imports, "cli", "from prefork.command.program import load", 0),
        (wrong_imports, "__init__", "from prefork.servers.mixin import PreforkMixIn", 0),
        (wrong_imports, "__init__", "from prefork.command.cli import main", 1),
        (impurities, "pool", "import random\ndef roll(dice: random.Random) -> float: return dice.random()", 0),
        (impurities, "pool", "import random\ndice = random.Random()", 1),
        (impurities, "pool", "from random import random", 1),
        (impurities, "pool", "import os.path\nfrom time import monotonic", 2),
        (impurities, "pool", "print('x')", 1),
        (kernel_calls, "master", "import os as o\nkill = o.killpg", 1),
        (kernel_calls, "master", "from os import waitpid", 1),
        (kernel_calls, "master", "import signal\nsignal.pidfd_send_signal(3, 9)", 1),
        (kernel_calls, "master", "import os\nos.close(3)\nos.WNOHANG", 0),
        (avoided_names, "master", "from contextlib import AbstractContextManager, contextmanager", 0),
        (avoided_names, "master", "class WorkerManager: ...\ndef manage_workers(): ...\nself.watchers = 1", 3),
        (avoided_names, "utils", "", 1),
        (silent_tests, "test_x", "def test_x(): ...\nclass TestX:\n    async def test_y(self): ...", 2),
        (silent_tests, "test_x", "def test_x():\n    '''It is so.'''", 0),
        (sleeps, "test_x", "import time\ntime.sleep(1)", 1),
        (sleeps, "test_x", "from time import sleep as rest", 1),
    ],
)
def test_rules_have_teeth(
    rule: Callable[[str, ast.AST], Iterator[str]], module: str, source: str, problems: int
) -> None:
    """Each rule finds what it forbids, and lets pass what it does not."""
    assert len(list(rule(module, ast.parse(source)))) == problems


def test_circles_are_found() -> None:
    """Two modules of one floor that import each other are a circle."""
    circle = {"cli": "from prefork.command.program import load", "program": "import prefork.command.cli"}
    with pytest.raises(graphlib.CycleError):
        graphlib.TopologicalSorter({module: neighbours(ast.parse(text)) for module, text in circle.items()}).prepare()

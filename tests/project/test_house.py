"""Holds the house to its rules by reading its source: order of packages, purity, the one place that forks, names."""

import ast
import functools
import graphlib
import itertools
import os
import re
from collections.abc import Callable, Container, Iterator, Mapping
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

Problems = Iterator[tuple[int, str]]  # the line, and what is wrong in it with the mend
Rule = Callable[[str, ast.AST], Problems]

# The one order of the packages, the lowest first. A module imports from packages before its own, and from its own, in
# which no module may import itself by whatever way round.
ORDER = (
    "errors",
    "kernel",  # touches the system, one facility a module
    "settings",
    "rules",  # decides, without the system and without a clock
    "link",  # what master and worker share
    "workers.intake",
    "workers",  # what is in no room: the base of all classes, and the life of a child
    "workers.handlers",
    "workers.eventloop",
    "workers.asgi",
    "workers.wsgi",
    "master",
    "operations",  # how a running pool is seen and steered
    "servers",
    "command",
    "testing",
    "__init__",
    "__main__",
)
# These do not see each other, although the order would let them.
STRANGERS = (("master", "workers"), ("workers.wsgi", "workers.asgi"), ("workers.wsgi", "workers.eventloop"))

IMPURE_MODULES = {
    *("os", "time", "socket", "select", "signal", "threading", "subprocess", "psutil"),
    *("asyncio", "datetime", "io", "logging", "multiprocessing", "pathlib", "selectors", "sys"),
}
IMPURE_BUILTINS = {"open", "print", "input"}

FORKS = "kernel.processes"  # the only fork, wait and kill are there
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


def file_of(folder: str, module: str) -> str:
    """The tracked file of a module, from the root: prefork/workers is a link to workers."""
    path = ROOT / folder / module.replace(".", "/")
    return str((path if path.is_dir() else path.with_suffix(".py")).resolve().relative_to(ROOT))


def package_of(module: str) -> str:
    """The package in which a module is: `workers.wsgi.parser` is in `workers.wsgi`, `workers.worker` in `workers`."""
    parts = module.split(".")
    names = [".".join(parts[:length]) for length in range(len(parts), 0, -1)]
    return next((name for name in names if name in ORDER), "")


def neighbours(tree: ast.AST, package: Container[str]) -> dict[str, int]:
    """The modules of the house that a module imports, each with the line of its first import."""
    found: dict[str, int] = {}
    for line, module, name in imports(tree):
        whole = f"{module}.{name}".removeprefix("prefork.")
        if module.partition(".")[0] == "prefork" and whole in package:
            found.setdefault(whole, line)
        elif module.startswith("prefork."):
            found.setdefault(module.removeprefix("prefork."), line)
    return found


def wrong_imports(module: str, tree: ast.AST) -> Problems:
    """Imports that the order of the packages does not allow."""
    for line, imported, name in imports(tree):
        if imported == "prefork" and (name not in PACKAGE or name == ""):
            yield line, f"imports {name or 'prefork'} from the package's face; import the module that defines it"
        elif imported.startswith(".") or imported.partition(".")[0] == "workers":
            yield line, f"imports {imported}; write the whole name, from `prefork.` on"
    own = package_of(module)
    for other, line in neighbours(tree, PACKAGE).items():
        theirs = package_of(other)
        if not theirs:
            yield line, f"imports prefork.{other}, which is in no package; add its package to ORDER in {__name__}"
        elif ORDER.index(theirs) > ORDER.index(own):
            mend = f"move what {own} needs into {own} or a package before it, or pass it as an argument"
            yield line, f"imports prefork.{other}, but {own} comes before {theirs} in the order of packages; {mend}"
        elif any(own.startswith(left) and theirs.startswith(right) for left, right in STRANGERS):
            mend = "move what both need into a package before them"
            yield line, f"imports prefork.{other}, but {own} and {theirs} must not import each other; {mend}"


def impurities(module: str, tree: ast.AST) -> Problems:
    """What a pure module does that needs the world: the system, a clock of its own, dice of its own."""
    for line, imported, name in imports(tree):
        if imported.partition(".")[0] in IMPURE_MODULES and (imported, name) != ("signal", "Signals"):  # names only
            yield line, f"imports {imported}; what decides gets times and facts as arguments"
    for node, name in references(tree):
        if name.startswith("random.") and name != "random.Random":
            yield node.lineno, f"{name}; take a random.Random as an argument"
    dice = {id(node) for node, name in references(tree) if name == "random.Random"}
    for call in [node for node in ast.walk(tree) if isinstance(node, ast.Call)]:
        if id(call.func) in dice:
            yield call.lineno, "makes its own random.Random; take it as an argument"
        elif isinstance(call.func, ast.Name) and call.func.id in IMPURE_BUILTINS:
            yield call.lineno, f"calls {call.func.id}(); what decides has no input and output"


def kernel_calls(module: str, tree: ast.AST) -> Problems:
    """Where a module forks, waits or kills."""
    for node, name in references(tree):
        if KERNEL.fullmatch(name):
            yield node.lineno, f"{name}; only prefork.{FORKS} does that: add a function there"


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


def avoided_names(module: str, tree: ast.AST) -> Problems:
    """The identifiers with a word in them that the project does not use."""
    for line, identifier in [(1, module), *definitions(tree)]:
        words = [word.lower() for word in re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+", identifier)]
        for word in words:
            if AVOIDED & {word, word.removesuffix("s")}:
                yield line, f"{identifier}: the project does not use the word {word}"


def silent_tests(module: str, tree: ast.AST) -> Problems:
    """The tests that do not say what must be true."""
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    for node in functions:
        if node.name.startswith("test") and not (ast.get_docstring(node) or "").strip():
            yield node.lineno, f"{node.name} has no docstring; say in a sentence what must be true"


def sleeps(module: str, tree: ast.AST) -> Problems:
    """Where a test, or a program it runs, sleeps instead of waiting for a state with a deadline."""
    for node, name in references(tree):
        if name == "time.sleep":
            yield node.lineno, f"{name}; wait for a state, with a deadline: support.waiting.until()"


def long_modules(module: str, tree: ast.AST, most: int = 500) -> Problems:
    """The module, if it has more lines than `most`."""
    lines = max(getattr(node, "end_lineno", 0) for node in ast.walk(tree))
    if lines > most:
        yield lines, f"{lines} lines; a module of this folder has at most {most}: divide it by subject"


def none_of(folder: str, rule: Rule, modules: Mapping[str, ast.AST]) -> None:
    """Fail with every problem that a rule finds, each on a line with its file and line."""
    problems = [
        (file_of(folder, module), *problem) for module, tree in modules.items() for problem in rule(module, tree)
    ]
    if problems:
        pytest.fail("\n".join(f"{file}:{line}: {text}" for file, line, text in sorted(problems)), pytrace=False)


PACKAGE = sources("prefork")
TESTS = sources("tests")


def test_every_module_has_a_room() -> None:
    """Each module is in a package of the order, and each package of the order has one."""
    assert {package_of(module) for module in PACKAGE} == set(ORDER)


def test_imports_go_down() -> None:
    """A module imports only from packages before its own, absolutely, and never from the package's face."""
    none_of("prefork", wrong_imports, PACKAGE)


def test_no_circle() -> None:
    """No module imports itself, by whatever way round."""
    lines = {module: neighbours(tree, PACKAGE) for module, tree in PACKAGE.items()}
    try:
        graphlib.TopologicalSorter(lines).prepare()
    except graphlib.CycleError as error:
        steps = itertools.pairwise(reversed(error.args[1]))
        told = [f"{file_of('prefork', who)}:{lines[who][whom]}: imports prefork.{whom}" for who, whom in steps]
        pytest.fail("\n".join([*told, "Move what they share into a module that both import."]), pytrace=False)


def test_deciding_is_pure() -> None:
    """What decides has no system, no input or output, no clock and no dice of its own."""
    deciding = {module: tree for module, tree in PACKAGE.items() if package_of(module) == "rules"}
    none_of("prefork", impurities, deciding)
    assert "rules.pool" in deciding


def test_one_module_forks_waits_and_kills() -> None:
    """Fork, wait and kill are in one module, so that there is one place to get them right, and it does have them."""
    none_of("prefork", kernel_calls, {module: tree for module, tree in PACKAGE.items() if module != FORKS})
    assert list(kernel_calls(FORKS, PACKAGE[FORKS]))


@pytest.mark.parametrize("folder", ["prefork", "tests", "examples", "benchmarks"])
def test_names_are_the_fields_own(folder: str) -> None:
    """No identifier has a word in it that the project does not use."""
    none_of(folder, avoided_names, sources(folder))


def test_tests_speak() -> None:
    """Every test says in a docstring what must be true."""
    none_of("tests", silent_tests, TESTS)


def test_tests_do_not_sleep() -> None:
    """No test sleeps. A program under test may: a slow handler is what some tests are about."""
    none_of("tests", sleeps, {module: tree for module, tree in TESTS.items() if not module.startswith("programs")})


def test_support_is_not_of_prefork() -> None:
    """What the tests share imports nothing of prefork: a judge does not stand on what it judges."""
    support = {module: tree for module, tree in TESTS.items() if module.startswith("support")}
    own = [(module, line) for module, tree in support.items() for line, name, _ in imports(tree) if "prefork" in name]
    assert support and not own, own


def test_no_test_file_is_long() -> None:
    """No file of the tests is too long to find a test in it: its name says what it is about."""
    none_of("tests", long_modules, TESTS)


def test_no_module_is_long() -> None:
    """No module has over 400 lines, but the pool: its rules are one table of cases."""
    modules = {module: tree for module, tree in PACKAGE.items() if module != "rules.pool"}
    none_of("prefork", functools.partial(long_modules, most=400), modules)


@pytest.mark.parametrize(
    ("rule", "module", "source", "problems"),
    [
        (wrong_imports, "rules.pool", "from prefork.settings.settings import Options\nimport prefork.rules.states", 0),
        (wrong_imports, "rules.pool", "from prefork.master.loop import Master", 1),
        (wrong_imports, "rules.pool", "def late():\n    import prefork.servers.mixin", 1),
        (wrong_imports, "kernel.signal_inbox", "from prefork.kernel.listener import Listener", 0),
        (wrong_imports, "kernel.signal_inbox", "from prefork import errors", 0),
        (wrong_imports, "kernel.signal_inbox", "from prefork.rules import pool", 1),
        (wrong_imports, "kernel.signal_inbox", "import prefork", 1),
        (wrong_imports, "kernel.signal_inbox", "from prefork import serve", 1),
        (wrong_imports, "kernel.signal_inbox", "from . import errors\nfrom .errors import OptionError", 2),
        (wrong_imports, "kernel.signal_inbox", "import prefork.secrets", 1),
        (wrong_imports, "workers.handlers.sync", "from prefork.workers.worker import Worker", 0),
        (wrong_imports, "workers.worker", "from prefork.workers.handlers import sync", 1),
        (wrong_imports, "workers.worker", "from workers import sync", 1),
        (wrong_imports, "master.loop", "from prefork.workers.worker import Worker", 1),
        (wrong_imports, "master.loop", "from prefork.link.worker_context import WorkerContext", 0),
        (wrong_imports, "workers.wsgi.polling", "import prefork.workers.eventloop.loop_worker", 1),
        (wrong_imports, "command.cli", "from prefork.command.program import load", 0),
        (wrong_imports, "__init__", "from prefork.servers.mixin import PreforkMixIn", 0),
        (wrong_imports, "__init__", "from prefork.__main__ import main", 1),
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
        (long_modules, "test_x", "\n" * 499 + "x = 1", 0),
        (long_modules, "test_x", "\n" * 500 + "x = 1", 1),
        (sleeps, "test_x", "import time\ntime.sleep(1)", 1),
        (sleeps, "test_x", "from time import sleep as rest", 1),
    ],
)
def test_rules_have_teeth(rule: Rule, module: str, source: str, problems: int) -> None:
    """Each rule finds what it forbids, and lets pass what it does not."""
    assert len(list(rule(module, ast.parse(source)))) == problems


def test_a_problem_is_told_with_its_place() -> None:
    """The message begins with file and line, and ends with the mend."""
    source = "import os\n\nfrom prefork.master.loop import Master"
    with pytest.raises(pytest.fail.Exception) as failed:
        none_of("prefork", wrong_imports, {"workers.worker": ast.parse(source)})
    assert str(failed.value).startswith("workers/worker.py:3: imports prefork.master.loop, but workers comes before")
    assert str(failed.value).endswith("or pass it as an argument")


def test_circles_are_found() -> None:
    """Two modules of one package that import each other are a circle."""
    circle = {"a.x": "from prefork.a.y import load", "a.y": "import prefork.a.x"}
    graph = {module: neighbours(ast.parse(text), circle) for module, text in circle.items()}
    with pytest.raises(graphlib.CycleError):
        graphlib.TopologicalSorter(graph).prepare()

"""Every message that an operator may act on has a code, and every code has a page."""

import ast
import os
import re
import signal
import socket
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import pytest

from prefork.command.explain import folder
from support import ask, patterns
from support.commands import TCP, command
from support.scripts import Start, path_of_modules

ROOT = Path(__file__).resolve().parents[2]
PAGES = ROOT / "docs" / "messages"
CODE = re.compile(r"PF\d{4}")
AT_THE_END = re.compile(r"\[(PF\d{4})\]\n?$")
WARNINGS = {"warning", "error", "exception", "critical"}
REPORTS = {"protect", "protect_hook", "report", "say"}  # of the guard and of `log_stderr`: their texts are logged, too

# The situation is one, and the source tells of it at several places.
SEVERAL = {
    "PF0101": "the parser of options finds each error at a place of its own",
    "PF0103": "each form of an address has its own mend",
    "PF0104": "a server and an address differ in kind, family, or number",
    "PF0105": "each kind of program has its own mend",
    "PF0106": "each worker class checks handlers by itself",
    "PF0107": "two worker classes need packages",
    "PF0109": "a class is not named, not importable, or not a worker class",
    "PF0111": "a server is closed, deaf, forking, or missing",
    "PF0122": "an import raises ImportError, or anything else",
    "PF0123": "a name is not there, or none of the usual names is",
    "PF0124": "the named object, or what it returns, cannot be served",
    "PF0127": "found before an import, or after it",
    "PF0128": "a listener without a server, or a server without a listener",
    "PF0129": "each form of a name has its own mend",
    "PF0303": "another address, or fewer",
    "PF0402": "EACCES and EPERM",
    "PF0403": "the system has no such address, or no such host",
    "PF0407": "in the pool, and for handle_request()",
    "PF0410": "any step of the master",
    "PF0601": "the exception in the handler, and the line of the master",
    "PF0603": "two classes of workers have an event loop",
    "PF0802": "while the answer is made, and while it is sent",
}
# Texts that are made by the callers of these functions.
PASSED_ON = {"prefork/master/error_guard.py", "prefork/kernel/log_rotation.py"}


@dataclass(frozen=True)
class Text:
    """A string of the source that has a code."""

    path: str
    line: int
    code: str
    pieces: tuple[str, ...]  # what stands between its fields


def trees() -> Iterator[tuple[str, ast.Module]]:
    for room in ("prefork", "workers"):
        for path in sorted((ROOT / room).rglob("*.py")):
            where = path.relative_to(ROOT).as_posix()
            if not where.startswith("prefork/workers/"):
                yield where, ast.parse(path.read_text(encoding="utf-8"))


def texts() -> Iterator[Text]:
    """Each code that is a string, or stands at the end of one."""
    for path, tree in trees():
        inside = {id(part) for node in ast.walk(tree) if isinstance(node, ast.JoinedStr) for part in node.values}
        for node in ast.walk(tree):
            if isinstance(node, ast.JoinedStr):
                parts = [part.value if isinstance(part, ast.Constant) else "\0" for part in node.values]
                text = "".join(map(str, parts))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in inside:
                text = node.value
            else:
                continue
            match = AT_THE_END.search(text)
            if match or CODE.fullmatch(text):
                body = text[: match.start()] if match else ""
                pieces = tuple(piece.strip() for piece in re.split(r"\0|%[\d.]*[a-z]", body))
                yield Text(path, node.lineno, match[1] if match else text, pieces)


def pages() -> dict[str, str]:
    return {path.stem: path.read_text(encoding="utf-8") for path in sorted(PAGES.glob("PF*.md"))}


def test_every_code_has_a_page_and_every_page_a_place() -> None:
    """The codes of the source and the pages are the same, and a wheel has the pages."""
    assert {text.code for text in texts()} == set(pages())
    shipped = {page.name: page.read_text(encoding="utf-8") for page in folder().iterdir()}
    assert shipped == {path.name: path.read_text(encoding="utf-8") for path in PAGES.iterdir()}


def test_a_code_stands_for_one_situation() -> None:
    """No code stands at several places of the source, but those that are listed with the reason."""
    places = Counter(text.code for text in texts())
    assert {code for code, number in places.items() if number > 1} - set(SEVERAL) == set()
    assert set(SEVERAL) - {code for code, number in places.items() if number > 1} == set(), "the list is too long"


@pytest.mark.parametrize(("code", "text"), pages().items(), ids=pages())
def test_a_page_has_its_parts(code: str, text: str) -> None:
    """A page begins with its code and the message as it is seen; then it says what that means and what to do."""
    title, _, sample, *rest = text.splitlines()
    assert re.fullmatch(rf"# {code}: [A-Za-z].*[^.]", title)
    assert sample.startswith("    ") and set(CODE.findall(sample)) <= {code}
    headings = [line for line in rest if line.startswith("#")]
    assert headings in (
        ["## What it means", "## What to do"],
        ["## What it means", "## What to do", "## See also"],
    )
    assert "\n\n\n" not in text and "## What to do\n\n##" not in text and text.endswith("\n")
    for other in re.findall(r"\[(PF\d{4})\]\((PF\d{4})\.md\)", text):
        assert other[0] == other[1] and (PAGES / f"{other[1]}.md").exists()


def test_a_page_shows_the_text_of_the_source() -> None:
    """The line that a page shows is the one that the source makes: it has the start of a piece of the source's text."""
    samples = {code: text.splitlines()[2] for code, text in pages().items()}
    known: dict[str, list[str]] = {}
    for text in texts():
        known.setdefault(text.code, []).extend(piece for piece in text.pieces if len(piece) >= 12)
    assert [
        code for code, found in known.items() if found and not any(piece[:24] in samples[code] for piece in found)
    ] == []


def test_every_warning_has_a_code() -> None:
    """What is logged from level warning on has a code at the end of its first line."""
    bare = []
    for path, tree in trees():
        if path in PASSED_ON:
            continue
        functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
        for function in functions:
            for call in ast.walk(function):
                if isinstance(call, ast.Call) and isinstance(call.func, ast.Attribute) and is_report(call.func):
                    said = [*call.args, *assigned(function, {n.id for n in call.args if isinstance(n, ast.Name)})]
                    if not any(has_code(part) for part in said):
                        bare.append(f"{path}:{call.lineno}")
    assert sorted(set(bare)) == []


def is_report(called: ast.Attribute) -> bool:
    owner = ast.unparse(called.value)
    logs = owner == "log" or owner.startswith("logs.get(")
    return (logs and called.attr in {*WARNINGS, "log"}) or (
        called.attr in REPORTS and owner.rpartition(".")[2] in {"_guard", "guard", "log_stderr"}
    )


def assigned(function: ast.AST, names: set[str]) -> Iterator[ast.expr]:
    """What a function assigns to these names."""
    for node in ast.walk(function):
        if isinstance(node, ast.Assign) and {ast.unparse(target) for target in node.targets} & names:
            yield node.value


def has_code(part: ast.expr) -> bool:
    calls = {ast.unparse(node.func) for node in ast.walk(part) if isinstance(node, ast.Call)}
    strings = [str(node.value) for node in ast.walk(part) if isinstance(node, ast.Constant)]
    return "with_code" in calls or any(AT_THE_END.search(text) for text in strings)


# -- the command -----------------------------------------------------------------------------------


def run(*arguments: object, directory: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "prefork", *map(str, arguments)],
        cwd=directory,
        env={**os.environ, **path_of_modules()},
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )


@pytest.mark.parametrize("code", ["PF0203", "pf0203", "203", "[PF0203]"])
def test_explain(tmp_path: Path, code: str) -> None:
    """`--explain` prints the page of a code, as the log shows it or as a number."""
    done = run("--explain", code, directory=tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (0, pages()["PF0203"], "")


@pytest.mark.parametrize(
    ("code", "complaint"),
    [
        ("PF0998", r"there is no message PF0998; the nearest is PF0802"),
        ("memory", r"'memory' is no message code; a code is PF and four digits, such as PF0101"),
    ],
)
def test_explain_an_unknown_code(tmp_path: Path, code: str, complaint: str) -> None:
    """A code that does not exist is one line, which names the nearest, and exit code 2."""
    done = run("--explain", code, directory=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert re.fullmatch(rf"prefork: error: --explain: {complaint}( \[PF\d{{4}}\])?\n", done.stderr)


def test_an_address_in_use_has_its_code(tmp_path: Path) -> None:
    """The command prints the code of an error at the end of its one line."""
    (tmp_path / "app.py").write_text("import socketserver\nclass Quiet(socketserver.StreamRequestHandler): pass\n")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        done = run("app:Quiet", "-b", f"127.0.0.1:{taken.getsockname()[1]}", directory=tmp_path)
    assert done.returncode == 1
    errors = [line for line in done.stderr.splitlines() if not patterns.LOG_LINE.match(line)]
    assert len(errors) == 1 and re.fullmatch(r"prefork: error: cannot listen on .* \[PF0401\]", errors[0])


def test_an_import_that_fails_has_its_code_on_the_first_line(tmp_path: Path) -> None:
    """Where a traceback follows, the code ends the line before it."""
    (tmp_path / "app.py").write_text("import nothing_of_this_name\n")
    done = run("app:Quiet", "-b", TCP, directory=tmp_path)
    assert done.returncode == 4
    assert re.match(r"prefork: error: app:Quiet: 'app' cannot be imported \[PF0122\]\nTraceback ", done.stderr)
    assert len(CODE.findall(done.stderr)) == 1


def test_a_death_has_its_code(start: Start) -> None:
    """The line of a worker that ended by itself, and that of one that was killed, end with different codes."""
    program = command(start, "app:Versioned", "-b", TCP, "-w", 1).ready()
    with suppress(ConnectionError, AssertionError):
        ask(program.address, "exit 3")
    program.wait_for(r"worker \d+ \(slot 0, generation 1\) exited: it ended by itself, exit code 3, .* \[PF0201\]\n")
    (worker,) = program.wait_ready(1)
    program.kill_workers(worker)
    program.wait_for(rf"worker {worker} \(slot 0, generation 1\) exited: a signal killed it, SIGKILL; .* \[PF0203\]\n")
    program.finish()


def test_a_failed_reload_has_its_code(start: Start) -> None:
    """A reload that fails at the import, and one that comes during a stop, say so with a code."""
    program = command(start, "app:Versioned", "-b", TCP, "-w", 1, allow=[patterns.TRACEBACK]).ready()
    program.write("app.py", "import nothing_of_this_name\n")
    program.send(signal.SIGHUP)
    program.wait_for(r"ERROR: reload failed: generation 1 serves on: 'app' cannot be imported \[PF0122\]\nTraceback ")
    program.finish()


def test_a_reload_during_a_stop_is_ignored_with_a_reason(start: Start) -> None:
    """HUP and TTIN during a stop are refused in the log, each with a code."""
    program = command(start, "app:Versioned", "-b", TCP, "-w", 1).ready()
    with program.address.socket() as client:
        client.connect((program.address.where, program.address.port))
        program.wait_ready(1)
        client.sendall(b"x ")
        program.begin_stop()
        program.send(signal.SIGHUP)
        program.wait_for(r"WARNING: reload ignored: the pool stops \[PF0304\]\n")
        program.send(signal.SIGTTIN)
        program.wait_for(r"WARNING: resize ignored: the pool stops \[PF0309\]\n")
    program.wait_exit()
    program.finish()

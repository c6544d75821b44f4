"""Holds every text file of the project to its words: no long line, and no private metaphor where a standard term is."""

import ast
import os
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
LONGEST = 120  # characters of a line

# A metaphor, as a pattern, and the term that stands for it. Those that are also ordinary words are in IDENTIFIERS.
METAPHORS = {
    r"\b[Cc]rew\b": "the worker's handle, or the pool",
    r"\bHand\b": "WorkerHandle",
    r"\bSeats?\b": "WorkerContext",
    r"\b[Ss]couts?\b": "probe",
    r"\b[Ll](end|ends|ent)\b": "enter_fast_path, or give",
    r"\brecalls?\b": "leave_fast_path",
    r"\b[Ll]one\b": "fast_path_request, or single",
    r"\bGate\b": "ListenerGate",
    r"\b(OURS|THEIRS|NOBODYS)\b": "ConnectionBalancer's answers",
    r"\bTurns\b": "LeaderFollowers",
    r"\bworkers[./]chain\b": "workers/intake/dispatch",
    r"\bTaken\b": "Accepted",
    r"\b[Uu]ndivided\b|_UNDIVIDED": "uninterruptible",
    r"\bJoining\b": "HeadBufferingTransport",
    r"\bFULL\b": "RESOURCE_ERRORS",
    r"\bworn\b": "recycle_requested, or to be replaced",
    r"\bNews\b": "PoolEvent",
    r"\b_press\b": "escalate",
}
# Not to be defined in code: as names these tell nothing, as words in a sentence they may be right.
IDENTIFIERS = {
    "among": "registry, or the collection's own name",
    "chain": "dispatch",
    "odd": "custom_deadlines",
    "shown": "published",
    "Share": "ConnectionBalancer",
    "Site": "ListenerContext, or ASGIApplication",
    "taker": "make_accept",
    "trial": "probe",
    "_heard": "on_uplink",
    "_try": "probe",
}


def texts() -> Iterator[tuple[str, str]]:
    """Every text file of the project, by its path from the root; not what is built, and not this file."""
    for path, folders, files in os.walk(ROOT):
        folders[:] = [
            name for name in folders if name == ".ci" or (name[0] != "." and name not in ("__pycache__", "dist"))
        ]
        for name in files:
            file = Path(path, name)
            if file.is_symlink() or name.endswith((".pyc", ".so")) or file == Path(__file__).resolve():
                continue
            content = file.read_bytes()
            if b"\0" not in content:
                yield str(file.relative_to(ROOT)), content.decode()


TEXTS = dict(sorted(texts()))


def long_lines(file: str, text: str) -> Iterator[str]:
    """The lines of a file that are too long."""
    for number, line in enumerate(text.splitlines(), 1):
        if len(line) > LONGEST:
            yield f"{file}:{number}: {len(line)} characters; at most {LONGEST}: break the line"


def metaphors(file: str, text: str) -> Iterator[str]:
    """The metaphors in a file. The history may name what a thing was called, between backticks."""
    if file == "CHANGELOG.md":
        text = re.sub("`[^`\n]*`", "", text)
    for number, line in enumerate(text.splitlines(), 1):
        for pattern, term in METAPHORS.items():
            if match := re.search(pattern, line):
                yield f"{file}:{number}: {match[0]}; write {term}"


def defined(file: str, text: str) -> Iterator[str]:
    """The identifiers that a module must not define."""
    if not file.endswith(".py"):
        return
    for node in ast.walk(ast.parse(text)):
        match node:
            case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name) | ast.ClassDef(name=name):
                pass
            case ast.arg(arg=name) | ast.Name(id=name, ctx=ast.Store()):
                pass
            case ast.Attribute(attr=name, ctx=ast.Store()):
                pass
            case _:
                continue
        if name in IDENTIFIERS:
            yield f"{file}:{node.lineno}: {name}; name it {IDENTIFIERS[name]}"


def none_of(problems: list[str]) -> None:
    """Fail with the problems, each on a line of its own."""
    if problems:
        pytest.fail("\n".join(problems), pytrace=False)


def test_no_line_is_long() -> None:
    """No line of a text file is longer than a screen is wide."""
    none_of([line for file, text in TEXTS.items() for line in long_lines(file, text)])


def test_no_private_metaphor() -> None:
    """A thing is called by the field's word, or a plain one, in code and documents alike."""
    none_of([problem for file, text in TEXTS.items() for problem in metaphors(file, text)])
    none_of([problem for file, text in TEXTS.items() for problem in defined(file, text)])


def test_all_kinds_of_text_are_read() -> None:
    """Documents, code, the build and its scripts are read; nothing that was built is."""
    assert {
        "README.md",
        "Makefile",
        "pyproject.toml",
        ".ci/run",
        "workers/worker.py",
        "benchmarks/load.c",
    } <= TEXTS.keys()
    assert not [file for file in TEXTS if file.startswith((".build", ".git/"))]


@pytest.mark.parametrize(
    ("file", "text", "problems"),
    [
        ("a.md", "x" * 120, 0),
        ("a.md", "fine\n" + "x" * 121, 1),
        ("a.md", "The crew\nand its Seat", 2),
        ("a.md", "Hand it over, on the other hand", 1),
        ("CHANGELOG.md", "`prefork: scout` is now the probe", 0),
        ("CHANGELOG.md", "the scout is now the probe", 1),
        ("a.py", "def chain(among):\n    self.odd = trial = 1", 4),
        ("a.py", "import itertools\nitertools.chain(site, [among])", 0),
        ("a.md", "a chain of calls among others", 0),
    ],
)
def test_words_have_teeth(file: str, text: str, problems: int) -> None:
    """Each rule finds what it forbids, and lets pass what it does not."""
    assert len([*long_lines(file, text), *metaphors(file, text), *defined(file, text)]) == problems

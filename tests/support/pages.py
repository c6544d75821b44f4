"""Pages of the documentation, read as a reader reads them: which files to write, what to type, what to see.

A page is Markdown. In its code blocks
- a first line that is a comment with a file name, such as `# app.py`, makes this file in the reader's directory;
- other Python is a program of its own, which ends by itself;
- `console` holds commands behind `$ `, each followed by the lines that it prints. `...` stands for any text.
- `text` is prose: a diagram, or a line of a log.

`<!-- not run: REASON -->` in the line before a block leaves it out.
"""

import re
from dataclasses import dataclass, field
from pathlib import Path

PROSE = {"text", "mermaid"}
FENCE = re.compile(r"(?P<indent> *)(?P<fence>`{3,}|:{3,})(?P<words>.*)")
FILE = re.compile(r"(?:#|//|;) ([\w./@-]+\.\w+)")
NOT_RUN = re.compile(r" *<!-- not run: (.+) -->")


@dataclass
class Block:
    """A code block: where it is, its language, its text, and why it is not run ("": it is)."""

    line: int
    language: str
    text: str
    not_run: str = ""

    @property
    def file(self) -> str:
        """The name of the file that it is; "": it is none."""
        match = FILE.fullmatch(self.text.partition("\n")[0])
        return match[1] if match and self.language != "console" else ""

    @property
    def commands(self) -> list["Command"]:
        """What a `console` block has the reader type, in order."""
        commands: list[Command] = []
        for line in self.text.splitlines():
            if line.startswith("$ "):
                commands.append(Command(line[2:]))
            elif commands and commands[-1].text.endswith("\\"):
                commands[-1].text = commands[-1].text[:-1] + line.removeprefix(">").strip()
            elif commands:
                commands[-1].output.append(line)
            else:
                raise AssertionError(f"a console block begins with a command behind '$ ', not with {line!r}")
        return commands


@dataclass
class Command:
    """A command line, and the lines that the page shows after it."""

    text: str
    output: list[str] = field(default_factory=list)


def blocks(page: Path) -> list[Block]:
    """The code blocks of a page, in order."""
    found: list[Block] = []
    current: Block | None = None
    fence = indent = before = ""
    for number, line in enumerate(page.read_text(encoding="utf-8").splitlines(), 1):
        match = FENCE.fullmatch(line)
        if current is None and match and match["fence"][0] == "`":
            reason = NOT_RUN.fullmatch(before)
            current = Block(number, match["words"].strip(), "", reason[1] if reason else "")
            fence, indent = match["fence"], match["indent"]
        elif current is not None and line.strip() == fence:
            found.append(current)
            current = None
        elif current is not None:
            current.text += line.removeprefix(indent) + "\n"
        before = line
    assert current is None, f"{page}:{current.line}: a code block without an end"
    return [block for block in found if not block.language.startswith("{")]  # a directive of Sphinx


def as_pattern(line: str) -> re.Pattern[str]:
    """Matches a line of output as the page shows it: `...` is any text."""
    return re.compile(".*".join(map(re.escape, line.rstrip().split("..."))) + r"\s*")


def as_log_pattern(line: str) -> re.Pattern[str]:
    """Matches a line of the log as the page shows it: `...` is any text, and numbers are any numbers."""
    pieces = [r"\d+".join(map(re.escape, re.split(r"\d+", piece))) for piece in line.strip().split("...")]
    return re.compile(".*".join(pieces))

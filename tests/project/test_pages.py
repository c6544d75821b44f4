"""The documentation, done as a reader does it: files are written, commands typed, and their output compared."""

import functools
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from support import Program, patterns, processes
from support.pages import PROSE, Block, Command, as_log_pattern, as_pattern, blocks
from support.waiting import until

ROOT = Path(__file__).resolve().parents[2]
# The changelog quotes what is no more.
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(ROOT.glob("docs/**/*.md"))]
OWN_TEST = ROOT / "docs/howto/write-a-worker-class.md"  # its programs need clients: test_workers_guide.py
WALKED = [page for page in PAGES if page != OWN_TEST and any(block.language not in PROSE for block in blocks(page))]
NOT_SERVING = {
    "--help", "--version", "--explain", "status", "top", "explain", "dump", "profile", "reload", "stop", "scale",
    "recycle", "ps", "completion",
}  # fmt: skip
PID = "1234"  # in a page it stands for the pid of the server that was started last
PORTS = ("8000", "8080", "9999")

Start = Callable[..., Program]


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


class Reader:
    """Somebody who follows a page in a directory that is empty at first."""

    def __init__(self, start: Start, directory: Path, ports: dict[str, str]) -> None:
        self.start, self.directory, self.ports = start, directory, ports
        self.work = directory / "work"
        self.work.mkdir()
        self.servers: list[Program] = []
        self.others: list[subprocess.Popen[bytes]] = []
        self.env = {
            **os.environ,
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}:/usr/sbin",
            "XDG_RUNTIME_DIR": str(directory),
            "PYTHONDONTWRITEBYTECODE": "1",
        }

    def adapted(self, text: str) -> str:
        """The page's text with ports that are free, and the pid that there is."""
        text = re.sub(r"\b\d{4}\b", lambda match: self.ports.get(match[0], match[0]), text)
        return re.sub(rf"\b{PID}\b", str(self.servers[-1].pid), text) if self.servers else text

    def follow(self, block: Block) -> None:
        if block.file:
            path = self.work / block.file
            path.parent.mkdir(parents=True, exist_ok=True)
            if block.language == "python":  # a module is compiled anew after each change
                self.age = getattr(self, "age", 3600) - 2
            path.write_text(self.adapted(block.text), encoding="utf-8")
            if block.language == "python":
                stamp = path.stat().st_mtime - self.age
                os.utime(path, (stamp, stamp))
        elif block.language == "console":
            for command in block.commands:
                self.type(command)
        elif block.language == "python":
            assert "serve_forever" not in block.text, "a program that serves needs a name: begin it with `# NAME.py`"
            self.run([sys.executable, "-c", self.adapted(block.text)])
        else:
            raise AssertionError(f"a {block.language!r} block is a file (`# NAME` in its first line), or is not run")

    def type(self, command: Command) -> None:
        text = self.adapted(command.text)
        words = shlex.split(text, comments=True)
        if self.serves(words):
            where = {"directory": self.directory, "env": {"XDG_RUNTIME_DIR": str(self.directory)}}
            if words[0] == "prefork":
                bind = [] if {"-b", "--bind"}.intersection(words) else ["-b", f"127.0.0.1:{self.ports['8000']}"]
                server = self.start("prefork", *words[1:], *bind, **where)
            else:
                server = self.start(self.work / words[1], *words[2:], **where)
            self.servers.append(server)
            self.see(command.output, since=0)
            if server.running:
                until(lambda: self.is_ready(server), 10, "all workers are ready")
            return
        mark = self.servers[-1].mark if self.servers else 0
        if words[-1] == "&":
            self.others.append(subprocess.Popen(words[:-1], cwd=self.work, env=self.env))
            return
        printed = self.run(["bash", "-e", "-o", "pipefail", "-c", text])
        if words[0] == "kill":
            self.see(command.output, since=mark)
            if "-TERM" in words or "-INT" in words:
                self.servers[-1].wait_exit(10)
            elif "-HUP" in words:
                self.servers[-1].wait_for(rf"{patterns.RELOADED.pattern}|stays|failed", 20, since=mark)
        else:
            assert_like(printed.splitlines(), [self.adapted(line) for line in command.output])

    @staticmethod
    def is_ready(server: Program) -> bool:
        """Whether it has workers, and each says in its title that it is ready. A program may have no log."""
        titles = [processes.title(pid) for pid in server.children()]
        return bool(titles) and all(patterns.TITLE_READY.search(title) for title in titles)

    def serves(self, words: list[str]) -> bool:
        """Whether a command goes on until it is stopped."""
        if "||" in words:
            return False
        if words[0] == "prefork":
            return len(words) > 1 and words[1] not in NOT_SERVING and not {"--help", "--version"}.intersection(words)
        if words[0] in ("python", "python3") and len(words) > 1 and words[1].endswith(".py"):
            return "serve" in (self.work / words[1]).read_text(encoding="utf-8")
        return False

    def see(self, lines: list[str], since: int) -> None:
        """Lines of the last server's log, in their order."""
        for line in lines:
            if line.strip() not in ("", "..."):
                pattern = as_log_pattern(self.adapted(line))
                since += until(functools.partial(self.after, pattern, since), 15.0, f"{line!r} in the log")

    def after(self, pattern: re.Pattern[str], since: int) -> int:
        with self.servers[-1].log_path.open("rb") as file:
            file.seek(since)
            match = pattern.search(file.read().decode(errors="replace"))
        return len(match.string[: match.end()].encode()) if match else 0

    def run(self, words: list[str]) -> str:
        done = subprocess.run(
            words, cwd=self.work, env=self.env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=40,
            check=False,
        )  # fmt: skip
        assert done.returncode == 0, f"{words[-1]}: exit code {done.returncode}\n{done.stdout}"
        return done.stdout

    def close(self) -> None:
        for process in self.others:
            process.terminate()
            process.wait(10)


def assert_like(lines: list[str], expected: list[str]) -> None:
    """The lines are those that the page shows, where it shows any; a line of `...` is any number of lines."""
    if not expected:
        return
    pattern = "".join(r"(?:.*\n)*?" if line.strip() == "..." else as_pattern(line).pattern + "\n" for line in expected)
    text = "".join(line.rstrip() + "\n" for line in lines)
    assert re.fullmatch(pattern, text), f"the page shows {expected}, but it printed {lines}"


@contextmanager
def at(page: Path, block: Block) -> Iterator[None]:
    """Names the block in an error."""
    try:
        yield
    except AssertionError as error:
        error.add_note(f"{name_of(page)}:{block.line}")
        raise


@pytest.mark.parametrize("page", WALKED, ids=name_of)
def test_page_can_be_followed(page: Path, start: Start, tmp_path: Path, free_ports: list[str]) -> None:
    """All that the page has its reader write and type does what the page says."""
    reader = Reader(start, tmp_path, dict(zip(PORTS, free_ports, strict=True)))
    try:
        for block in blocks(page):
            if block.language not in PROSE and not block.not_run:
                with at(page, block):
                    reader.follow(block)
    finally:
        reader.close()
    provoked = (patterns.FAULT, patterns.HANDLER_ERROR)
    for server in reader.servers:
        server.finish(allow=provoked)


def test_few_blocks_are_not_run() -> None:
    """What no test can do is little, and each has its reason in the page."""
    left_out = [block.not_run for page in PAGES for block in blocks(page) if block.not_run]
    assert len(left_out) <= 6, left_out


def test_blocks_have_a_language() -> None:
    """No block is overlooked because nobody knows what it is."""
    assert not [f"{name_of(page)}:{block.line}" for page in PAGES for block in blocks(page) if not block.language]


def test_code_is_in_fences() -> None:
    """No command line escapes by being a block that is only indented; pages of messages show lines of the log so."""
    for page in PAGES:
        if page.parent.name != "messages" and page.name != "CONTRIBUTING.md":
            text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
            assert not re.findall(r"\n\n {4}(\S.*)", text), name_of(page)

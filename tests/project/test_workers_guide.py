"""The guide to worker classes, read as a reader would: each program in it does what the text around it says."""

import ast
import re
import signal
import socket
import sqlite3
import subprocess
import sys
import textwrap
import tomllib
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import prefork.servers.worker_class
from prefork import Worker
from prefork.workers.worker import Worker as Base
from support import PROGRAMS, Address, Program, ask, dial

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = ROOT / "examples"
GUIDE = ROOT / "docs/howto/write-a-worker-class.md"
SLOW_CLIENTS = ROOT / "docs/howto/slow-clients.md"
SURFACE = ROOT / "docs/reference/worker-surface.md"
CHOICE = ROOT / "docs/howto/choose-a-worker-class.md"

Start = Callable[..., Program]

SERVE = """
    import logging
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s[%(process)d] %(levelname)s: %(message)s")
    with Server(("127.0.0.1", {port}), {handler}) as server:
        server.serve_forever()
"""


def blocks(language: str) -> list[str]:
    text = "".join(page.read_text(encoding="utf-8") for page in (GUIDE, SLOW_CLIENTS))
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def defined(text: str) -> list[str]:
    """The classes and functions that a program defines."""
    kinds = (ast.ClassDef, ast.FunctionDef)
    return [node.name for node in ast.parse(text).body if isinstance(node, kinds)]


def block(name: str) -> str:
    (found,) = [text for text in blocks("python") if name in defined(text)]
    return found


def served(start: Start, port: int, name: str, rest: str, handler: str, workers: int = 2) -> Program:
    """The guide's program, with the server that it leaves to the reader."""
    text = block(name) + textwrap.dedent(rest) + textwrap.dedent(SERVE.format(port=port, handler=handler))
    program = start("program", files={"program.py": text})
    program.wait_ready(workers, 10)
    return program


def converse(port: int, request: bytes) -> bytes:
    with dial(Address("tcp", "127.0.0.1", port), 10) as sock:
        sock.sendall(request)
        sock.shutdown(socket.SHUT_WR)
        return b"".join(iter(lambda: sock.recv(65536), b""))


def test_every_block_is_run() -> None:
    """There is no program in the guide that no test here runs."""
    tested = set(re.findall(r'(?:block|served)\((?:start, port, )?"(\w+)"', Path(__file__).read_text(encoding="utf-8")))
    for text in blocks("python"):
        assert tested & set(defined(text)), text
    assert len(blocks("toml")) == 1
    assert set(re.findall(r"^```(\w+)$", GUIDE.read_text(encoding="utf-8"), re.MULTILINE)) == {"python", "toml"}


def test_surface_is_whole() -> None:
    """The tables name what the Worker class has in public, all of it and nothing else."""
    tables, rest = SURFACE.read_text(encoding="utf-8").split("## What runs where")
    assert rest
    cells = re.findall(r"^\| ([^|]*`[^|]*) \|", tables, re.MULTILINE)
    named = {name for cell in cells for name in re.findall(r"`(?:with )?(\w+)", cell)}
    public = {
        name for name in [*vars(Base), "servers", "server", "slot", "generation", "options", "draining", "quitting"]
    }
    assert named == {name for name in public if not name.startswith("_")} - {"live"}
    assert Base is Worker


def test_setup(start: Start, port: int) -> None:
    """What setup() opened serves, and teardown() closes it, in each worker."""
    rest = """
        import prefork

        class Count(prefork.StreamRequestHandler):
            def handle(self):
                self.server.book.execute("INSERT INTO served VALUES (?, 1)", (self.server.worker.slot,))

        class Server(prefork.PreforkTCPServer):
            worker_class = CountingWorker
            workers = 2
    """
    program = served(start, port, "CountingWorker", rest, "Count")
    for _ in range(4):
        assert converse(port, b"") == b""
    program.finish()
    said = sorted(program.out_path.read_text().splitlines())
    assert said == [f"worker {slot} leaves; 4 requests so far" for slot in (0, 1)]
    with sqlite3.connect(program.work / "book.sqlite3") as book:
        assert book.execute("SELECT count(*) FROM served").fetchone() == (4,)
    book.close()


def test_loop_over_accept(start: Start, port: int) -> None:
    """The loop serves the whole chain, and sees which request was slow."""
    rest = """
        import prefork, time

        class Slow(prefork.StreamRequestHandler):
            def handle(self):
                time.sleep(float(self.rfile.readline()))
                self.wfile.write(b"done")

        class Server(prefork.PreforkTCPServer):
            worker_class = WatchingWorker
            workers = 2
    """
    program = served(start, port, "WatchingWorker", rest, "Slow")
    assert [converse(port, text) for text in (b"0\n", b"0.25\n")] == [b"done"] * 2
    program.wait_for(r"slow\[\d+\] WARNING: worker \d: \('127.0.0.1', \d+\) took 0\.\d s")
    program.finish()
    assert program.log.count("WARNING") == 1


def test_function_worker(start: Start, port: int) -> None:
    """A function serves, its deadline holds, and a handler class is refused before anything is forked."""
    rest = """
        import prefork, time

        def answer(data):
            while data == b"hang":
                time.sleep(0.01)
            return data.upper()

        class Server(prefork.PreforkTCPServer):
            worker_class = FunctionWorker
            workers = 2
            request_timeout = 0.4
    """
    program = served(start, port, "FunctionWorker", rest, "answer")
    pids = program.children()
    assert converse(port, b"hello") == b"HELLO"
    assert converse(port, b"hang") == b""
    assert converse(port, b"again") == b"AGAIN"
    assert program.children() == pids
    program.finish()
    text = block("FunctionWorker") + textwrap.dedent(rest) + textwrap.dedent(SERVE.format(port=port, handler="Worker"))
    refused = start("program", files={"program.py": text})
    refused.wait_exit(10)
    assert "OptionError: FunctionWorker serves a function" in refused.log
    refused.finish(code=1, check_log=False)


def test_connections_that_stay(start: Start, port: int) -> None:
    """An idle client does not hold the stop, and one that has not had its answer gets it."""
    program = served(start, port, "PatientWorker", "class Server(LineServer):\n    workers = 2\n", "Lines")
    with ExitStack() as stack:
        idle, new = (stack.enter_context(dial(Address("tcp", "127.0.0.1", port))) for _ in range(2))
        idle.sendall(b"one\n")
        assert idle.recv(100) == b"ONE\n"
        program.send(signal.SIGTERM)
        assert idle.recv(100) == b""
        assert program.running
        new.sendall(b"two\n")
        assert new.recv(100) == b"TWO\n" and new.recv(100) == b""
    program.wait_exit()
    program.finish()


def test_requests_that_are_not_there_yet(start: Start, port: int) -> None:
    """Clients with half a line hold no thread: others are served, and each of them when its line is whole."""
    rest = """
        class Server(UpperServer):
            workers = 1
            threads = 1
    """
    program = served(start, port, "UpperServer", rest, "Upper", workers=1)
    with ExitStack() as stack:
        slow = [stack.enter_context(dial(Address("tcp", "127.0.0.1", port))) for _ in range(5)]
        for sock in slow:
            sock.sendall(b"half a ")
        assert converse(port, b"fast\n") == b"FAST\n"
        for sock in slow:
            sock.sendall(b"line\n")
            assert sock.recv(100) == b"HALF A LINE\n"
    program.finish()


def test_deadlines(start: Start, port: int) -> None:
    """A handler that extends its deadline outlives it."""
    rest = """
        import prefork

        class Server(prefork.PreforkTCPServer):
            workers = 1
            request_timeout = 0.5
    """
    program = served(start, port, "Export", rest, "Export", workers=1)
    assert converse(port, b"4\n") == b"piece\n" * 4
    program.finish()
    assert "deadline" not in program.log


def test_gevent_is_the_example(start: Start, port: int) -> None:
    """The guide's gevent worker is the example's, to the letter, and it serves as the command's class, too."""
    guide = re.sub(r"  # type: ignore\[[\w-]+\]", "", block("GeventWorker"))
    example = re.sub(r"  # type: ignore\[[\w-]+\]", "", (EXAMPLES / "gevent_worker.py").read_text(encoding="utf-8"))
    assert guide[guide.index("class ") :] in example
    for line in guide[: guide.index("class ")].splitlines():
        assert line.partition(" import ")[0] in example
    files = {"guide.py": block("GeventWorker")}
    env = {"PREFORK_LEDGER": "/dev/null", "PYTHONPATH": str(PROGRAMS)}
    words = ("-b", f"tcp://127.0.0.1:{port}", "-w", 1, "--worker-class", "guide:GeventWorker", "--request-timeout", 0.5)
    program = start("prefork", "work:Work", *words, files=files, env=env)
    program.wait_ready(1, 10)
    pids = program.children()
    address = Address("tcp", "127.0.0.1", port)
    with dial(address) as late:
        late.sendall(b"late sleep 60\n")
        assert ask(address).pid == pids[0]
        assert late.recv(100) == b""  # ended alone
    assert ask(address).pid == pids[0]
    with dial(address) as busy:
        busy.sendall(b"busy busy\n")
        assert busy.recv(100) == b""  # by the master: it kept the loop from turning
    assert ask(address).pid == pids[0]
    program.finish(check_log=False)
    assert program.log.count("RequestTimeout: the request took longer than 0.5 s") == 2


def test_short_name(start: Start, port: int, tmp_path: Path) -> None:
    """What the guide registers in the entry points is found under its name by the command."""
    (text,) = blocks("toml")
    groups = tomllib.loads(text)["project"]["entry-points"]
    assert set(groups) == {prefork.servers.worker_class.ENTRY_POINTS}
    installed = tmp_path / "mine-1.0.dist-info"
    installed.mkdir()
    (installed / "METADATA").write_text("Metadata-Version: 2.1\nName: mine\nVersion: 1.0\n")
    rows = [f"[{group}]\n" + "".join(f"{k} = {v}\n" for k, v in names.items()) for group, names in groups.items()]
    (installed / "entry_points.txt").write_text("\n".join(rows))
    env = {"PREFORK_LEDGER": "/dev/null", "PYTHONPATH": f"{tmp_path}:{EXAMPLES}:{PROGRAMS}"}
    words = ("work:Work", "-b", f"tcp://127.0.0.1:{port}", "-w", 1, "--worker-class", "gevent")
    program = start("prefork", *words, env=env)
    program.wait_ready(1, 10)
    assert ask(Address("tcp", "127.0.0.1", port)).pid == program.children()[0]
    program.finish()


def test_testing(tmp_path: Path) -> None:
    """The guide's test passes in a pytest of its own."""
    (tmp_path / "test_mine.py").write_text(block("Shout"))
    words = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-W", "ignore", str(tmp_path)]
    env = {"PATH": "/usr/bin:/bin", "PYTHONPATH": str(EXAMPLES), "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(words, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=50, check=False)
    assert done.returncode == 0 and "1 passed" in done.stdout, done.stdout + done.stderr


def test_shipped_classes_are_named() -> None:
    """The table to choose from has a row for each short name."""
    rows = set(re.findall(r"^\| `(\w+)` \| ", CHOICE.read_text(encoding="utf-8"), re.MULTILINE))
    assert rows >= set(prefork.servers.worker_class.CLASSES)

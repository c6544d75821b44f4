"""A start that fails, whatever of it fails and in whichever process, leaves nothing at the Unix paths that it has
bound; and one that is stopped in time is no failure."""

import os
import re
import shutil
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from support import Program, children, patterns, title, until
from support.scripts import Notes, Start, launch, noted, path_of_modules

pytestmark = pytest.mark.timeout(60)


def command(start: Start, *arguments: object, app: str, **options: Any) -> Program:
    files = {"app.py": f"from kit import *\n{app}"}
    return start("prefork", *arguments, "-w", 1, files=files, env=path_of_modules(), **options)


# -- calls that are refused --------------------------------------------------------------------------------------------

STRACE = shutil.which("strace")
needs_strace = pytest.mark.skipif(not STRACE, reason="needs strace to have system calls refused")


def trace(folder: Path, run: Path, *options: str) -> str:
    """A start under strace, and a stop once it serves. Returns its log."""
    run.mkdir()
    (folder / "app.py").write_text("from kit import *\n")
    arguments = ["app:Handler", "-b", f"unix:{run}/s", "-b", f"unix:{run}/t", "-w", "1"]
    with subprocess.Popen(
        [str(STRACE), "-f", "-qq", *options, sys.executable, "-m", "prefork", *arguments],
        cwd=folder, env={**os.environ, **path_of_modules()}, stderr=subprocess.PIPE, text=True, start_new_session=True,
    ) as process:  # fmt: skip
        assert process.stderr
        log = ""
        try:
            while line := process.stderr.readline():
                log += line
                if patterns.READY.search(line):
                    os.kill(children(process.pid)[0], signal.SIGTERM)
        finally:
            os.killpg(process.pid, signal.SIGKILL)
    return log


def refused(call: str, error: str, number: int) -> list[str]:
    return ["-o", "/dev/null", "-e", f"trace={call}", "-e", f"inject={call}:error={error}:when={number}"]


@needs_strace
@pytest.mark.parametrize(
    "call,error,number",
    [
        ("flock", "ENOLCK", 1),
        ("flock", "ENOLCK", 2),
        ("sendto", "ENOBUFS", 1),
        ("bind", "ENOBUFS", 2),
        ("listen", "ENOBUFS", 2),
        ("sendmsg", "ENOBUFS", 1),
        ("recvmsg", "ENOBUFS", 1),
        ("getsockopt", "ENOBUFS", 1),
        ("wait4", "ENOMEM", 1),
    ],
)
def test_a_system_call_that_is_refused(tmp_path: Path, call: str, error: str, number: int) -> None:
    """Where one of the calls between the bind and the first worker is refused once, in the child that binds or in the
    master, no file is left; nor by the stop, where it has started nevertheless."""
    run = tmp_path / "run"
    log = trace(tmp_path, run, *refused(call, error, number))
    assert os.listdir(run) == [], log


# Not refused by any kernel, or by the test's own way to see what comes of it.
NEVER = {"exit", "exit_group", "execve", "brk", "munmap", "mmap", "mprotect", "futex", "getpid", "gettid", "unlink"}
NEVER |= {"rt_sigaction", "rt_sigprocmask", "rt_sigreturn", "restart_syscall", "set_robust_list", "read", "write"}


def calls(path: Path) -> Iterator[tuple[str, int]]:
    """Each call between the first claim and the end of the start, as the how manyth of its process."""
    counts: dict[str, Counter[str]] = {}
    begun = False
    for match in re.finditer(r"^(\d+) +(\w+)\((.*)$", path.read_text(), re.MULTILINE):
        pid, name, rest = match.groups()
        count = counts.setdefault(pid, Counter())
        count[name] += 1
        begun |= "s.lock" in rest
        if "pool ready" in rest:
            return
        if begun and name not in NEVER:
            yield name, count[name]


@pytest.mark.soak
@pytest.mark.timeout(1200)
@needs_strace
def test_each_system_call_refused_once(tmp_path: Path) -> None:
    """Whichever call is refused once, in either process, a start that fails for it leaves nothing."""
    trace(tmp_path, tmp_path / "run", "-s", "200", "-o", str(tmp_path / "trace"))
    found = sorted(set(calls(tmp_path / "trace")))
    assert len(found) > 100

    def one(call: tuple[str, int]) -> str:
        folder = tmp_path / f"{call[0]}-{call[1]}"
        folder.mkdir()
        log = trace(folder, folder / "run", *refused(call[0], "ENOMEM", call[1]))
        left = os.listdir(folder / "run")
        shutil.rmtree(folder)
        return f"{call}: {left}\n{log}" if left and not patterns.READY.search(log) else ""

    with ThreadPoolExecutor(3) as threads:
        wrong = [text for text in threads.map(one, found) if text]
    assert not wrong, "\n".join(wrong)


# -- programs that fail ------------------------------------------------------------------------------------------------

BOUND = """
server = prefork.PreforkUnixStreamServer(str(RUN / "s"), Handler)
note("bound")
"""
FAULTS = {
    "raises": "raise ValueError('ordered trouble')",
    "leaves": "os._exit(3)",
    "crashes": "os.kill(os.getpid(), signal.SIGSEGV)",
    "killed": "os.kill(os.getpid(), signal.SIGKILL)",
    "hangs": "pass_gate('never')",
    "deaf": "signal.signal(signal.SIGTERM, signal.SIG_IGN)\npass_gate('never')",
    "setting": "server.max_requests = -1",
    "class": "server.worker_class = 'none'",
    "elsewhere": "server = prefork.PreforkUnixStreamServer(str(RUN / 'missing' / 't'), Handler)",
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_program_that_fails_after_its_bind(start: Start, fault: str) -> None:
    """A program that has bound a path when it is imported, and then fails in any way, leaves nothing there."""
    program = command(
        start, "app:server", "--boot-timeout", 0.7, app=BOUND + FAULTS[fault], allow=[patterns.ANYTHING]
    )  # fmt: skip
    assert program.wait_exit(10).code in (1, 2, 4)
    program.finish(code=None)


AFTER_BIND = """
class Failing(prefork.PreforkUnixStreamServer):
    def __init__(self, address, handler=Handler):
        super().__init__(address, handler)

class Outer(Failing):
    def server_bind(self):
        super().server_bind()
        raise LookupError("ordered trouble")

class Base(socketserver.UnixStreamServer):
    def server_bind(self):
        super().server_bind()
        raise LookupError("ordered trouble")

class Inner(prefork.PreforkMixIn, Base):
    def __init__(self, address, handler=Handler):
        super().__init__(address, handler)

class Activate(Failing):
    def server_activate(self):
        raise LookupError("ordered trouble")
"""


@pytest.mark.parametrize("name", ["Outer", "Inner", "Activate"])
@pytest.mark.parametrize("how", ["command", "script"])
def test_a_server_that_fails_after_its_bind(start: Start, name: str, how: str) -> None:
    """So it is where the server's own methods fail after the bind, in a script, too."""
    if how == "command":
        program = command(start, f"app:{name}", "-b", "unix:{run}/s", app=AFTER_BIND, allow=[patterns.ANYTHING])
    else:
        program = launch(start, f"{AFTER_BIND}\n{name}(str(RUN / 's'))\n", allow=[patterns.ANYTHING])
    assert program.wait_exit(10).code != 0
    assert "ordered trouble" in program.log
    program.finish(code=None)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGQUIT])
def test_a_stop_while_a_path_is_bound(start: Start, notes: Notes, number: signal.Signals) -> None:
    """A stop that comes while the program is tried removes what that has bound. TERM and QUIT end the command with 0,
    as at any other time, INT with 130."""
    program = command(start, "app:server", app=BOUND + "pass_gate('never')")
    noted(notes, "bound")
    program.send(number)
    assert program.wait_exit(2).code == (130 if number == signal.SIGINT else 0)
    program.finish(code=None)


def test_somebody_elses_path_is_left_alone(start: Start, tmp_path: Path) -> None:
    """A start that finds another server on its path leaves that one's files."""
    first = command(start, "app:Handler", "-b", "unix:{run}/s", app="").ready()
    app = f"server = prefork.PreforkUnixStreamServer({str(first.run / 's')!r}, Handler)"
    second = command(start, "app:server", app=app, allow=[patterns.ANYTHING])
    assert second.wait_exit(10).code == 4 and "another server is running on this path" in second.log
    assert sorted(os.listdir(first.run)) == ["s", "s.lock"]
    second.finish(code=None)
    first.finish()


UNSHARE = ["unshare", "--pid", "--fork", "--mount-proc", "--kill-child"]
CONTAINER = (
    shutil.which("unshare") and not subprocess.run([*UNSHARE, "true"], capture_output=True, check=False).returncode
)


@pytest.mark.skipif(not CONTAINER, reason="needs a pid namespace of its own")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGQUIT])
def test_a_stop_of_process_1_while_a_path_is_bound(tmp_path: Path, number: signal.Signals) -> None:
    """As process 1 of a container, too, whose kernel ignores a signal that has no handler."""
    app = f"from kit import *\nRUN = Path({str(tmp_path)!r})\n{BOUND}pass_gate('never')\n"
    (tmp_path / "app.py").write_text(app)
    with subprocess.Popen(
        [*UNSHARE, sys.executable, "-m", "prefork", "app:server"],
        cwd=tmp_path, env={**os.environ, **path_of_modules()},
    ) as outer:  # fmt: skip
        try:
            until(lambda: (tmp_path / "s").exists(), 10, "it is bound")
            (master,) = children(outer.pid)
            assert any(title(pid) == "prefork: probe" for pid in children(master))
            os.kill(master, number)
            outer.wait(5)
            assert outer.returncode == (130 if number == signal.SIGINT else 0)
        finally:
            outer.kill()
    assert not list(tmp_path.glob("s*"))

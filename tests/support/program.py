"""A server as its users run it: a real process, watched from outside, and accounted for at its end."""

import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from . import patterns, processes
from .clients import Address
from .waiting import until

PROGRAMS = Path(__file__).resolve().parent.parent / "programs"


@dataclass(frozen=True)
class Exit:
    """How a program ended: its exit status (negative: the signal) and the seconds from the order to the end."""

    code: int
    seconds: float


class Program:
    """A started server program.

    `argv[0]` that ends in .py is a program of tests/programs; anything else is given to `python -m`. The process leads
    a session of its own; `{run}` in an argument is its directory for sockets, which must be empty in the end.

    Life: construct (it runs), `wait_for` a line or `ready()`, act, `finish()`. The directory (`log-1`, `out-1`, `run/`,
    `work/`, where it runs) is deleted by `forget()`, which the fixture `start` calls only for a test that passed.
    """

    def __init__(
        self,
        *argv: object,
        env: Mapping[str, str] | None = None,
        files: Mapping[str, str] | None = None,
        stderr: int | None = None,
        stdout: int | None = None,
        closed: Iterable[int] = (),
        stdin: bool = False,
        limits: Mapping[int, int] | None = None,
        directory: Path | None = None,
        allow: Iterable[str] = (),
    ) -> None:
        self.owns_directory = directory is None
        self.directory = directory or Path(tempfile.mkdtemp(prefix="prefork-"))
        self.run, self.work = self.directory / "run", self.directory / "work"
        self.run.mkdir(exist_ok=True)
        self.work.mkdir(exist_ok=True)
        self.age = 3600
        for name, text in (files or {}).items():
            self.write(name, text)
        words = [str(word).replace("{run}", str(self.run)).replace("{work}", str(self.work)) for word in argv]
        self.name = words[0]
        start = [str(PROGRAMS / words[0])] if words[0].endswith(".py") else ["-m", words[0]]
        self.argv = [sys.executable, *start, *words[1:]]
        self.allow = list(allow)
        self.finished = False
        # Several programs may share a directory, so as to meet on one path.
        number = sum(name.startswith("log") for name in os.listdir(self.directory)) + 1
        self.log_path, self.out_path = self.directory / f"log-{number}", self.directory / f"out-{number}"
        environment = {
            **os.environ,
            "PYTHONWARNINGS": "default",  # what a program leaves open shows on stderr, where nothing may show
            "PYTHONFAULTHANDLER": "1",  # so that `autopsy` shows where a stuck master is
            "PYTHONUNBUFFERED": "1",
            "PYTHONPATH": os.pathsep.join([str(PROGRAMS), *filter(None, [os.environ.get("PYTHONPATH")])]),
            **(env or {}),
        }

        def limit() -> None:
            for which, value in (limits or {}).items():
                resource.setrlimit(which, (value, value))
            for fd in closed:
                os.close(fd)

        self.begun = time.monotonic()
        with self.out_path.open("ab") as out, self.log_path.open("ab") as log:
            self.process = subprocess.Popen(
                self.argv,
                stdin=subprocess.PIPE if stdin else subprocess.DEVNULL,
                stdout=out if stdout is None else stdout,
                stderr=log if stderr is None else stderr,
                cwd=self.work,
                env=environment,
                start_new_session=True,
                preexec_fn=limit if limits or closed else None,
            )
        self.pid = self.process.pid

    # -- its directory

    def write(self, name: str, text: str) -> Path:
        """A file in its working directory, replaced atomically: a loader sees the old or the new.

        Each is two seconds younger than the last: compiled modules are told apart by size and whole seconds.
        """
        path = self.work / name
        new = path.with_name(path.name + ".new")
        new.write_text(text, encoding="utf-8")
        self.age -= 2
        os.utime(new, (time.time() - self.age,) * 2)
        new.replace(path)
        return path

    # -- its log

    @property
    def log(self) -> str:
        return self.log_path.read_text(encoding="utf-8", errors="replace")

    @property
    def mark(self) -> int:
        """A place in the log, for `wait_for(..., since=mark)`."""
        return self.log_path.stat().st_size

    def found(self, pattern: re.Pattern[str], since: int = 0) -> list[re.Match[str]]:
        with self.log_path.open("rb") as file:
            file.seek(since)
            return list(pattern.finditer(file.read().decode(errors="replace")))

    def wait_for(
        self, pattern: re.Pattern[str] | str, timeout: float = 5.0, since: int = 0, number: int = 1
    ) -> re.Match[str]:
        """The `number`th match in the log; a program that ends before is a failure at once."""
        compiled = re.compile(pattern) if isinstance(pattern, str) else pattern

        def seen() -> re.Match[str] | None:
            ended = self.process.poll() is not None
            matches = self.found(compiled, since)
            if len(matches) >= number:
                return matches[number - 1]
            assert not ended, f"{self.name} ended with {self.process.returncode} before {compiled.pattern!r}"
            return None

        match = until(seen, timeout, f"{compiled.pattern!r} x {number} in the log of {self.name}")
        assert match
        return match

    def ready(self, timeout: float = 10.0) -> "Program":
        self.wait_for(patterns.READY, timeout)
        return self

    @property
    def addresses(self) -> list[Address]:
        return [Address.parse(match[1]) for match in self.found(patterns.LISTENING)]

    @property
    def address(self) -> Address:
        self.wait_for(patterns.LISTENING)
        return self.addresses[0]

    def tell(self, text: str) -> None:
        """A line on the standard input of a program that was started with `stdin`."""
        assert self.process.stdin
        self.process.stdin.write(text.encode())
        self.process.stdin.close()

    # -- its processes

    @property
    def running(self) -> bool:
        return self.process.poll() is None

    def send(self, number: int, pid: int | None = None) -> None:
        """A signal to the master, or to a process of its session."""
        if pid is None:
            self.process.send_signal(number)
            return
        process = processes.read(pid)
        if process is None or process.session != self.pid:
            raise ProcessLookupError(pid)
        os.kill(pid, number)

    def kill_workers(self, *pids: int) -> None:
        """Kill -9, all at once; they are dead when this returns (until then one could still accept somebody)."""
        for pid in pids:
            self.send(signal.SIGKILL, pid)
        until(lambda: not any(map(processes.alive, pids)), 5.0, "the killed workers are dead", every=0.0005)

    def children(self) -> list[int]:
        """The pids of the living children of the master."""
        return processes.children(self.pid)

    def wait_children(self, number: int, timeout: float = 5.0, without: Iterable[int] = ()) -> list[int]:
        """The children, once there are exactly `number` and none of them is one of `without`."""
        gone = set(without)

        def settled() -> list[int] | None:
            pids = self.children()
            return pids if len(pids) == number and not gone.intersection(pids) else None

        pids = until(settled, timeout, f"{number} children of {self.name}")
        assert pids is not None
        return pids

    def wait_ready(self, number: int, timeout: float = 5.0, without: Iterable[int] = ()) -> list[int]:
        """Like `wait_children`, and each of them says in its title that it is ready."""
        gone = set(without)

        def settled() -> list[int] | None:
            pids = self.children()
            good = len(pids) == number and not gone.intersection(pids)
            return pids if good and all(patterns.TITLE_READY.search(processes.title(pid)) for pid in pids) else None

        pids = until(settled, timeout, f"{number} ready workers of {self.name}", every=0.002)
        assert pids is not None
        return pids

    def wait_exit(self, timeout: float = 5.0) -> Exit:
        begun = time.monotonic()
        until(lambda: self.process.poll() is not None, timeout, f"{self.name} ends", every=0.002)
        return Exit(self.process.returncode, time.monotonic() - begun)

    def stop(self, number: int = signal.SIGTERM, timeout: float = 10.0) -> Exit:
        """Send the signal and wait for the end; `seconds` is measured from the signal."""
        self.send(number)
        return self.wait_exit(timeout)

    def begin_stop(self) -> None:
        """TERM, until its log says that it stops."""
        self.send(signal.SIGTERM)
        self.wait_for(patterns.STOPPING)

    def reload(self, timeout: float = 20.0) -> None:
        """HUP, until its log says that the new generation serves."""
        mark = self.mark
        self.send(signal.SIGHUP)
        self.wait_for(patterns.RELOADED, timeout, since=mark)

    @contextmanager
    def flat(self, timeout: float = 3.0) -> Iterator[None]:
        """The master has as many descriptors of each kind after the block as before it, and no zombie."""
        before = processes.descriptors(self.pid)
        yield

        def grown() -> Counter[str]:
            return processes.descriptors(self.pid) - before

        until(lambda: not grown(), timeout, f"descriptors of {self.name} flat: {before}")
        self.check_no_zombie()

    def check_no_zombie(self) -> None:
        def none_left() -> bool:
            return not [entry for entry in processes.session(self.pid) if entry.is_zombie and self._is_ours(entry)]

        until(none_left, 2.0, f"no zombie under {self.name}")

    def _is_ours(self, entry: processes.Process) -> bool:
        """A zombie whose parent is outside of the session waits for init, which is nobody's fault here."""
        parent = processes.read(entry.parent)
        return parent is not None and parent.session == self.pid

    def remaining(self) -> list[processes.Process]:
        """The living processes of its session."""
        return [entry for entry in processes.session(self.pid) if not entry.is_zombie]

    # -- its end

    def finish(
        self,
        number: int = signal.SIGTERM,
        code: int | None = 0,
        timeout: float = 10.0,
        allow: Iterable[str] = (),
        leftovers: Iterable[str] = (),
        check_log: bool = True,
    ) -> Exit:
        """Stop it if it still runs, and check that nothing is wrong and nothing is left.

        `allow`: regexes of the lines that may be on stderr beside lines of the log. `leftovers`: names that may stay in
        its directory for sockets (of a program that was killed).
        """
        if self.running:
            self.check_no_zombie()
            end = self.stop(number, timeout)
        else:
            end = Exit(self.process.returncode, 0.0)
        if code is not None:
            assert end.code == code, f"{self.name} ended with {end.code}, not {code}"
        until(lambda: not self.remaining(), 2.0, f"no process of {self.name} is left")
        assert sorted(os.listdir(self.run)) == sorted(leftovers), f"{self.name} left files in its directory"
        if check_log:
            self.check_log(allow)
        self.finished = True
        return end

    def check_log(self, allow: Iterable[str] = ()) -> None:
        allowed = [re.compile(pattern) for pattern in (*self.allow, *allow)]
        strange = [
            line
            for line in self.log.splitlines()
            if not patterns.LOG_LINE.match(line) and not any(pattern.fullmatch(line) for pattern in allowed)
        ]
        assert not strange, f"unexpected on stderr of {self.name}: {strange[:10]}"

    def kill(self) -> None:
        """SIGKILL to everything in its session: a test that failed, or whose program is to die."""
        until(self._kill_all, 5.0, f"{self.name} killed")
        self.process.wait(5.0)
        if self.process.stdin:
            self.process.stdin.close()

    def _kill_all(self) -> bool:
        remaining = self.remaining()
        for entry in remaining:
            try:
                os.kill(entry.pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        self.process.poll()
        return not remaining

    def forget(self) -> None:
        if self.owns_directory:
            shutil.rmtree(self.directory, ignore_errors=True)

    def autopsy(self) -> str:
        """For the report of a failed test: its processes, where a stuck master is, and the end of its log."""
        lines = [f"$ {' '.join(self.argv)}", f"directory: {self.directory}"]
        for entry in processes.session(self.pid):
            where = processes.blocked_in(entry.pid)
            title = processes.title(entry.pid) or entry.name
            lines.append(f"  pid {entry.pid} of {entry.parent}: {entry.state} {where} {title}")
        lines += [f"  {count} x {kind}" for kind, count in sorted(processes.descriptors(self.pid).items())]
        if self.running:
            self.process.send_signal(signal.SIGABRT)  # the default of a master, under faulthandler: its stacks
            self._wait_quietly()
        lines.append(f"exit status: {self.process.poll()}")
        lines += self.log.splitlines()[-60:]
        out = self.out_path.read_text(errors="replace")
        return "\n".join(lines + ([f"stdout: {out}"] if out else []))

    def _wait_quietly(self) -> None:
        try:
            self.process.wait(2.0)
        except subprocess.TimeoutExpired:
            return


Start = Callable[..., Program]

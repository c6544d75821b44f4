"""For test suites of programs that serve from a pool: the pool runs in a process of its own, and can be harmed.

    with testing.pool(Server, Handler, workers=2) as pool:
        with pool.connect() as client:
            ...
        pool.kill_worker()
        pool.wait_ready()

The end of the block is a test, too: the pool is stopped by TERM, must exit with 0, leave no process behind, and have
logged no error beside those that the test brought about. Where that fails, or the block, the report shows the log.

With `pytest_plugins = ["prefork.testing"]` there is the fixture `prefork_pool`, called as `pool()` is; those pools end
with the test. pytest is no dependency of this module.

The pool is forked from the test's process, so that classes need not be importable, and dies with that process, however
it ends.
"""

import contextlib
import json
import mmap
import os
import re
import shutil
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Generator, Iterable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import psutil

import prefork.kernel.private_fds as private_fds
import prefork.kernel.processes as processes
import prefork.kernel.readiness as readiness
import prefork.kernel.standard_streams as standard_streams
import prefork.link.lifeline as lifeline
import prefork.testing.process as process

T = TypeVar("T")

_RECORD = re.compile(r"^(?=\d{4}-\d\d-\d\d [\d:,]+ \S+\[\d+\] [A-Z]+: |-{40}$)", re.MULTILINE)
_WRONG = re.compile(r"\S+ \S+ \S+ (ERROR|CRITICAL): |[^\0]*^Traceback \(most recent call last\)", re.MULTILINE)
_READY_TITLE = re.compile(r"prefork: worker \d+ .* ready$")


@contextlib.contextmanager
def pool(
    serve: Any,
    handler: Any = None,
    address: Any = None,
    *,
    timeout: float = 10.0,
    allow: Iterable[str] = (),
    **settings: Any,
) -> Iterator["Pool"]:
    """A pool that serves for the time of a `with` block.

    Parameters
    ----------
    serve
        A server class (without `PreforkMixIn` it gets it), or a callable that returns a server or several; it is given
        the address if it takes one argument. It is called in the pool's own process.
    handler
        For a class: the handler class, or the application where the workers' class serves one.
    address
        Where to listen. Default: a free port of loopback, or a Unix path that is removed afterwards.
    timeout
        Seconds for each wait: for the pool's start and end, and in each call of a method.
    allow
        Patterns of errors in the log that are no fault.
    settings
        Set on the server: `workers=2`, `request_timeout=1.0`, ...

    Raises
    ------
    AssertionError
        The pool does not become ready, or does not end well; with its log.
    """
    running = Pool(serve, handler, address, timeout, allow, settings)
    try:
        running.wait_for(r": pool ready: ")
        yield running
        running.stop()
        running.check()
    except BaseException as error:
        error.add_note(f"the log of the pool:\n{running.log}")
        raise
    finally:
        running.close()


class Pool:
    """A running pool, as `pool()` gives it.

    To be read: `address`, `pid` (of the master), `workers`, `log`, `exit_code` (once it has ended).
    """

    def __init__(
        self, serve: Any, handler: Any, address: Any, timeout: float, allow: Iterable[str], settings: dict[str, Any]
    ) -> None:
        standard_streams.fill()  # for the numbers of the pipes below
        self.timeout = timeout
        self.exit_code: int | None = None
        self._allowed = list(allow)
        self._hung: set[int] = set()
        self._directory = Path(tempfile.mkdtemp(prefix="prefork-"))
        self._log = self._directory / "log"
        self._refuse = mmap.mmap(-1, 1)  # shared with the child
        with private_fds.fork_lock():
            armed, self._lifeline = os.pipe()
            private_fds.add([self._lifeline])
        hear, tell = os.pipe()

        def main(unblock: Callable[[], None]) -> int:
            lifeline.arm(armed, main_thread=False)
            unblock()
            process.prepare(self._directory, self._refuse)
            return process.serve(lambda: process.make_servers(serve, handler, address, settings, self._directory), tell)

        try:
            self.pid = processes.fork(main, freeze=False)
            self._child = processes.Child(self.pid)
        finally:
            os.close(tell)
            os.close(armed)
        try:
            self._hear_address(hear)
        except BaseException as error:
            error.add_note(f"the log of the pool:\n{self.log}")
            self.close()
            raise

    # -- for the test ----------------------------------------------------------------------------------------------

    @property
    def log(self) -> str:
        """The log of the pool, with what it has written to its standard error and output."""
        return self._log.read_text(encoding="utf-8", errors="replace") if self._log.exists() else ""

    @property
    def workers(self) -> list[int]:
        """The pids of the workers, ready or not."""
        return sorted(worker.pid for worker in self._workers())

    def connect(self, timeout: float | None = None) -> socket.socket:
        """A client's socket, connected to the first server. `timeout`: of its calls; default: the pool's."""
        client = socket.socket(self._family, self._kind)
        try:
            client.settimeout(self.timeout if timeout is None else timeout)
            if self._family == socket.AF_UNIX and self._kind == socket.SOCK_DGRAM:
                client.bind(str(self._directory / f"client-{client.fileno()}-{time.monotonic_ns()}"))  # to be answered
            client.connect(self.address)
        except BaseException:
            client.close()
            raise
        return client

    def wait_for(self, pattern: str, *, number: int = 1) -> re.Match[str]:
        """The match of a regular expression in the log, once there are `number` of them: the last of these."""

        def seen() -> re.Match[str] | None:
            matches = list(re.finditer(pattern, self.log))
            if len(matches) < number:
                self._check_runs(f"logged {pattern!r}")
                return None
            return matches[number - 1]

        return self._until(seen, f"the log has {pattern!r}")

    def wait_ready(self, number: int, *, without: Iterable[int] = ()) -> list[int]:
        """The pids of the workers, once there are exactly `number`, all of them ready and none of `without`."""
        gone = set(without)

        def settled() -> list[int] | None:
            self._check_runs("had its workers")
            workers = self._workers()
            pids = sorted(worker.pid for worker in workers)
            is_settled = len(pids) == number and gone.isdisjoint(pids) and all(map(_is_ready, workers))
            return pids if is_settled else None

        return self._until(settled, f"{number} workers are ready")

    def kill_worker(self, pid: int | None = None) -> int:
        """Kill -9 a worker, by default the oldest; it is dead when this returns. Its pid."""
        victim = self._worker(pid)
        self.allow(rf"worker {victim.pid} \(")
        victim.kill()
        self._until(lambda: not _is_alive(victim), "the worker is dead")
        return victim.pid

    def hang_worker(self, pid: int | None = None) -> int:
        """Stop a worker where it is, by default the oldest, until `resume_worker()` or the end of the pool. Its pid."""
        victim = self._worker(pid)
        self.allow(rf"worker {victim.pid} \(")
        victim.suspend()
        self._hung.add(victim.pid)
        self._until(lambda: _status(victim) in (None, psutil.STATUS_STOPPED), "the worker hangs")
        return victim.pid

    def resume_worker(self, pid: int) -> None:
        """Let a worker that hangs go on, if it still lives."""
        self._hung.discard(pid)
        with contextlib.suppress(psutil.NoSuchProcess, AssertionError):
            self._worker(pid).resume()

    @contextlib.contextmanager
    def refuse_forks(self) -> Iterator[None]:
        """For the time of a `with` block the system refuses to fork for the master (EAGAIN)."""
        self.allow("no worker can be started: ")
        self.allow("cannot be tried")
        self._refuse[0] = 1
        try:
            yield
        finally:
            self._refuse[0] = 0

    def reload(self) -> None:
        """Have every worker replaced, and wait until the new generation serves."""
        done = r": reload(?: failed)?: .*"
        before = len(re.findall(r": reload(?: failed:|: generation \d+ serves)", self.log))
        self._child.send(signal.SIGHUP)
        line = self.wait_for(r": reload(?: failed:|: generation \d+ serves)", number=before + 1)
        assert "failed" not in line[0], re.findall(done, self.log)[-1]

    def allow(self, pattern: str) -> None:
        """Errors in the log in which the regular expression is found are no fault."""
        self._allowed.append(pattern)

    def errors(self) -> list[str]:
        """The errors and tracebacks in the log, without those that are allowed."""
        wrong = [record for record in _RECORD.split(self.log) if _WRONG.match(record)]
        return [record.strip() for record in wrong if not any(re.search(each, record) for each in self._allowed)]

    def stop(self) -> int:
        """Stop it gracefully and wait for its end; the exit code."""
        for pid in list(self._hung):
            self.resume_worker(pid)
        self._child.send(signal.SIGTERM)
        self._until(self._has_ended, "the pool has stopped")
        assert self.exit_code is not None
        return self.exit_code

    def check(self) -> None:
        """Check, after its end, that the pool ended well, left no process behind and logged no error."""
        assert self.exit_code == 0, f"the pool exited with {self.exit_code}"
        self._until(lambda: not self._session(), "no process of the pool is left")
        wrong = self.errors()
        assert not wrong, "\n".join(["the pool logged errors:", *wrong])

    def close(self) -> None:
        """Kill what is left of it, and remove its files."""
        if self.exit_code is None:
            self._child.send(signal.SIGKILL)
            self._child.await_exit()
            self.exit_code = -signal.SIGKILL
        deadline = time.monotonic() + self.timeout
        while (left := self._session()) and time.monotonic() < deadline:
            for remnant in left:
                with contextlib.suppress(psutil.NoSuchProcess):
                    remnant.kill()
            time.sleep(0.005)
        self._child.release()
        private_fds.close([self._lifeline])
        self._refuse.close()
        shutil.rmtree(self._directory, ignore_errors=True)

    # -- inside ----------------------------------------------------------------------------------------------------

    def _hear_address(self, fd: int) -> None:
        with open(fd, encoding="utf-8") as pipe:
            self._until(lambda: readiness.wait_readable(pipe.fileno(), 0.1), "the pool's server is made")
            told = pipe.read()
        if not told:
            self._until(self._has_ended, "the pool ends")
            raise AssertionError(f"the pool's server could not be made; it exited with {self.exit_code}")
        self._family, self._kind, where = json.loads(told)
        self.address: Any = where if isinstance(where, str) else tuple(where[:2])

    def _has_ended(self) -> bool:
        if self.exit_code is None and (ended := self._child.reap()) is not None:
            self.exit_code = -1 if ended[0] is None else ended[0]
        return self.exit_code is not None

    def _check_runs(self, before: str) -> None:
        assert not self._has_ended(), f"the pool exited with {self.exit_code} before it {before}"

    def _workers(self) -> list[psutil.Process]:
        """Its living children, oldest first."""
        workers = []
        with contextlib.suppress(psutil.NoSuchProcess):
            workers = [child for child in psutil.Process(self.pid).children() if _is_alive(child)]
        return sorted(workers, key=lambda worker: (worker.create_time(), worker.pid))

    def _worker(self, pid: int | None) -> psutil.Process:
        workers = [worker for worker in self._workers() if pid in (None, worker.pid)]
        assert workers, "the pool has no worker" if pid is None else f"{pid} is no worker of the pool"
        return workers[0]

    def _session(self) -> list[psutil.Process]:
        """The living processes that descend from the pool and have not left its session."""
        members = []
        for pid in psutil.pids():
            with contextlib.suppress(OSError, psutil.NoSuchProcess):
                if os.getsid(pid) == self.pid and _is_alive(member := psutil.Process(pid)):
                    members.append(member)
        return members

    def _until(self, predicate: Callable[[], T | None], what: str) -> T:
        deadline = time.monotonic() + self.timeout
        while True:
            late = time.monotonic() >= deadline
            if answer := predicate():
                return answer
            assert not late, f"not within {self.timeout:g} s: {what}"
            time.sleep(0.005)


def _status(process: psutil.Process) -> str | None:
    """None once the process was reaped, which may happen between any two looks at it."""
    try:
        return process.status() if process.is_running() else None
    except psutil.NoSuchProcess:
        return None


def _is_alive(process: psutil.Process) -> bool:
    return _status(process) not in (None, psutil.STATUS_ZOMBIE)


def _is_ready(worker: psutil.Process) -> bool:
    if sys.platform == "darwin":
        return True  # where workers have no titles
    try:
        return bool(_READY_TITLE.match(" ".join(worker.cmdline()).strip()))
    except psutil.Error:
        return False


if "pytest" in sys.modules:
    import pytest

    _POOLS = pytest.StashKey[list[Pool]]()

    @pytest.fixture
    def prefork_pool(request: pytest.FixtureRequest) -> Iterator[Callable[..., Pool]]:
        """`prefork_pool(Server, Handler, workers=2)`: a `Pool` that ends with the test, and is checked then."""
        with contextlib.ExitStack() as stack:
            pools = request.node.stash.setdefault(_POOLS, [])

            def start(*arguments: Any, **options: Any) -> Pool:
                running = stack.enter_context(pool(*arguments, **options))
                pools.append(running)
                return running

            yield start

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, Any, Any]:
        """A test that fails shows the logs of its pools."""
        report = yield
        if report.when == "call" and report.failed:
            report.sections += [(f"log of the pool {pool.pid}", pool.log) for pool in item.stash.get(_POOLS, [])]
        return report

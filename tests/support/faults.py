"""System calls of a running process that fail, as its kernel would have them fail: strace(1) puts the errors there."""

import os
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from .waiting import elapse, until


@contextmanager
def failing(pid: int, call: str, error: str, when: str = "1+") -> Iterator[None]:
    """In the block, calls of this name fail in all threads of the process. `when` is strace's: of each thread's calls
    the third (`3`), all from the third (`3+`), or every third (`3+3`).

    Where there is no strace, or no leave to trace, the test is skipped.
    """
    if not shutil.which("strace"):
        pytest.skip("needs the strace command")
    with tempfile.TemporaryFile("w+") as said:
        argv = ["strace", "-f", "-qq", "-o", "/dev/null", "-e", f"trace={call}", "-p", str(pid)]
        argv += ["-e", f"inject={call}:error={error}:when={when}"]
        with subprocess.Popen(argv, stderr=said, stdin=subprocess.DEVNULL) as strace:
            try:
                until(lambda: strace.poll() is not None or _is_traced(pid), 5, f"strace is attached to {pid}")
                if strace.poll() is not None:
                    said.seek(0)
                    pytest.skip(f"strace cannot trace here: {said.read().strip()}")
                yield
            finally:
                _detach(pid, strace)


def _detach(pid: int, strace: "subprocess.Popen[bytes]") -> None:
    """While the process is stopped. Let go in the middle of a call that is to fail, it would see ENOSYS."""
    try:
        os.kill(pid, signal.SIGSTOP)
    except ProcessLookupError:
        pass
    else:
        until(lambda: _is_stopped(pid), 5, f"{pid} is stopped")
        elapse(0.01)  # a call that is being stopped at has gone on by then, and come to the end
        until(lambda: _is_stopped(pid), 5, f"{pid} is stopped")
    strace.terminate()
    strace.wait(5)
    try:
        os.kill(pid, signal.SIGCONT)
    except ProcessLookupError:
        return
    until(lambda: not _is_traced(pid), 5, f"strace has let go of {pid}")


def _statuses(pid: int) -> list[str]:
    """What /proc says of each thread."""
    statuses = []
    try:
        for thread in os.listdir(f"/proc/{pid}/task"):
            with open(f"/proc/{pid}/task/{thread}/status", encoding="utf-8") as file:
                statuses.append(file.read())
    except (FileNotFoundError, ProcessLookupError):
        pass
    return statuses


def _is_traced(pid: int) -> bool:
    return all("TracerPid:\t0\n" not in status for status in _statuses(pid))


def _is_stopped(pid: int) -> bool:
    return all("State:\tt" in status.replace("\tT", "\tt") for status in _statuses(pid))

"""System calls of a running process that fail, as its kernel would have them fail: strace(1) puts the errors there."""

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from .waiting import until


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
                strace.terminate()
                strace.wait(5)
    until(lambda: not _is_traced(pid), 5, f"strace has let go of {pid}")


def _is_traced(pid: int) -> bool:
    """Whether every thread of it has a tracer."""
    tasks = []
    for thread in os.listdir(f"/proc/{pid}/task"):
        with open(f"/proc/{pid}/task/{thread}/status", encoding="utf-8") as file:
            tasks.append("TracerPid:\t0\n" not in file.read())
    return all(tasks)

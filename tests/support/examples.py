"""The examples that serve the world, and the clients that nobody here wrote."""

import os
import shutil
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from . import Address, Program

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
Start = Callable[..., Program]
PACKAGES = {
    "curl": "curl",
    "dig": "bind9-dnsutils",
    "logger": "bsdutils",
    "nc": "netcat-openbsd",
    "redis-benchmark": "redis-tools",
    "redis-cli": "redis-tools",
    "redis-server": "redis-server",
    "swaks": "swaks",
    "wrk": "wrk",
}


def tool(name: str) -> str:
    """The tool's path. CI has installed it; elsewhere its absence is a reason to skip."""
    found = shutil.which(name)
    if found is None:
        why = f"{name} is not installed (Debian's package {PACKAGES[name]})"
        if os.environ.get("CI"):
            pytest.fail(why)
        pytest.skip(why)
    return found


def run(*words: object, stdin: bytes = b"", code: int | None = 0, timeout: float = 30) -> str:
    """What a tool prints."""
    command = [tool(str(words[0])), *map(str, words[1:])]
    done = subprocess.run(command, input=stdin, capture_output=True, timeout=timeout, check=False)
    assert code is None or done.returncode == code, (command, done)
    return done.stdout.decode(errors="replace")


class Busy:
    """A tool at work in the background, until `result()`."""

    def __init__(self, *words: object) -> None:
        self.process = subprocess.Popen(
            [tool(str(words[0])), *map(str, words[1:])], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )

    def result(self, timeout: float = 30) -> str:
        try:
            out, _ = self.process.communicate(timeout=timeout)
        finally:
            self.process.kill()
            self.process.wait()
        assert self.process.returncode == 0, out
        return out


def reload(program: Program, workers: int) -> None:
    """A whole reload: every worker is another one afterwards."""
    old = program.children()
    program.send(signal.SIGHUP)
    program.wait_ready(workers, 15, without=old)


def tcp(port: int) -> Address:
    return Address("tcp", "127.0.0.1", port)

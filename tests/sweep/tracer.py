"""strace, attached to one process for the time of a phase."""

import functools
import os
import shutil
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path

from support import until
from support.processes import state
from sweep.faults import Fault

ATTACHED = "attached"


@functools.cache
def missing() -> str:
    """Why there is no fault injection here; empty if there is."""
    if sys.platform != "linux":
        return "system calls are made to fail by strace, which needs Linux"
    if not shutil.which("strace"):
        return "there is no strace (apt-get install strace)"
    command = ["strace", "-qq", "-e", "inject=getcwd:error=ENOENT:when=1..1", "-o", os.devnull, "true"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    return f"strace does not work here: {done.stderr.strip()}" if done.returncode else ""


class Tracer:
    """Traces `pid`, without its children, until `detach()`: its calls fail as the fault says, and are counted."""

    def __init__(self, pid: int, directory: Path, fault: Fault | None = None) -> None:
        self.fault, self._path, self._said = fault, directory / "trace", directory / "strace"
        chosen = ["-e", "trace=all"] if fault is None else ["-e", f"trace={fault.call}", "-e", fault.expression]
        command = ["strace", "-e", "signal=none", *chosen, "-o", str(self._path), "-p", str(pid)]
        with self._said.open("wb") as said:
            self._process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=said, stderr=said, start_new_session=True
            )
        until(self._attached, 10.0, f"strace traces {pid}")
        # It was waiting for something, and is to wait again, now seen by the tracer.
        until(lambda: state(pid) in ("S", "Z", ""), 10.0, f"{pid} goes on under strace")

    def _attached(self) -> bool:
        ended = self._process.poll() is not None
        text = self._said.read_text()
        assert ATTACHED in text or not ended, f"strace ended: {text}"
        return ATTACHED in text  # it may have ended since, and with it what it traced

    def detach(self) -> None:
        """End the fault. The process goes on."""
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)
            try:
                self._process.wait(5.0)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait(5.0)

    def counted(self) -> Counter[str]:
        """How often each call was made."""
        return Counter(line.partition("(")[0] for line in self._lines() if line[:1].isalpha())

    @property
    def injected(self) -> list[str]:
        """The calls that were made to fail, as strace shows them."""
        return [line for line in self._lines() if line.endswith("(INJECTED)")]

    def _lines(self) -> list[str]:
        return self._path.read_text(errors="replace").splitlines()

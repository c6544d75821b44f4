"""What a busy machine takes by itself: the control of the tests that measure.

A promise such as "within 100 ms" is one of the program, not of a machine on which other work waits for the same cores.
Beside the measurements stands what a process without prefork takes to end, in the same minute. A machine that is free
needs 5 ms for it. What is beyond `IDLE` is the machine's, and is allowed for `TIMES` over: a pool has that many steps.
"""

import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence

from .waiting import until

# Four children that wait; on TERM they are told, waited for, and the interpreter ends as any does. TERM is waited for
# while it is blocked: one that comes between "ready" and `signal.pause()` would be noted, and `pause()` sleep for ever.
BARE = """
import os, signal, sys

children = []
for _ in range(4):
    pid = os.fork()
    if pid == 0:
        while True:
            signal.pause()
    children.append(pid)
signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
print("ready", flush=True)
signal.sigwait([signal.SIGTERM])
for pid in children:
    os.kill(pid, signal.SIGTERM)
for pid in children:
    os.waitpid(pid, 0)
sys.exit(0)
"""
TIMES = 15
IDLE = 0.01  # seconds that it takes at most on a machine that is free


def bare_stop() -> float:
    """Seconds from TERM to the end of a bare process with four children, now."""
    with subprocess.Popen([sys.executable, "-c", BARE], stdout=subprocess.PIPE) as process:
        assert process.stdout and process.stdout.readline() == b"ready\n"
        begun = time.monotonic()
        process.send_signal(signal.SIGTERM)
        until(lambda: process.poll() is not None, 30.0, "the bare process ends", every=0.002)
        seconds = time.monotonic() - begun
    assert process.returncode == 0
    return seconds


def slack(controls: Sequence[float], of: Callable[[Sequence[float]], float]) -> float:
    """Seconds that the machine adds."""
    return TIMES * max(0.0, of(controls) - IDLE)


def within(seconds: float, limit: float) -> None:
    """A single measurement is within its limit; or the machine, measured at once, is as much slower as explains it."""
    if seconds > limit:
        controls = [bare_stop() for _ in range(7)]
        assert seconds <= limit + slack(controls, max), f"{seconds:.3f} s, not {limit:g} s; control: {controls}"


class Times:
    """Measurements of one thing, beside their control: each of the first ten, then every tenth."""

    def __init__(self, control: Callable[[], float] = bare_stop) -> None:
        self.seconds: list[float] = []
        self.controls: list[float] = []
        self._control = control

    def append(self, seconds: float) -> None:
        if len(self.seconds) < 10 or len(self.seconds) % 10 == 0:
            self.controls.append(self._control())
        self.seconds.append(seconds)

    def check(self, median: float, worst: float) -> None:
        """The median and the longest are within these seconds, and what the machine adds."""
        assert statistics.median(self.seconds) <= median + slack(self.controls, statistics.median), str(self)
        assert max(self.seconds) <= worst + slack(self.controls, max), str(self)

    def __str__(self) -> str:
        def row(numbers: Sequence[float]) -> str:
            return " ".join(f"{number * 1000:.0f}" for number in numbers)

        return f"ms: {row(self.seconds)}; control: {row(self.controls)}"

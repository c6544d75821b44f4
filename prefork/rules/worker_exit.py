"""Why a worker exited: as a value, as one line for the log, and as the code of that line."""

import enum
from dataclasses import dataclass
from signal import Signals

from prefork.errors import with_code

REQUEST_GOES_ON = "a request does not end"  # why a worker is recycled whose interrupt did not help


class Reason(enum.Enum):
    """Why a worker exited. The first group was ordered by the master, the second is the worker's own doing."""

    STOPPED = "the pool stops"
    RESIZED = "the pool shrinks"
    RELOADED = "a reload has replaced its generation"
    RECYCLED = "it was recycled"
    BOOT_TIMEOUT = "it was not ready within boot_timeout"
    REQUEST_TIMEOUT = "its request exceeded request_timeout"
    GRACEFUL_TIMEOUT = "it did not finish within graceful_timeout"

    BOOT_FAILED = "it failed before it was ready"
    LEFT = "a signal from outside told it to stop"
    EXITED = "it ended by itself"
    KILLED = "a signal killed it"

    @property
    def ordered(self) -> bool:
        """Whether the exit is part of the master's own plan, and so no fault of anybody."""
        return self in _ORDERED


_ORDERED = frozenset({Reason.STOPPED, Reason.RESIZED, Reason.RELOADED, Reason.RECYCLED, Reason.LEFT})

_CODES = {
    Reason.EXITED: "PF0201",
    Reason.REQUEST_TIMEOUT: "PF0206",
    Reason.BOOT_TIMEOUT: "PF0207",
    Reason.BOOT_FAILED: "PF0208",
    Reason.GRACEFUL_TIMEOUT: "PF0209",
    Reason.LEFT: "PF0210",
}
_RECYCLED = {"max_requests": "PF0211", "max_memory": "PF0212", "max_lifetime": "PF0213", REQUEST_GOES_ON: "PF0215"}
_CRASHES = {Signals[name] for name in ("SIGABRT", "SIGBUS", "SIGFPE", "SIGILL", "SIGSEGV", "SIGSYS", "SIGTRAP")}


def worker_name(pid: int, slot: int, generation: int) -> str:
    """A worker in a text of the log."""
    return f"worker {pid} (slot {slot}, generation {generation})"


@dataclass(frozen=True, slots=True)
class WorkerExit:
    """One worker's exit. Passed to `worker_exited()`; `str()` of it is the line in the log.

    status
        The exit code, the negative number of the signal that killed it (as `subprocess` has it), or None where somebody
        else in the process had reaped it.
    serving, busy_for
        The peer of the request it had in progress and for how many seconds, or None and 0.0.
    memory
        Peak resident memory in bytes, None where unknown.
    uptime
        Seconds from its fork to its end.
    detail
        What it said last: the traceback of a failed boot, the stacks of all threads of a hang or a crash.
    why
        The reason in the worker's own words, where it asked to leave: `max_memory: 312.4 MiB of 300.0 MiB`.
    """

    slot: int
    pid: int
    generation: int
    reason: Reason
    status: int | None
    serving: str | None
    busy_for: float
    requests: int
    memory: int | None
    uptime: float
    detail: str = ""
    why: str = ""

    def __str__(self) -> str:
        return with_code(self.text, self.code)

    @property
    def code(self) -> str:
        """The code of its message, for `prefork --explain`; "" where the exit is what was ordered."""
        ordered = self.reason.ordered
        if self.status is None:
            return "" if ordered else "PF0205"
        if self.status < 0 and self.reason in (Reason.KILLED, Reason.BOOT_FAILED):
            return "PF0203" if self.status == -Signals.SIGKILL else "PF0202" if -self.status in _CRASHES else "PF0204"
        if ordered and self.status:
            return "PF0216" if self.status < 0 else "PF0217"
        if self.reason is Reason.RECYCLED:
            return _RECYCLED.get(self.why.partition(":")[0], "PF0214")
        return _CODES.get(self.reason, "")

    @property
    def text(self) -> str:
        """The line in the log, without the code."""
        parts = [f"{worker_name(self.pid, self.slot, self.generation)} exited: {self.reason.value}"]
        if self.why:
            parts.append(f" ({self.why})")
        if self.status is None:
            parts.append(", exit status unknown (other code in the master collected it)")
        elif self.status < 0:
            parts.append(f", {_signal_name(-self.status)}")
        elif self.status or self.reason is Reason.EXITED:
            parts.append(f", exit code {self.status}")
        if self.serving is not None:
            parts.append(f", while serving {self.serving} for {self.busy_for:.3f} s")
        parts.append(f"; {self.requests} request{'' if self.requests == 1 else 's'} in {self.uptime:.1f} s")
        if self.memory is not None:
            parts.append(f", peak memory {self.memory / 1048576:.1f} MiB")
        return "".join(parts)


def _signal_name(number: int) -> str:
    try:
        return Signals(number).name
    except ValueError:
        return f"signal {number}"

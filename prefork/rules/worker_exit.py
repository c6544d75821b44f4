"""Why a worker left, as a value and as one line for the log."""

import enum
from dataclasses import dataclass
from signal import Signals


class Reason(enum.Enum):
    """Why a worker left. The first group was ordered by the master, the second is the worker's own doing."""

    STOPPED = "the pool stops"
    RESIZED = "the pool shrinks"
    RELOADED = "its generation was replaced"
    RECYCLED = "it was recycled"
    BOOT_TIMEOUT = "it was not ready within boot_timeout"
    REQUEST_TIMEOUT = "its request was past request_timeout"
    GRACEFUL_TIMEOUT = "it did not drain within graceful_timeout"

    BOOT_FAILED = "it failed before it was ready"
    LEFT = "it was told to leave by a signal from outside"
    EXITED = "it exited by itself"
    KILLED = "it was killed by a signal"

    @property
    def ordered(self) -> bool:
        """Whether the exit is part of the master's own plan, and so no fault of anybody."""
        return self in _ORDERED


_ORDERED = frozenset({Reason.STOPPED, Reason.RESIZED, Reason.RELOADED, Reason.RECYCLED, Reason.LEFT})


@dataclass(frozen=True, slots=True)
class WorkerExit:
    """One worker's death. Passed to `worker_exited()`; `str()` of it is the line in the log.

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
        parts = [f"worker {self.slot} (pid {self.pid}, generation {self.generation}) left: {self.reason.value}"]
        if self.why:
            parts.append(f" ({self.why})")
        if self.status is None:
            parts.append(", exit status unknown (reaped by somebody else)")
        elif self.status < 0:
            parts.append(f", {_signal_name(-self.status)}")
        elif self.status or self.reason is Reason.EXITED:
            parts.append(f", exit code {self.status}")
        if self.serving is not None:
            parts.append(f", while serving {self.serving} for {self.busy_for:.3f} s")
        parts.append(f"; {self.requests} request{'' if self.requests == 1 else 's'} in {self.uptime:.1f} s")
        if self.memory is not None:
            parts.append(f", peak {self.memory / 1048576:.1f} MiB")
        return "".join(parts)


def _signal_name(number: int) -> str:
    try:
        return Signals(number).name
    except ValueError:
        return f"signal {number}"

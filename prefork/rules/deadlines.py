"""Requests past their deadline: which workers to interrupt, and which to give up.

Pure: the master reads the deadlines off the scoreboard, and carries out the verdicts. Times are seconds on the
caller's monotonic clock.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Reading:
    """What one slot of the scoreboard says of the request in progress."""

    pid: int
    deadline: float | None  # None: there is no request, or it has none
    interrupted: bool  # the handler of this request has seen its RequestTimeout
    threads: int = 1  # that may keep the main thread, which answers signals, from the interpreter


@dataclass(slots=True)
class _Late:
    deadline: float  # tells which request it is: no two requests of a worker have the same
    since: float


@dataclass(slots=True)
class Verdicts:
    """What is to be done about requests that are past their deadline, by pid."""

    interrupt: list[int] = field(default_factory=list)
    condemn: list[int] = field(default_factory=list)


class Deadlines:
    """Judges requests by the deadlines that the workers publish.

    A request past its deadline is interrupted. A worker that does not notice within `GRACE` (it is inside a C call, or
    stopped) is condemned; a worker that did notice has `CLEANUP` for its `finally` blocks.
    """

    GRACE = 0.15  # seconds
    THREAD = 0.02  # more of it for each further thread: beside 16 that compute, a handler runs within 0.02-0.22 s
    CLEANUP = 2.0  # seconds

    def __init__(self) -> None:
        self.timeout: float | None = None  # seconds, the shortest of all that are to be judged
        self._late: dict[int, _Late] = {}
        self._amnesty = 0.0  # no request is due before this time

    def grant(self, now: float, seconds: float) -> None:
        """Judge no request before it has had the time that the master missed once more."""
        self._amnesty = max(self._amnesty, now + seconds)
        self._late.clear()

    def judge(self, now: float, readings: Iterable[Reading]) -> tuple[Verdicts, float | None]:
        """Return the verdicts, and when to look again (None: no timeout is set, never)."""
        verdicts = Verdicts()
        if self.timeout is None:
            return verdicts, None
        # A request that begins later than now cannot be due before this.
        again = now + self.timeout
        late_pids = set()
        for reading in readings:
            if reading.deadline is None:
                continue
            due = max(reading.deadline, self._amnesty)
            if now < due:
                again = min(again, due)
                continue
            late_pids.add(reading.pid)
            late = self._late.get(reading.pid)
            if late is None or late.deadline != reading.deadline:
                self._late[reading.pid] = late = _Late(reading.deadline, now)
                verdicts.interrupt.append(reading.pid)
            grace = self.CLEANUP if reading.interrupted else self.GRACE + self.THREAD * (reading.threads - 1)
            if now >= late.since + grace:
                verdicts.condemn.append(reading.pid)
            else:
                # Only a second look at the end of the grace tells whether the interrupt was noticed.
                again = min(again, late.since + grace)
        for pid in [pid for pid in self._late if pid not in late_pids]:
            del self._late[pid]
        return verdicts, again

"""Paces and limits, pure: no I/O, no clock of its own. `pool` asks it when, never how.

Times are seconds on the caller's monotonic clock.
"""

import random
from collections.abc import Iterable
from dataclasses import dataclass, field

FIRST_DELAY = 0.1  # after the first failure
LAST_DELAY = 10.0  # and at most
HEALTHY = 1.0  # a worker that served so long, or served anything, was no failure


@dataclass(slots=True)
class Backoff:
    """Doubling delays with jitter: 0.1 s to 10 s, each shortened by up to a fifth lest slots march in step."""

    failures: int = 0
    until: float = 0.0

    def failed(self, now: float, rng: random.Random) -> None:
        delay = min(LAST_DELAY, FIRST_DELAY * 2 ** min(self.failures, 16))
        self.failures += 1
        self.until = now + delay * (1 - 0.2 * rng.random())

    def reset(self) -> None:
        self.failures, self.until = 0, 0.0


def recycle_after(limit: int, jitter: int, rng: random.Random) -> int:
    """After how many requests one worker asks to be recycled; 0 is never."""
    return limit - rng.randint(0, jitter) if limit else 0


def lifetime(limit: float, rng: random.Random) -> float | None:
    """How many seconds one worker lives, shortened by up to a tenth so that a pool does not age together."""
    return limit * (1 - 0.1 * rng.random()) if limit else None


class Attention:
    """Notices that the master itself was not running (stopped, suspended, starved), and for how long.

    A deadline that passed while nobody looked proves nothing about the worker: it may have been stopped as well. The
    time that the master missed is granted to everybody once more. Seen in unicorn, which skips the killing when its
    last look is older than the timeout.
    """

    SLACK = 0.5  # being late by less is an ordinary busy machine

    def __init__(self) -> None:
        self._due: float | None = None

    def expect(self, due: float | None, turn: float) -> None:
        """The master goes to sleep and means to be back at `due` (None: whenever something happens).

        What was due before the `turn` that it has just made was looked at in it: it tells of no absence.
        """
        self._due = None if due is None else max(due, turn)

    def missed(self, now: float) -> float:
        """How late the master is, or 0.0 where it is no more than `SLACK`."""
        late = now - self._due if self._due is not None else 0.0
        self._due = None
        return late if late > self.SLACK else 0.0


@dataclass(frozen=True, slots=True)
class Reading:
    """What one slot of the scoreboard says of the request in hand."""

    pid: int
    deadline: float  # 0.0: none
    serial: int  # which request it is
    interrupted: bool  # the handler of this request has seen its RequestTimeout
    threads: int = 1  # that may keep the main thread, which answers signals, from the interpreter


@dataclass(slots=True)
class _Late:
    serial: int
    since: float


@dataclass(slots=True)
class Verdicts:
    """What is to be done about requests that are past their deadline."""

    interrupt: list[int] = field(default_factory=list)
    condemn: list[int] = field(default_factory=list)


class Deadlines:
    """Judges requests by the deadlines that the workers publish.

    A request past its deadline is interrupted. A worker that does not notice within `GRACE` (it is inside a C call, or
    stopped) is condemned; one that did notice has `CLEANUP` for its `finally` blocks.
    """

    GRACE = 0.15
    THREAD = 0.02  # more of it for each further thread: beside 16 that compute, a handler runs within 0.02-0.22 s
    CLEANUP = 2.0

    def __init__(self) -> None:
        self.timeout: float | None = None  # seconds, the shortest of all that are to be judged
        self._late: dict[int, _Late] = {}
        self._amnesty = 0.0

    def grant(self, now: float, seconds: float) -> None:
        """Judge nobody before the time that the master missed has been had once more."""
        self._amnesty = max(self._amnesty, now + seconds)
        self._late.clear()

    def judge(self, now: float, readings: Iterable[Reading]) -> tuple[Verdicts, float | None]:
        """Return the verdicts, and when to look again (None: no timeout is set, never)."""
        verdicts = Verdicts()
        if self.timeout is None:
            return verdicts, None
        # A request that begins later than now cannot be due before this.
        again = now + self.timeout
        seen = set()
        for one in readings:
            if not one.deadline:
                continue
            due = max(one.deadline, self._amnesty)
            if now < due:
                again = min(again, due)
                continue
            seen.add(one.pid)
            late = self._late.get(one.pid)
            if late is None or late.serial != one.serial:
                self._late[one.pid] = late = _Late(one.serial, now)
                verdicts.interrupt.append(one.pid)
            last = late.since + (self.CLEANUP if one.interrupted else self.GRACE + self.THREAD * (one.threads - 1))
            if now >= last:
                verdicts.condemn.append(one.pid)
            else:
                # Whether the interrupt was noticed is known only by looking once more at the end of the grace.
                again = min(again, last)
        for pid in [pid for pid in self._late if pid not in seen]:
            del self._late[pid]
        return verdicts, again

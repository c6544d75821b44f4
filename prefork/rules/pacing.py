"""Paces and limits: how long to wait after a failure, when to recycle, whether the master was away.

Pure: no I/O, no clock, no dice of its own. Times are seconds on the caller's monotonic clock.
"""

import random
from dataclasses import dataclass

FIRST_DELAY = 0.1  # seconds, after the first failure
LAST_DELAY = 10.0  # seconds, at most
JITTER = 0.2  # the share by which a delay may be shortened
AGE_JITTER = 0.1  # the share by which a worker's life may be shortened
HEALTHY = 1.0  # a worker that was ready for this time, or served anything, was no failure


@dataclass(slots=True)
class Backoff:
    """Doubling delays with jitter: 0.1 s to 10 s, each shortened by up to a fifth lest slots march in step."""

    failures: int = 0
    until: float = 0.0  # a time in the past: nothing is waited for

    def failed(self, now: float, rng: random.Random) -> None:
        delay = min(LAST_DELAY, FIRST_DELAY * 2 ** min(self.failures, 16))
        self.failures += 1
        self.until = now + delay * (1 - JITTER * rng.random())

    def reset(self) -> None:
        self.failures, self.until = 0, 0.0


def recycle_after(limit: int, jitter: int, rng: random.Random) -> int:
    """The number of requests after which one worker asks to be recycled; 0: never."""
    return limit - rng.randint(0, jitter) if limit else 0


def lifetime(limit: float, rng: random.Random) -> float | None:
    """Seconds that one worker lives, shortened by up to a tenth lest a pool age together; None: there is no limit."""
    return limit * (1 - AGE_JITTER * rng.random()) if limit else None


class Attention:
    """Notices that the master itself was not running (stopped, suspended, starved), and measures for how long.

    A deadline that passed while nobody looked proves nothing about the worker: it may have been stopped as well. All
    deadlines are extended by the time that the master missed. Seen in unicorn, which skips the killing when its last
    look is older than the timeout.
    """

    SLACK = 0.5  # seconds; an ordinary busy machine is late by less

    def __init__(self) -> None:
        self._due: float | None = None

    def expect(self, due: float | None, turn: float) -> None:
        """The master goes to sleep and means to wake at `due` (None: whenever something happens).

        What was due before the `turn` that has just ended was looked at in it, and is no sign of an absence.
        """
        self._due = None if due is None else max(due, turn)

    def missed(self, now: float) -> float:
        """Seconds by which the master is late; 0.0 where they are no more than `SLACK`."""
        late = now - self._due if self._due is not None else 0.0
        self._due = None
        return late if late > self.SLACK else 0.0

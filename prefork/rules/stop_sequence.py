"""How a pool stops, pure: no I/O, no clock. Signals and calls go in; what the master is to do comes out.

    SERVING --> SETTLING --> DRAINING --> FAST --> KILL

A stop only ever becomes harder, so a stage is never left for an earlier one; any stage may be skipped. `ESCALATION` is
what a signal, by its name, means in each stage; a test holds `docs/reference/signals.md` to it.

SETTLING
    New clients are kept out. Handshakes that had begun complete: a client may believe already that it is connected.
    The workers know nothing of it yet.
DRAINING
    The workers take the queue to its end, finish what they have, and leave.
FAST
    Workers leave now, also in the middle of a request.
KILL
    SIGKILL.
"""

import enum

SETTLE = 0.005  # seconds in which a handshake that has begun on this machine completes
HANDSHAKES = 0.25  # seconds to wait for those of distant clients, which the kernel shows as half-open
LAST_CALLS = 3  # workers that may be forked for the queue after all workers were lost in a stop


class Stage(enum.IntEnum):
    """How far the pool has come in stopping."""

    SERVING = 0
    SETTLING = 1
    DRAINING = 2
    FAST = 3
    KILL = 4


ESCALATION: dict[tuple[str, Stage], Stage] = {
    ("SIGTERM", Stage.SERVING): Stage.SETTLING,
    ("SIGTERM", Stage.SETTLING): Stage.FAST,
    ("SIGTERM", Stage.DRAINING): Stage.FAST,
    ("SIGTERM", Stage.FAST): Stage.FAST,
    ("SIGTERM", Stage.KILL): Stage.KILL,
    ("SIGINT", Stage.SERVING): Stage.FAST,
    ("SIGINT", Stage.SETTLING): Stage.FAST,
    ("SIGINT", Stage.DRAINING): Stage.FAST,
    ("SIGINT", Stage.FAST): Stage.KILL,
    ("SIGINT", Stage.KILL): Stage.KILL,
    ("SIGQUIT", Stage.SERVING): Stage.FAST,
    ("SIGQUIT", Stage.SETTLING): Stage.FAST,
    ("SIGQUIT", Stage.DRAINING): Stage.FAST,
    ("SIGQUIT", Stage.FAST): Stage.FAST,
    ("SIGQUIT", Stage.KILL): Stage.KILL,
}

PROGRESS = {Stage.SETTLING: Stage.DRAINING}  # what follows by itself, once handshakes have had their time


class StopSequence:
    """The stop of one pool.

    To be read: `stage`, `due` (when to call `settle()`, None where there is nothing to wait for).
    """

    def __init__(self) -> None:
        self.stage = Stage.SERVING
        self.due: float | None = None
        self._handshakes_until = 0.0
        self._queue_until: float | None = None  # None: not yet, or its end was seen
        self._last_calls = LAST_CALLS

    @property
    def begun(self) -> bool:
        return self.stage is not Stage.SERVING

    def rise(self, stage: Stage, now: float, *, handshakes: bool) -> bool:
        """Go on to a harder stage. Returns whether it is harder than the present stage.

        Parameters
        ----------
        handshakes
            There are listeners at which handshakes may have begun.
        """
        if stage <= self.stage:
            return False
        self.stage = stage
        self.due = None
        if stage is Stage.SETTLING:
            self.due = now + SETTLE if handshakes else now
            self._handshakes_until = now + HANDSHAKES
        return True

    def settle(self, now: float, *, half_open: bool, graceful_timeout: float) -> bool:
        """The time to wait for handshakes is over, or (`half_open`) some have not completed. Whether to drain now."""
        if self.stage not in PROGRESS or self.due is None or now < self.due:
            return False
        if half_open and now < self._handshakes_until:
            self.due = now + SETTLE
            return False
        self.stage, self.due = PROGRESS[self.stage], None
        self._queue_until = now + graceful_timeout
        return True

    def found_empty(self) -> None:
        """A worker left because the queue was empty."""
        self._queue_until = None

    def may_have_queue(self, now: float) -> bool:
        """Whether nobody has seen the end of the queue yet, and one more worker may be forked for it."""
        if self.stage is not Stage.DRAINING or self._queue_until is None:
            return False
        return now < self._queue_until and self._last_calls > 0

    def called(self) -> None:
        """A worker was forked for the queue."""
        self._last_calls -= 1

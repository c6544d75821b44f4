"""What a worker can be, seen from both sides, and how a reload goes on. The tables here are the design; `pool` and
`workers` only follow them, and `docs/diagrams.py` draws them.

The master's view (`State`) changes by events it saw itself. The worker's view (`Phase`) is what it writes into its slot
of the scoreboard; the master reads it as a hint (has the signal arrived?), never as a fact it relies on.
"""

import enum


class State(enum.Enum):
    """The master's view of one worker."""

    STARTING = "starting"  # forked, has not said that it is ready
    READY = "ready"  # serves
    RETIRING = "retiring"  # was asked to leave, or said that it leaves
    GONE = "gone"  # was reaped


class Event(enum.Enum):
    """What moves a worker from one state to the next."""

    BOOTED = "booted"
    RETIRED = "retired"
    EXITED = "exited"


TRANSITIONS: dict[tuple[State, Event], State] = {
    (State.STARTING, Event.BOOTED): State.READY,
    (State.STARTING, Event.RETIRED): State.RETIRING,
    (State.STARTING, Event.EXITED): State.GONE,
    (State.READY, Event.BOOTED): State.READY,
    (State.READY, Event.RETIRED): State.RETIRING,
    (State.READY, Event.EXITED): State.GONE,
    # The ready byte and the order to leave can cross on their way.
    (State.RETIRING, Event.BOOTED): State.RETIRING,
    (State.RETIRING, Event.RETIRED): State.RETIRING,
    (State.RETIRING, Event.EXITED): State.GONE,
}


class Phase(enum.IntEnum):
    """What a worker says of itself on the scoreboard. Busy or idle is told by its *busy since* cell, not here."""

    BOOTING = 0
    SERVING = 1
    DRAINING = 2  # the order to drain has arrived
    LEAVING = 3  # the order to leave at once has arrived


class Rollout(enum.Enum):
    """How far the pool has come with the next generation."""

    NONE = "none"  # every worker that is started is of the generation in force
    PROVING = "proving"  # one worker of the candidate is tried; the generation in force serves
    ROLLING = "rolling"  # the candidate is in force; workers of the former generation are replaced


class RolloutEvent(enum.Enum):
    """What moves a reload on."""

    ASKED = "asked"
    PROVEN = "proven"  # the candidate's worker is ready
    FAILED = "failed"  # the candidate's worker did not boot
    REPLACED = "replaced"  # no worker of a former generation may accept any more
    STOPPED = "stopped"  # the pool stops


ROLLOUT: dict[tuple[Rollout, RolloutEvent], Rollout] = {
    (Rollout.NONE, RolloutEvent.ASKED): Rollout.PROVING,
    # One more reload is remembered, and begins when this one is over.
    (Rollout.PROVING, RolloutEvent.ASKED): Rollout.PROVING,
    (Rollout.ROLLING, RolloutEvent.ASKED): Rollout.ROLLING,
    (Rollout.PROVING, RolloutEvent.PROVEN): Rollout.ROLLING,
    (Rollout.PROVING, RolloutEvent.FAILED): Rollout.NONE,
    (Rollout.ROLLING, RolloutEvent.REPLACED): Rollout.NONE,
    (Rollout.NONE, RolloutEvent.STOPPED): Rollout.NONE,
    (Rollout.PROVING, RolloutEvent.STOPPED): Rollout.NONE,
    (Rollout.ROLLING, RolloutEvent.STOPPED): Rollout.NONE,
}

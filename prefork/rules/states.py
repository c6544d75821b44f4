"""What a worker can be, seen from both sides. The tables here are the design; `pool` and `workers` only follow them.

The master's view (`State`) changes by events it saw itself. The worker's view (`Phase`) is what it writes into its slot
of the scoreboard; the master reads it as a hint (has it understood the signal?), never as a fact it relies on.
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
    DRAINING = 2  # the order to drain was understood
    LEAVING = 3  # the order to leave at once was understood

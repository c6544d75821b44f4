"""The context that the master gives to a new worker, and the one signal that only the two of them know."""

import signal
from dataclasses import dataclass

import prefork.link.scoreboard as scoreboard
from prefork.settings.settings import Options

# The master's order to interrupt a request. The signal is portable (real-time signals are not). It is harmless where a
# CPU limit sends it: the handler looks at the deadline itself.
INTERRUPT = signal.SIGXCPU


@dataclass(frozen=True, slots=True)
class WorkerContext:
    """The worker before it begins: what the master gives to it, all of it inherited by the fork."""

    slot: int
    generation: int
    options: Options
    board: scoreboard.Slot
    lifeline_read: int
    uplink_write: int
    token: bytes  # of its messages on the uplink
    main_thread: bool  # the main thread of the master has forked this worker
    title: str
    seed: int

"""A child's life from the fork to its exit code, whatever class of worker it becomes; and what a process of a pool does
about its own title, memory and logs.

Nothing in it waits on the lifeline: when the master dies the kernel kills the child.
"""

import faulthandler
import gc
import os
import signal
import sys
import traceback
import types
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import prefork.lifeline as lifeline
import prefork.logs as logs
import prefork.scoreboard as scoreboard
from prefork.options import Options

# The master's order to interrupt a request. Portable (real-time signals are not), and harmless where a CPU limit sends
# it: the handler looks at the deadline itself.
INTERRUPT = signal.SIGXCPU


@dataclass(frozen=True, slots=True)
class Seat:
    """What the master gives to a new worker: all of it is inherited by the fork."""

    slot: int
    generation: int
    options: Options
    board: scoreboard.Slot
    lifeline_read: int
    uplink_write: int
    token: bytes  # of its messages on the uplink
    main_thread: bool  # forked by the main thread of the master
    title: str
    seed: int


class Life(Protocol):
    """What the child becomes: a worker."""

    def live(self) -> int: ...


def main(seat: Seat, build: Callable[[Seat], Life], unblock: Callable[[], None]) -> int:
    """The child's whole life, given to `processes.fork`. Returns its exit code."""
    uplink = lifeline.Uplink(seat.uplink_write, seat.token)

    def leave(signum: int, frame: types.FrameType | None) -> None:
        uplink.say(lifeline.LEAVES)
        os._exit(0)

    lifeline.arm(seat.lifeline_read, main_thread=seat.main_thread)
    logs.enter_child()
    # The stacks of a hang (ABRT) or a crash (SIGSEGV and its like) go into the report of this worker's death.
    faulthandler.enable(file=seat.uplink_write, all_threads=True)
    for one in (signal.SIGINT, signal.SIGHUP, signal.SIGTTIN, signal.SIGTTOU, signal.SIGWINCH, INTERRUPT):
        # Not a handler that does nothing: handlers run on the small stack that faulthandler made for this thread, one
        # on top of the other, and six pending signals overflow it.
        signal.signal(one, signal.SIG_IGN)
    for one in (signal.SIGTERM, signal.SIGQUIT):
        signal.signal(one, leave)  # until there is a worker to ask
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    set_title(f"{seat.title} starting")
    unblock()
    try:
        return build(seat).live()
    except SystemExit as left:
        return exit_code(left)
    except BaseException:
        uplink.tell(traceback.format_exc())  # the master puts it into the report, and the log
        return 1


def exit_code(left: SystemExit) -> int:
    """What the interpreter makes of a SystemExit."""
    if left.code is None:
        return 0
    if isinstance(left.code, int):
        return left.code & 0xFF
    print(left.code, file=sys.stderr)
    return 1


def own_memory() -> int:
    """Bytes that would be freed if this process ended (USS), or its resident set where that is not known."""
    import psutil

    process = psutil.Process()
    try:
        info: Any = process.memory_full_info()
        return int(getattr(info, "uss", info.rss))
    except psutil.Error:
        return int(process.memory_info().rss)


def prepare(*, memory: bool) -> None:
    """In the master, before the first fork: import what every worker would import, and leave no garbage to copy."""
    gc.collect()
    lifeline.prepare()
    if sys.platform != "darwin":
        import setproctitle  # noqa: F401
    if memory:
        import psutil  # noqa: F401


def set_title(title: str) -> None:
    """Show up in ps and top. Off on macOS, where setproctitle after a fork crashes the child."""
    if sys.platform != "darwin":
        import setproctitle

        setproctitle.setproctitle(title)

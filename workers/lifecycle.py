"""A child's life from the fork to its exit code, whatever class of worker it becomes.

Nothing in it waits on the lifeline: when the master dies the kernel kills the child.
"""

import faulthandler
import functools
import gc
import signal
import sys
import traceback
import types
import warnings
from _thread import get_ident, start_new_thread
from collections.abc import Callable
from time import sleep
from typing import Protocol

import prefork.kernel.exit_handlers as exit_handlers
import prefork.kernel.logs as logs
import prefork.link.lifeline as lifeline
import prefork.link.scoreboard as scoreboard
from prefork.kernel.own_process import set_title
from prefork.link.uplink import EXITS, LEAVES, UplinkWriter
from prefork.link.worker_context import INTERRUPT, WorkerContext


class Life(Protocol):
    """The worker that the child becomes."""

    draining: bool
    _board: scoreboard.Slot  # in a process that the program forked, a slot that nobody reads
    _ready: bool  # it is ready, or was
    _stuck: bool  # a thread of it does not end

    def live(self) -> int: ...


class ToldToLeave(SystemExit):
    """Raised in a child that is told to leave before it is ready. It has served nobody yet, so nothing is cut off.

    It ends the boot, whose `finally` blocks and `atexit` functions run. Where the program swallows it, or it does not
    come through, the master kills the child.
    """


ABANDONED = 0.5  # seconds for which a child whose boot has failed waits for the threads that it has started


def main(context: WorkerContext, build: Callable[[WorkerContext], Life], unblock: Callable[[], None]) -> int:
    """The child's whole life, given to `processes.fork`. Returns its exit code."""
    uplink = UplinkWriter(context.uplink_write, context.token)
    life: Life | None = None
    lifeline.arm(context.lifeline_read, main_thread=context.main_thread)
    logs.enter_child()
    # The stacks of a hang (ABRT) or a crash (SIGSEGV and its like) go into the report of this worker's death.
    faulthandler.enable(file=context.uplink_write, all_threads=True)
    for number in (signal.SIGINT, signal.SIGHUP, signal.SIGTTIN, signal.SIGTTOU, signal.SIGWINCH, INTERRUPT):
        # Not a handler that does nothing: handlers run on the small stack that faulthandler made for this thread, each
        # on top of the one before, and six pending signals overflow it.
        signal.signal(number, signal.SIG_IGN)
    told = leave_if_told(lambda: life)  # until there is a worker that is ready
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    set_title(f"{context.title} starting")
    try:
        unblock()
        life = build(context)
        if told:
            raise ToldToLeave
        code = life.live()
    except BaseException as error:
        if told:  # whatever the program has made of that
            uplink.say(LEAVES)
            code = 0
        elif isinstance(error, SystemExit):
            code = exit_code(error)
        else:
            uplink.tell(traceback.format_exc())  # the master puts it into the report, and the log
            code = 1
    if not exit_handlers.is_own():
        # A process that the program has forked comes here by an exception. Connections that it shares with the worker
        # may be garbage in it; a collection would warn that they are not closed.
        gc.disable()
        return code
    if told or life is None or not life._ready:
        for number in (signal.SIGTERM, signal.SIGQUIT):
            signal.signal(number, signal.SIG_IGN)
        exit_handlers.run(ABANDONED)
    else:
        life.draining = True  # it takes no orders but to hurry
        signal.signal(INTERRUPT, signal.SIG_IGN)
        life._board.floats[scoreboard.DEADLINE] = 0.0  # of a request that has ended it
        if exit_handlers.pending():
            uplink.say(EXITS)  # the master sees to it that this ends
        exit_handlers.run(0.0 if life._stuck else None, late=uplink.tell)
    return code


def leave_if_told(life: Callable[[], Life | None] = lambda: None) -> list[int]:
    """Have TERM and QUIT raise `ToldToLeave`, once. Returns a list that receives the signal that came."""
    told: list[int] = []
    swallowed = False

    def leave(signum: int, frame: types.FrameType | None) -> None:
        nonlocal swallowed
        if frame is not None and frame.f_code.co_filename.startswith("<frozen importlib"):
            # This may be a callback of a weak reference, which must come to its end: it holds a lock. So the signal
            # comes again from another thread, after it: from here its handler would run before this one returns.
            start_new_thread(_send_again, (get_ident(), signum))
        elif swallowed or not told:
            if not told:
                sys.unraisablehook = functools.partial(again, sys.unraisablehook)
                warnings.simplefilter("ignore")  # of files that are not closed, and coroutines that are not awaited
            swallowed = False
            told.append(signum)
            if (worker := life()) is not None:
                worker.draining = True
            raise ToldToLeave

    def again(former: Callable[["sys.UnraisableHookArgs"], object], ignored: "sys.UnraisableHookArgs") -> None:
        """A `__del__`, or a callback of C, has swallowed the exception: it is raised once more, when that is over."""
        nonlocal swallowed
        if ignored.exc_type is not ToldToLeave:
            former(ignored)
            return
        swallowed = True
        start_new_thread(_send_again, (get_ident(), told[-1]))

    for number in (signal.SIGTERM, signal.SIGQUIT):
        signal.signal(number, leave)
    return told


def _send_again(thread: int, signum: int) -> None:
    sleep(0.001)
    signal.pthread_kill(thread, signum)


def exit_code(left: SystemExit) -> int:
    """What the interpreter makes of a SystemExit."""
    if left.code is None:
        return 0
    if isinstance(left.code, int):
        return left.code & 0xFF
    print(left.code, file=sys.stderr)
    return 1

"""The lifeline: a pipe whose end-of-file kills a worker, so that it dies with its master.

The master alone holds the write end. The worker arms the read end so that the kernel signals it when the last write end
is closed, whatever the worker is doing then. On Linux that signal is SIGKILL itself (`F_SETSIG`, fcntl(2)), which also
reaches a worker that spins in C, is stopped, or masks everything. Elsewhere it is SIGIO and a handler that leaves.

A program that closes every descriptor closes the lifeline too. So there is a second guard, which needs no descriptor:
PR_SET_PDEATHSIG (prctl(2), Linux). It is only the second, because a change of the user id clears it, and
because it fires when the forking *thread* ends: only a fork by the main thread arms it.
"""

import contextlib
import fcntl
import os
import select
import signal
import sys
from collections.abc import Callable

_PR_SET_PDEATHSIG = 1
_prctl: Callable[[int, int], int] | None = None


def prepare() -> None:
    """In the master, before its first fork: find the system call of the second guard."""
    global _prctl
    if sys.platform == "linux" and _prctl is None:
        with contextlib.suppress(Exception):  # a Python that was built without ctypes
            import ctypes

            _prctl = ctypes.CDLL(None).prctl


def arm(lifeline_read: int, *, main_thread: bool) -> None:
    """In the worker: die with the master, from now on. If it is dead already, die now.

    Parameters
    ----------
    main_thread
        The main thread of the master has forked this process, so the end of the forking thread is that of the master.
    """
    if main_thread and _prctl is not None:
        _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if hasattr(fcntl, "F_SETSIG"):
        fcntl.fcntl(lifeline_read, fcntl.F_SETSIG, signal.SIGKILL)
    else:  # no choice of the signal here; the handler is as near as it gets
        signal.signal(signal.SIGIO, lambda *_: os._exit(1))
    fcntl.fcntl(lifeline_read, fcntl.F_SETOWN, os.getpid())
    flags = fcntl.fcntl(lifeline_read, fcntl.F_GETFL)
    fcntl.fcntl(lifeline_read, fcntl.F_SETFL, flags | os.O_ASYNC)
    # The master may have died between the fork and this line; then no signal will come.
    poll = select.poll()
    poll.register(lifeline_read, 0)
    if poll.poll(0):
        os._exit(1)

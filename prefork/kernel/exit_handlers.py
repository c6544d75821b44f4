"""The end of a child as Python ends a process: threads that are no daemons are waited for, `atexit` functions run.

What was registered before the fork is the parent's, and runs there. What the child registers runs in the child; so the
modules that register something when they are imported have it registered once more, for they may have been imported
before. Afterwards the child leaves by `os._exit`, as children of `multiprocessing` do: unwinding the stack instead
would run the parent's `finally` blocks, and tearing the interpreter down would close what the child has in common with
its parent.
"""

import atexit
import logging
import os
import sys
import threading
import traceback
import weakref
from collections.abc import Callable

_LATE = 1.0  # seconds of waiting for threads after which somebody is told

_pid = 0  # of the child whose end this is; one that it forks itself ends as whoever forked it likes
_registered = 0


def forget() -> None:
    """In the child, right after the fork."""
    global _pid, _registered
    _pid = os.getpid()
    atexit._clear()
    for one in list(weakref.finalize._registry):  # type: ignore[attr-defined]
        one.atexit = False
    weakref.finalize._registered_with_atexit = False  # type: ignore[attr-defined]
    logging._handlerList.clear()  # type: ignore[attr-defined]
    atexit.register(logging.shutdown)
    for name, attribute in _OF_THE_PARENT:
        if module := sys.modules.get(name):
            getattr(module, attribute, {}).clear()
    if module := sys.modules.get("multiprocessing.util"):
        atexit.register(module._exit_function)
    _registered = atexit._ncallbacks()


# What these modules would end: threads that are not here, and processes that are not this one's.
_OF_THE_PARENT = (
    ("concurrent.futures.thread", "_threads_queues"),
    ("concurrent.futures.process", "_threads_wakeups"),
    ("multiprocessing.process", "_children"),
)


def is_own() -> bool:
    """Whether this is the child whose end this is, and not a process that the program has forked from it."""
    return os.getpid() == _pid


def pending() -> bool:
    """Whether the program has left something to be done, or waited for."""
    return atexit._ncallbacks() > _registered or bool(_threads())


def run(patience: float | None = None, late: Callable[[str], None] | None = None) -> None:
    """End as Python does, up to the point where modules are torn down. The caller leaves by `os._exit`.

    Parameters
    ----------
    patience
        Seconds for which threads are waited for; None: for as long as they take.
    late
        Is told after a second which threads are waited for.
    """
    global _pid
    if not is_own():
        return
    _pid = 0
    names = _threads()
    if names and patience is None and late is not None:
        timer = threading.Timer(_LATE, lambda: late(f"at its end it waits for threads: {', '.join(_threads())}\n"))
        timer.daemon = True
        timer.start()
    if patience is None:
        _end_threads()
    elif names and patience:
        waiting = threading.Thread(target=_end_threads, daemon=True)
        waiting.start()
        waiting.join(patience)
    atexit._run_exitfuncs()


def _threads() -> list[str]:
    """Names of those that the interpreter would wait for."""
    return [one.name for one in threading.enumerate() if not one.daemon and one is not threading.main_thread()]


def _end_threads() -> None:
    try:
        threading._shutdown()  # type: ignore[attr-defined]
    except BaseException:
        traceback.print_exc()

"""The end of a child as Python ends a process: threads that are no daemons are waited for, `atexit` handlers run.

Handlers that were registered before the fork are the parent's, and run there. Handlers that the child registers run in
the child. Some modules register handlers when they are imported. They may have been imported before the fork, so these
handlers are registered once more.

Afterwards the child leaves by `os._exit`, as children of `multiprocessing` do. Unwinding the stack instead would run
the parent's `finally` blocks. Tearing the interpreter down would close what the child has in common with its parent.
"""

import atexit
import logging
import os
import sys
import threading
import traceback
import weakref
from collections.abc import Callable

_LATE = 1.0  # seconds of waiting for threads after which `late` is called

_pid = 0  # of the child that ends here; a process that it forks itself ends in another way
_registered = 0  # handlers that `forget()` has registered


def forget() -> None:
    """In the child, right after the fork: drop the handlers of the parent."""
    global _pid, _registered
    _pid = os.getpid()
    atexit._clear()
    for finalizer in list(weakref.finalize._registry):  # type: ignore[attr-defined]
        finalizer.atexit = False
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
    """Whether the program has registered a handler, or has left a thread to wait for."""
    return atexit._ncallbacks() > _registered or bool(_thread_names())


def run(patience: float | None = None, late: Callable[[str], None] | None = None) -> None:
    """End as Python does, up to the point where modules are torn down. The caller leaves by `os._exit`.

    Parameters
    ----------
    patience
        Seconds for which threads are waited for; None: for as long as they take.
    late
        Is called after a second with a line of the log that names the threads.
    """
    global _pid
    if not is_own():
        return
    _pid = 0
    names = _thread_names()
    if names and patience is None and late is not None:
        timer = threading.Timer(
            _LATE, lambda: late(f"at its end it waits for these threads: {', '.join(_thread_names())}\n")
        )
        timer.daemon = True
        timer.start()
    if patience is None:
        _end_threads()
    elif names and patience:
        waiting = threading.Thread(target=_end_threads, daemon=True)
        waiting.start()
        waiting.join(patience)
    atexit._run_exitfuncs()


def _thread_names() -> list[str]:
    """Names of the threads that the interpreter would wait for."""
    main = threading.main_thread()
    return [thread.name for thread in threading.enumerate() if not thread.daemon and thread is not main]


def _end_threads() -> None:
    try:
        threading._shutdown()  # type: ignore[attr-defined]
    except BaseException:
        traceback.print_exc()

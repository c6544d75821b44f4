"""Standard modules as they were when prefork was imported, for code that runs beside a program which patches them.

`gevent.monkey` takes `epoll` out of `select`, and makes greenlets of threads and of waits. Modules that are imported
from here keep the functions of before. That is not enough for threads, which find the patched functions by themselves,
nor for an event loop of asyncio: `refuse_patched()` is for those.
"""

import select
import socket
import sys
import time
import types
from typing import TYPE_CHECKING

from prefork.errors import OptionError


def refuse_patched(names: tuple[str, ...], what: str, mend: str) -> None:
    """Refuse a program that has patched one of these standard modules.

    Parameters
    ----------
    what, mend
        What does not work then, and what does.

    Raises
    ------
    OptionError
        The program has patched such a module.
    """
    gevent = sys.modules.get("gevent.monkey")
    patched = [name for name in names if gevent is not None and gevent.is_module_patched(name)]
    if patched:
        raise OptionError(
            f"the program has patched {' and '.join(patched)} (gevent.monkey); {what} does not work with that; {mend}",
            code="PF0108",
        )


if not TYPE_CHECKING:

    def _copy(module):
        copy = types.ModuleType(module.__name__, module.__doc__)
        copy.__dict__.update(vars(module))
        return copy

    select, socket, time = _copy(select), _copy(socket), _copy(time)

__all__ = ["refuse_patched", "select", "socket", "time"]

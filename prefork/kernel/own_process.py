"""This process: its title in ps and top, its memory."""

import gc
import sys
from typing import Any


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
    if sys.platform != "darwin":
        import setproctitle  # noqa: F401
    if memory:
        import psutil  # noqa: F401


def set_title(title: str) -> None:
    """Show up in ps and top. Off on macOS, where setproctitle after a fork crashes the child."""
    if sys.platform != "darwin":
        import setproctitle

        setproctitle.setproctitle(title)

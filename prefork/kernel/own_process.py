"""This process: its title in ps and top, and what it does before it forks."""

import gc
import sys


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

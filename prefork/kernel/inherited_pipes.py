"""Pipes that a child inherits by accident.

Another thread of the program may be inside `subprocess.Popen` at the fork. It waits for its exec on a pipe. A child
that kept the write end of that pipe would make it wait for as long as the child lives.

The master takes a `snapshot()` when it begins. A child keeps the pipes that are in it, as the program may mean it.
"""

import contextlib
import os
import stat
from collections.abc import Iterable

from prefork.kernel.dev_null import open_null


def snapshot() -> set[tuple[int, int]]:
    """The pipes that are open now beside the standard streams, by descriptor and inode; none where /proc is missing."""
    pipes = set()
    with contextlib.suppress(OSError):
        for fd in map(int, os.listdir("/proc/self/fd")):
            with contextlib.suppress(OSError):
                status = os.fstat(fd)
                if fd > 2 and stat.S_ISFIFO(status.st_mode):
                    pipes.add((fd, status.st_ino))
    return pipes


def drop(known: set[tuple[int, int]], keep: Iterable[int]) -> None:
    """In a child: put /dev/null in the place of every pipe that is neither `known` nor to be kept.

    Closing them instead would give their numbers away, and objects in the child may still own those.
    """
    strangers = {fd for fd, _ in snapshot() - known}.difference(keep)
    if strangers:
        null = open_null()
        for fd in strangers:
            os.dup2(null, fd, inheritable=False)
        os.close(null)

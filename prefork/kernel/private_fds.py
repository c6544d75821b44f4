"""Descriptors that no child may keep.

The master registers its own descriptors with `add()`. They are closed in every child of this process that is a fork
without an exec. That includes forks which the host program makes, or another pool in this process: with the write end
of a lifeline a child would keep orphans alive.

The set of these descriptors is module state, because descriptors belong to the process and not to a pool.
"""

import contextlib
import os
import threading
from collections.abc import Iterable, Iterator

_private: set[int] = set()
# Held while descriptors are made and registered, and during a fork: no child can come between the two.
_lock = threading.RLock()


@contextlib.contextmanager
def fork_lock() -> Iterator[None]:
    """Keep `processes.fork()` out: what is opened inside can be registered before the next fork."""
    with _lock:
        yield


def add(fds: Iterable[int]) -> None:
    """Register descriptors that no child may keep."""
    _private.update(fds)


def close(fds: Iterable[int]) -> None:
    """Close descriptors and forget that they were private."""
    for fd in fds:
        _private.discard(fd)
        with contextlib.suppress(OSError):
            os.close(fd)


def forget(fds: Iterable[int]) -> None:
    """Unregister descriptors that their owner is about to close."""
    _private.difference_update(fds)


def _after_fork() -> None:
    global _lock
    _lock = threading.RLock()
    fds = sorted(_private)
    _private.clear()
    while fds:  # in runs: a pool of 256 has 768 of them
        run = next((n for n, fd in enumerate(fds) if fd != fds[0] + n), len(fds))
        os.closerange(fds[0], fds[0] + run)
        del fds[:run]


os.register_at_fork(after_in_child=_after_fork)

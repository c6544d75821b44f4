"""The only place where a test waits."""

import select
import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


def until(predicate: Callable[[], T], timeout: float = 5.0, what: str = "", every: float = 0.004) -> T:
    """Return the first true answer of `predicate`, or fail after `timeout` seconds with its last answer.

    It is asked once more after the deadline, so that a test process that was not scheduled is no failure.
    """
    deadline = time.monotonic() + timeout
    while True:
        late = time.monotonic() >= deadline
        answer = predicate()
        if answer:
            return answer
        if late:
            raise AssertionError(f"not within {timeout:g} s: {what or predicate!r} (last answer: {answer!r})")
        select.select([], [], [], every)


def elapse(seconds: float) -> None:
    """Let time itself pass: for what must *not* happen within it, or for a rate measured over it."""
    end = time.monotonic() + seconds
    until(lambda: time.monotonic() >= end, seconds + 5, "time passes", every=0.02)

"""The loggers of prefork, which work whatever a program does to logging, and never make a master wait.

A program configures logging for itself, and by default that disables every other logger (`disable_existing_loggers`).
That is not what it wants of these: `get()` gives a logger a class that cannot be disabled, and that survives filters
and handlers which raise. What a program does want is done (see `log_delivery`).

While a master runs in the process of a program, records for code of the program's go through a queue to a thread (see
`log_thread`). Handlers of the standard library on stdout and stderr, which most programs have, need no thread.

In a worker a handler that waits is the program's own harm. Only those that were opened on stdout and stderr before the
fork are pointed at streams that do not wait.
"""

import contextlib
import logging
import os
import sys
import threading
from collections.abc import Iterator
from typing import Any

import prefork.kernel.log_delivery as log_delivery
import prefork.kernel.log_stderr as log_stderr
import prefork.kernel.log_thread as log_thread
import prefork.kernel.lossy_writer as lossy_writer
import prefork.kernel.standard_streams as standard_streams

_is_operated = False  # by the command, whose --log-level counts
_masters = 0  # in this process
_lock = threading.Lock()  # for `_masters`


class Guarded(logging.Logger):
    """What `get()` makes of a logger. It takes no lock of the module `logging`, which a program's thread may hold."""

    @property
    def disabled(self) -> bool:  # an attribute of the base class, which dictConfig() and fileConfig() set
        return False

    @disabled.setter
    def disabled(self, value: object) -> None: ...

    def isEnabledFor(self, level: int) -> bool:
        # `logging.disable()` is an order in a script. Under the command the order is --log-level.
        return level >= self.getEffectiveLevel() and (_is_operated or level > self.manager.disable)

    def makeRecord(self, *args: Any, **kwargs: Any) -> logging.LogRecord:
        try:
            return super().makeRecord(*args, **kwargs)
        except Exception as error:  # of a factory, or a class, of the program's
            log_delivery.blame(self, error)
            return logging.LogRecord(*args[:7])

    def handle(self, record: logging.LogRecord) -> None:
        try:
            background = log_thread.current
            if background is None or log_delivery.is_harmless(self, record):
                log_delivery.deliver(self, record, in_master=background is not None)
            else:
                background.put(self, record)
        except Exception as error:  # of handlers that are none
            log_delivery.blame(self, error)
            log_stderr.say_record(record)


def get(name: str) -> logging.Logger:
    """The logger of that name, guarded."""
    logger = logging.getLogger(name)
    kind = type(logger)
    if not isinstance(logger, Guarded):
        # Also a logger that is there already, and that of a program with a class of its own (`setLoggerClass`).
        logger.__class__ = Guarded if kind is logging.Logger else type(kind.__name__, (Guarded, kind), {})
    return logger


def begin() -> None:
    """A master begins in this process: from now on no record makes it wait."""
    global _masters
    with _lock:
        _masters += 1
        if _masters == 1:
            log_stderr.begin()
            log_thread.current = log_thread.Background()


def end() -> None:
    """A master is over. After the last master, handlers of the program have `LAST_DELIVERY` seconds for what is in the
    queue."""
    global _masters
    with _lock:
        try:
            if _masters == 1 and log_thread.current is not None:
                background, log_thread.current = log_thread.current, None
                background.stop()
        finally:
            _masters -= 1
            if not _masters:
                log_stderr.end()


def wait() -> None:
    """Wait until the handlers of the program have what was logged, at most `LAST_DELIVERY` seconds."""
    if log_thread.current is not None:
        log_thread.current.wait()


@contextlib.contextmanager
def operated(level: str) -> Iterator[None]:
    """Under the command: log from `level` on to standard error.

    That holds in workers too, whatever their program does to the level of the root, or by `logging.disable()`.
    """
    global _is_operated
    begin()
    logger, handler = get("prefork"), log_stderr.Handler(log_stderr.writer_of("stderr"))
    logger.addHandler(handler)
    logger.propagate = False
    logger.setLevel(level.upper())
    _is_operated = True
    former = sys.stderr
    sys.stderr = lossy_writer.stream(handler.writer, "<stderr>")  # for warnings, and for what Python ignores
    try:
        yield
    finally:
        _is_operated, sys.stderr = False, former
        logger.removeHandler(handler)
        end()


def enter_child() -> None:
    """In a new child: it has the standard streams, and none that it inherits makes it wait.

    What the program has put in the place of `sys.stderr` is left alone.
    """
    log_stderr.enter_child()
    standard_streams.fill()
    if log_thread.was_stuck_at_fork():
        standard_streams.renew("stdout")
    for handler in log_delivery.all_handlers():
        if isinstance(handler, logging.StreamHandler) and handler.stream is not None:
            name = log_delivery.name_of(handler.stream)
            if name:
                with contextlib.suppress(AttributeError):  # a property
                    handler.stream = lossy_writer.stream(log_stderr.writer_of(name), f"<{name}>")
    if sys.stderr is None or sys.stderr is sys.__stderr__:
        sys.stderr = lossy_writer.stream(log_stderr.writer_of("stderr"), "<stderr>")


def _after_fork() -> None:
    global _masters, _lock
    _masters, _lock = 0, threading.Lock()


os.register_at_fork(after_in_child=_after_fork)

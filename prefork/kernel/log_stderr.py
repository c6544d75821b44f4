"""The log on standard error: of the command, of what no handler of a program takes, and of logging itself.

All of it goes through one `Writer`, which neither waits nor raises. While a master runs in this process, and in a
worker, that writer stays open. In any other process it is opened for each line, so that no descriptor is left behind.
"""

import logging
import os

import prefork.kernel.lossy_writer as lossy_writer
from prefork.kernel.lossy_writer import StreamName

FORMAT = "%(asctime)s prefork[%(process)s] %(levelname)s: %(message)s"
_FORMATTER = logging.Formatter(FORMAT)

_writers: dict[StreamName, lossy_writer.Writer] = {}
_has_master = False  # a master runs in this process
_is_child = False  # this process is the child of a master


class Handler(logging.Handler):
    """A handler of prefork's own, on a `Writer`."""

    def __init__(self, target: lossy_writer.Writer, format: str = FORMAT) -> None:
        super().__init__()
        self.writer = target
        self.setFormatter(logging.Formatter(format))

    def emit(self, record: logging.LogRecord) -> None:
        self.writer.write(_line(self, record))


def _line(form: logging.Handler | logging.Formatter, record: logging.LogRecord) -> bytes:
    """The text of a record, also where it cannot be formatted."""
    record.process = record.process or os.getpid()  # None where a program has set `logging.logProcesses` to False
    try:
        text = form.format(record)
    except Exception as error:
        text = f"prefork[{os.getpid()}] {record.levelname}: {record.msg!r} {record.args!r} ({error!r})"
    return f"{text}\n".encode("utf-8", "backslashreplace")


def say(text: str) -> None:
    """Write a line of the log, where logging is not to be trusted with it. Neither waits nor raises."""
    say_record(logging.LogRecord("prefork", logging.ERROR, "", 0, "%s", (text,), None))


def say_record(record: logging.LogRecord) -> None:
    """Write a record as a line of the log. Neither waits nor raises."""
    _write(_line(_FORMATTER, record))


def write(text: str) -> None:
    """Write text as it is. Neither waits nor raises."""
    _write(text.encode("utf-8", "backslashreplace"))


def _write(data: bytes) -> None:
    writer_of("stderr").write(data)
    if not (_has_master or _is_child):
        _close()


def writer_of(name: StreamName) -> lossy_writer.Writer:
    """The writer on a standard stream, which is opened here if need be."""
    if name not in _writers:
        _writers[name] = lossy_writer.standard(name)
    return _writers[name]


def begin() -> None:
    """A master begins in this process: the writer stays open."""
    global _has_master
    _has_master = True
    if not _is_child:
        _close()  # in a fork of a process that had a master
    writer_of("stderr")


def end() -> None:
    """The last master in this process is over."""
    global _has_master
    _has_master = False
    if not _is_child:
        _close()


def enter_child() -> None:
    """In a new child of a master: the writers stay open."""
    global _is_child
    _is_child = True


def _close() -> None:
    while _writers:
        _writers.popitem()[1].close()


def _after_fork() -> None:
    global _has_master
    _has_master = False


os.register_at_fork(after_in_child=_after_fork)

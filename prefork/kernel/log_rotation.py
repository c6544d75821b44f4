"""Log files after a rotation: everything that logs to a file opens it again by its name."""

import logging
import os
import stat
from typing import Any

import prefork.kernel.log_delivery as log_delivery
import prefork.kernel.log_stderr as log_stderr
import prefork.kernel.lossy_writer as lossy_writer


def reopen() -> None:
    """Reopen the files of each `Writer` and of each `FileHandler`. What fails is said on standard error."""
    problems = lossy_writer.reopen()
    for handler in log_delivery.all_handlers():
        stream: Any = getattr(handler, "stream", None)
        if isinstance(handler, logging.FileHandler) and stream is not None:
            try:
                _reopen(stream.fileno(), handler.baseFilename)
            except (OSError, ValueError) as error:
                problems.append(f"{handler.baseFilename} cannot be opened again: {error}")
    for problem in problems:
        log_stderr.say(f"{problem}; the file that is open is used further [PF0503]")


def _reopen(fd: int, path: str) -> None:
    if stat.S_ISREG(os.fstat(fd).st_mode):  # a FIFO is not rotated, and to open one may wait
        # dup2 under the stream, not close and open: this may run between two halves of a write.
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NONBLOCK | os.O_CLOEXEC
        new = os.open(path, flags, 0o666)
        os.dup2(new, fd, inheritable=False)
        os.close(new)

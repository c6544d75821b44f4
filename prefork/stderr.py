"""Writing to standard error without ever waiting for whoever reads it.

A pipe that nobody empties, or a stopped terminal, blocks a write for ever, and with it the process (measured elsewhere:
the server hangs and TERM is ignored). Here what cannot be written at once is dropped and counted, and the count is said
with the next line that fits. A regular file never blocks in that sense and is written directly.

A pipe or terminal is opened once more through /proc/self/fd with O_NONBLOCK: setting the flag on the descriptor itself
would change it for every process that shares it, such as the user's shell.
"""

import contextlib
import io
import logging
import os
import select
import socket
import stat
import sys
from typing import Any


class Writer:
    """Writes bytes to a descriptor, or drops them.

    Attributes
    ----------
    dropped
        How many writes were dropped since the last one that succeeded.
    """

    def __init__(self, fd: int = 2) -> None:
        self.fd = fd
        self.dropped = 0
        self._own: int | None = None
        self._socket: socket.socket | None = None
        self._wary = False
        try:
            mode = os.fstat(fd).st_mode
        except OSError:
            return
        if stat.S_ISSOCK(mode):
            with contextlib.suppress(OSError):
                self._socket = socket.socket(fileno=os.dup(fd))
        elif stat.S_ISFIFO(mode) or stat.S_ISCHR(mode):
            try:
                self._own = os.open(f"/proc/self/fd/{fd}", os.O_WRONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
            except OSError:
                self._wary = True  # no /proc, or not ours: ask poll before each write

    def write(self, data: bytes) -> bool:
        """Write all of `data` or, where that is not possible now, nothing more of it; say which."""
        if self.dropped:
            note = f"prefork[{os.getpid()}]: {self.dropped} messages were dropped, standard error was full\n"
            if not self._put(note.encode()):
                self.dropped += 1
                return False
            self.dropped = 0
        if not self._put(data):
            self.dropped += 1
            return False
        return True

    def _put(self, data: bytes) -> bool:
        view = memoryview(data)
        while view:
            try:
                if self._socket is not None:
                    count = self._socket.send(view, socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)
                elif self._own is not None:
                    count = os.write(self._own, view)
                elif self._wary and not self._room():
                    return False
                else:
                    count = os.write(self.fd, view[:4096] if self._wary else view)
            except OSError:
                return False
            view = view[count:]
        return True

    def _room(self) -> bool:
        poll = select.poll()
        poll.register(self.fd, select.POLLOUT)
        return any(event & select.POLLOUT for _, event in poll.poll(0))

    def close(self) -> None:
        if self._own is not None:
            os.close(self._own)
            self._own = None
        if self._socket is not None:
            self._socket.close()
            self._socket = None


class Handler(logging.Handler):
    """A logging handler on top of `Writer`: logging can then never stop a master."""

    def __init__(self, writer: Writer) -> None:
        super().__init__()
        self.writer = writer
        self.setFormatter(logging.Formatter("%(asctime)s prefork[%(process)d] %(levelname)s: %(message)s"))

    def emit(self, record: logging.LogRecord) -> None:
        try:
            self.writer.write((self.format(record) + "\n").encode("utf-8", "backslashreplace"))
        except Exception:  # what logging itself does with a handler that fails, without its traceback
            self.writer.dropped += 1


class _Raw(io.RawIOBase):
    def __init__(self, writer: Writer) -> None:
        self._writer = writer

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        return self._writer.fd

    def write(self, data: Any, /) -> int:
        self._writer.write(bytes(data))
        return len(data)


def replace() -> None:
    """In a worker: let `sys.stderr` drop rather than block. Also where it is a file, whose disk may be full. What the
    program put in its place is left alone."""
    stream = sys.stderr
    try:
        os.fstat(2)
    except OSError:
        return
    if stream is None or stream is not sys.__stderr__:
        return
    sys.stderr = io.TextIOWrapper(
        _Raw(Writer(2)), encoding="utf-8", errors="backslashreplace", line_buffering=True, write_through=True
    )

"""Writing that never waits for the reader: what does not fit is dropped and counted.

A pipe that nobody empties, or a stopped terminal, blocks a write for ever, and with it the process. A `Writer` drops
the text that cannot be written at once, and counts it. It reports the count before the next line that fits, and when
its process ends. It raises nothing. A regular file never blocks in that sense; a full disk and a limit (RLIMIT_FSIZE)
count alike.

A pipe or terminal is opened once more through /proc/self/fd with O_NONBLOCK. Setting the flag on the descriptor itself
would change it for every process that shares it, such as the user's shell. Where it belongs to another user (the server
gave up root) the system refuses. Then each write says that it does not wait (RWF_NOWAIT: pipes, Linux 6.4), or poll is
asked before it. A race is accepted with poll: two processes may be told of the same room, and one of them waits.

The kernel takes up to PIPE_BUF bytes into a pipe as one piece or not at all. Longer text goes in pieces that end with a
line. A line may be cut nevertheless, by its own length or by a full disk; then it is ended before the next begins.
"""

import contextlib
import errno
import io
import os
import signal
import socket
import stat
import sys
import weakref
from collections.abc import Callable
from select import PIPE_BUF, POLLOUT, poll
from typing import Any, Literal, TextIO

StreamName = Literal["stdout", "stderr"]

_NOWAIT = getattr(os, "RWF_NOWAIT", 0)
_UNKNOWN = (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS, errno.ESPIPE)  # from a kernel that does not know the flag


class Writer:
    """Writes bytes to a descriptor or a file, or drops them.

    Parameters
    ----------
    target
        A descriptor, which is left alone; or the path of a file, which is appended to, and made if need be.
    what
        What is written, in the plural.
    where
        The name of the place; of a file it is the path.

    Attributes
    ----------
    dropped
        Writes that were dropped and not reported yet.
    reason
        Why the last of them was.

    Raises
    ------
    OSError
        The file cannot be opened. Nothing else here raises.

    Inherited by a fork: the descriptors. A child counts for itself.
    """

    def __init__(self, target: int | str, what: str = "messages", where: str = "standard error") -> None:
        self.what, self.where = what, where
        self.dropped = 0
        self.reason = ""
        self._own = -1  # a descriptor that is to be closed
        self._socket: socket.socket | None = None
        self._cut = False  # what was written last is no whole line
        self._path = target if isinstance(target, str) else ""
        if isinstance(target, str):
            self.where = target
            self._own = _append(target)
        self.fd = self._fd = self._own if isinstance(target, str) else target
        self._send: Callable[[Any], int] = self._plain
        self._adapt()
        _writers.add(self)

    def _adapt(self) -> None:
        """Choose the way to write to this kind of file."""
        try:
            mode = os.fstat(self._fd).st_mode
        except OSError:
            self._fd = -1  # another file may get the number next
            return
        self._in_pieces = stat.S_ISFIFO(mode)
        terminal = os.isatty(self._fd)
        if stat.S_ISSOCK(mode):
            with contextlib.suppress(OSError):
                # Without the type it would take over `socket.setdefaulttimeout()`: it would wait for that time, and set
                # O_NONBLOCK for all processes that share the socket.
                kind = socket.SOCK_STREAM | socket.SOCK_NONBLOCK
                self._socket = socket.socket(type=kind, fileno=os.dup(self._fd))
                self._send = self._to_socket
        elif not self._path and (self._in_pieces or stat.S_ISCHR(mode)):
            flags = os.O_WRONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
            try:
                self._fd = self._own = os.open(f"/proc/self/fd/{self._fd}", flags)
            except OSError:
                self._send = self._unwaiting if _NOWAIT else self._asking
        elif not self._path:
            with contextlib.suppress(OSError):
                self._fd = self._own = os.dup(self._fd)  # a program may close its standard error
        if terminal and self._send == self._plain:
            self._send = self._to_terminal

    _in_pieces = False

    def write(self, data: bytes) -> bool:
        """Write all of `data` and return True, or drop it and return False."""
        if (self.dropped or self._cut) and not self.settle():
            self.dropped += 1
            return False
        if self._put(data):
            return True
        self.dropped += 1
        return False

    def settle(self) -> bool:
        """Report what was dropped. False: the report does not fit either."""
        dropped, note = self.dropped, "\n" if self._cut else ""
        if dropped:
            note += (
                f"prefork[{os.getpid()}]: {dropped} {self.what} were dropped because {self.where} was full [PF0501]\n"
            )
        if note:
            if not self._put(note.encode("utf-8", "backslashreplace")):
                return False
            self._cut = False
            self.dropped -= dropped  # another thread may have counted meanwhile
        return True

    def _put(self, data: bytes) -> bool:
        size, done = len(data), 0
        try:
            if size <= PIPE_BUF:
                done = self._send(data)
            while done < size:
                end = size
                if self._in_pieces and size - done > PIPE_BUF:
                    end = data.rfind(b"\n", done, done + PIPE_BUF) + 1 or done + PIPE_BUF
                count = self._send(data[done:end])
                if not count:
                    raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))
                done += count
        except (OSError, ValueError) as error:
            self.reason = getattr(error, "strerror", None) or str(error)
            if done:
                self._cut = data[done - 1] != 10
            return False
        return True

    # -- ways to write: each returns how many bytes, and raises rather than wait ---------------------------------------

    def _plain(self, data: bytes) -> int:
        return os.write(self._fd, data)

    def _to_socket(self, data: bytes) -> int:
        assert self._socket is not None
        return self._socket.send(data, socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)

    def _to_terminal(self, data: bytes) -> int:
        # In the background of a terminal with `stty tostop`, a write that does not block this signal is tried for ever:
        # the signal comes again each time, and the master takes it for an order.
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTTOU])
        try:
            return os.write(self._fd, data)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)

    def _unwaiting(self, data: bytes) -> int:
        try:
            return os.pwritev(self._fd, [data], -1, _NOWAIT)
        except OSError as error:
            if error.errno not in _UNKNOWN:
                raise
        self._send = self._asking
        return self._asking(data)

    def _asking(self, data: bytes) -> int:
        room = poll()
        room.register(self._fd, POLLOUT)
        if not any(event & POLLOUT for _, event in room.poll(0)):
            raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))
        return os.write(self._fd, data[:PIPE_BUF])

    # -- its end -------------------------------------------------------------------------------------------------------

    def reopen(self) -> None:
        """After a rotation: go on in the file that has the path now.

        Raises
        ------
        OSError
            It cannot be opened; writes go on to the former file.
        """
        if self._path and self._own >= 0:
            fd = _append(self._path)
            os.dup2(fd, self._own, inheritable=False)  # a write that this interrupts goes to one or the other
            os.close(fd)
            self._adapt()

    def close(self) -> None:
        """Report what was dropped, and give back what was opened here."""
        self.settle()
        own, self._own, self._fd, self._send = self._own, -1, -1, self._plain
        if self._socket is not None:
            own, self._socket = self._socket.detach(), None
        if own >= 0:
            with contextlib.suppress(OSError):  # the descriptor is gone whatever close(2) says
                os.close(own)


_writers: "weakref.WeakSet[Writer]" = weakref.WeakSet()  # of this process


def _append(path: str) -> int:
    flags = os.O_APPEND | os.O_CREAT | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
    try:
        return os.open(path, os.O_WRONLY | flags, 0o666)
    except OSError as error:
        if error.errno != errno.ENXIO or not stat.S_ISFIFO(os.stat(path).st_mode):
            raise
    return os.open(path, os.O_RDWR | flags, 0o666)  # a FIFO that nobody reads yet


def standard(name: StreamName, what: str = "messages") -> Writer:
    """A writer to a standard stream, whatever stands in its place in `sys`. It drops all where the process has none."""
    try:
        fd: int = getattr(sys, f"__{name}__").fileno()
    except (AttributeError, OSError, ValueError):
        fd = -1
    return Writer(fd, what, "standard error" if name == "stderr" else "standard output")


def settle() -> None:
    """At the end of a process: report what was dropped."""
    for writer in list(_writers):
        writer.settle()


def reopen() -> list[str]:
    """Have every `Writer` of a file open it again by its path. Returns what went wrong, a line for each file."""
    problems = []
    for writer in list(_writers):
        try:
            writer.reopen()
        except OSError as error:
            problems.append(f"{writer.where} cannot be opened again: {error.strerror or error}")
    return problems


def _after_fork() -> None:
    for writer in list(_writers):
        writer.dropped = 0


os.register_at_fork(after_in_child=_after_fork)


class _RawStream(io.RawIOBase):
    def __init__(self, writer: Writer, name: str) -> None:
        self._writer, self.name = writer, name

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        return self._writer.fd

    def isatty(self) -> bool:
        return os.isatty(self._writer.fd) if self._writer.fd >= 0 else False

    def write(self, data: Any, /) -> int:
        self._writer.write(bytes(data))
        return len(data)


def stream(writer: Writer, name: str) -> TextIO:
    """A text stream on a `Writer`: each line is one write."""
    return io.TextIOWrapper(_RawStream(writer, name), encoding="utf-8", errors="backslashreplace", line_buffering=True)

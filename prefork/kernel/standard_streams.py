"""Standard input, output and error of this process: descriptors 0, 1 and 2, and the streams of `sys` on them.

They are open while a pool serves, and nothing else gets their numbers: what anybody writes to standard error would go
to a connection. Nothing is flushed where that may block: a reader that sleeps must not stop the pool.
"""

import contextlib
import fcntl
import io
import os
import socket
import stat
import sys
import termios
from typing import Any

from prefork.kernel.dev_null import open_null
from prefork.kernel.unpatched import select


def fill() -> None:
    """Ensure that 0, 1 and 2 are open, on /dev/null where nothing else is (daemon(3)), and that `sys` has its streams.

    A process may be started without them. The next file or connection would get such a number.
    """
    if not all(map(_is_open, range(3))):
        while (fd := open_null()) <= 2:  # the lowest number that is free
            os.set_inheritable(fd, True)
        os.close(fd)
    for fd, name in enumerate(("stdin", "stdout", "stderr")):
        stream = getattr(sys, name)
        if stream is not None and not getattr(stream, "closed", False):
            continue
        # Python opens nothing that an exec inherits: such a number belongs to a file or a listener of the program.
        target = fd if os.get_inheritable(fd) else open_null()
        mode = "w" if fd else "r"
        new = open(target, mode, encoding="utf-8", errors="backslashreplace", closefd=False)  # noqa: SIM115
        setattr(sys, name, new)
        setattr(sys, f"__{name}__", new)


def _is_open(fd: int) -> bool:
    try:
        os.fstat(fd)
    except OSError:
        return False
    return True


def free_number_of(sock: socket.socket) -> None:
    """Where a socket of the program has the number of a standard stream: give the socket another number, and the
    former stream to /dev/null. The object stays the same."""
    fd = sock.fileno()
    if 0 <= fd <= 2:
        timeout, new = sock.gettimeout(), fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 3)
        family, kind, proto = sock.family, sock.type, sock.proto
        sock.detach()
        socket.socket.__init__(sock, family, kind, proto, new)
        sock.settimeout(timeout)
        null = open_null()
        os.dup2(null, fd)
        os.close(null)


def flush() -> bool:
    """Flush stderr and stdout where that cannot block. False: the stream stdout keeps something back for want of
    room."""
    return [_flush(stream) for stream in (sys.stderr, sys.stdout)][1]


def _flush(stream: Any) -> bool:
    try:
        if not _has_room(stream.fileno()):
            return False
        stream.flush()
    except Exception:  # there is none, or whatever a program has put there
        return True
    return True


def _has_room(fd: int) -> bool:
    """Whether all that a stream may keep back can be written now."""
    poll = select.poll()
    poll.register(fd, select.POLLOUT)
    if not poll.poll(0):
        return False
    # POLLOUT of a pipe means room for a page, and a stream keeps more.
    return not stat.S_ISFIFO(os.fstat(fd).st_mode) or fcntl.ioctl(fd, termios.FIONREAD, bytes(4)) == bytes(4)


def flush_at_exit() -> None:
    """At the end of a child: flush what there is room for, and leave the rest."""
    for stream in (sys.stdout, sys.stderr):
        try:
            fd = stream.fileno()
            if not _has_room(fd):
                # A description of this process alone, so that no other process gets its O_NONBLOCK.
                own = os.open(f"/proc/self/fd/{fd}", os.O_WRONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
                os.dup2(own, fd)
            stream.flush()
        except Exception:  # full, or whatever a program has put there
            continue


def renew(name: str) -> None:
    """Put a new stream in the place of a standard stream, if that is Python's own.

    For a stream whose buffer belongs to another process, or whose lock is held for ever.
    """
    old: Any = getattr(sys, name)
    if old is None or old is not getattr(sys, f"__{name}__"):
        return
    with contextlib.suppress(Exception):
        raw = io.FileIO(old.fileno(), "w", closefd=False)
        new = io.TextIOWrapper(
            raw if old.write_through else io.BufferedWriter(raw),
            encoding=old.encoding,
            errors=old.errors,
            line_buffering=old.line_buffering,
            write_through=old.write_through,
        )
        setattr(sys, name, new)

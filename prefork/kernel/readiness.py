"""Whether a descriptor is ready, asked by poll(2): it takes any number of descriptor, and needs none of its own."""

import os

from prefork.kernel.unpatched import select


def is_readable(fd: int) -> bool:
    """Whether a descriptor has something to read, now."""
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    return bool(poll.poll(0))


def wait_readable(fd: int, timeout: float) -> bool:
    """Wait until a descriptor has something to read, or `timeout` seconds have passed."""
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    return bool(poll.poll(max(0.0, timeout) * 1000))


def has_ended(fd: int) -> bool:
    """Whether nothing more will arrive at a socket, however much of it is still to be read.

    Either its other end has said so, or a process here has shut it down. Where the system has no POLLRDHUP, only the
    latter is seen.
    """
    poll = select.poll()
    poll.register(fd, getattr(select, "POLLRDHUP", 0))
    return bool(poll.poll(0))


def wake_reader(reader: int, writer: int) -> None:
    """Make the reading end of a non-blocking pipe readable. A signal handler may call this."""
    try:
        os.write(writer, b"\0")
    except BlockingIOError:
        pass  # it is readable already
    except OSError:  # refused: the end of the pipe wakes its reader, too
        os.dup2(reader, writer, inheritable=False)

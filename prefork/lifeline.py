"""Two pipes a worker: the lifeline, whose end-of-file kills it, and the uplink, on which it speaks to the master.

**Lifeline.** The master alone holds the write end. The worker arms the read end so that the kernel signals it when the
last write end is closed, whatever the worker is doing then. On Linux that signal is SIGKILL itself (`F_SETSIG`,
fcntl(2)), which also reaches a worker that spins in C, is stopped, or masks everything; elsewhere it is SIGIO and a
handler that leaves. PR_SET_PDEATHSIG was rejected: it needs ctypes, fires when the forking *thread* ends, and is
cleared by setuid.

**Uplink.** One byte a message, and free text for whatever else a dying worker has to say (the traceback of a boot, the
stacks that faulthandler writes). It never blocks the worker: what does not fit is dropped.
"""

import contextlib
import fcntl
import os
import select
import signal
from dataclasses import dataclass

import prefork.processes as processes

READY = b"\x01"
LEAVES = b"\x02"  # it drains although the master may not have asked
WORN = b"\x03"  # it asks to be recycled
STOP = b"\x04"  # the program called shutdown() in a worker
STUCK = b"\x05"  # it leaves, for a request past its deadline cannot be interrupted
EXITS = b"\x06"  # it leaves of its own accord
_MESSAGES = READY + LEAVES + WORN + STOP + STUCK + EXITS

TEXT_LIMIT = 65536


@dataclass(frozen=True, slots=True)
class Ends:
    """What the master makes before a fork: four descriptors, none of them inherited by an exec."""

    lifeline_read: int
    lifeline_write: int
    uplink_read: int
    uplink_write: int

    @classmethod
    def open(cls) -> "Ends":
        """Raises OSError (EMFILE, ENFILE), leaving nothing open."""
        with processes.undivided():
            lifeline = os.pipe()
            processes.private([lifeline[1]])
            try:
                uplink = os.pipe()
            except OSError:
                processes.close(lifeline)
                raise
            processes.private([uplink[0]])
        os.set_blocking(uplink[0], False)
        os.set_blocking(uplink[1], False)
        return cls(*lifeline, *uplink)

    def of_master(self) -> tuple[int, int]:
        return self.lifeline_write, self.uplink_read

    def of_worker(self) -> tuple[int, int]:
        return self.lifeline_read, self.uplink_write


def arm(lifeline_read: int) -> None:
    """In the worker: die with the master, from now on. If it is dead already, die now."""
    if hasattr(fcntl, "F_SETSIG"):
        fcntl.fcntl(lifeline_read, fcntl.F_SETSIG, signal.SIGKILL)
    else:  # no choice of the signal here; the handler is as near as it gets
        signal.signal(signal.SIGIO, lambda *_: os._exit(1))
    fcntl.fcntl(lifeline_read, fcntl.F_SETOWN, os.getpid())
    flags = fcntl.fcntl(lifeline_read, fcntl.F_GETFL)
    fcntl.fcntl(lifeline_read, fcntl.F_SETFL, flags | os.O_ASYNC)
    # The master may have died between the fork and this line; then no signal will come.
    poll = select.poll()
    poll.register(lifeline_read, 0)
    if poll.poll(0):
        os._exit(1)


class Uplink:
    """The worker's end."""

    def __init__(self, fd: int) -> None:
        self.fd = fd

    def say(self, message: bytes) -> None:
        with contextlib.suppress(OSError):
            os.write(self.fd, message)

    def tell(self, text: str) -> None:
        """Free text, for the report of this worker's death."""
        data = text.encode("utf-8", "replace").translate(None, _MESSAGES)[-TEXT_LIMIT // 2 :]
        self.say(data)


class Downlink:
    """The master's end: splits what arrives into messages and text."""

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self._text = bytearray()

    def read(self) -> tuple[list[bytes], bool]:
        """Return the messages that arrived, and whether the other end is closed. Bounded, never blocks."""
        messages: list[bytes] = []
        for _ in range(4):
            try:
                data = os.read(self.fd, 16384)
            except BlockingIOError:
                return messages, False
            except OSError:
                return messages, True
            if not data:
                return messages, True
            for value in data:
                if value <= len(_MESSAGES):
                    # A worker that floods its master says nothing new; one of each kind is enough.
                    if (message := bytes((value,))) not in messages:
                        messages.append(message)
                elif len(self._text) < TEXT_LIMIT:
                    self._text.append(value)
        return messages, False

    @property
    def text(self) -> str:
        return self._text.decode("utf-8", "replace").strip()

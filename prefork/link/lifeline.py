"""Two pipes a worker: the lifeline, whose end-of-file kills it, and the uplink, on which it speaks to the master.

**Lifeline.** The master alone holds the write end. The worker arms the read end so that the kernel signals it when the
last write end is closed, whatever the worker is doing then. On Linux that signal is SIGKILL itself (`F_SETSIG`,
fcntl(2)), which also reaches a worker that spins in C, is stopped, or masks everything; elsewhere it is SIGIO and a
handler that leaves.

A program that closes every descriptor closes this one too. So there is a second guard which needs no descriptor:
PR_SET_PDEATHSIG (prctl(2), Linux). It is no more than the second, because a change of the user id clears it, and
because it fires when the forking *thread* ends: only a fork by the main thread arms it.

**Uplink.** Messages, and free text for whatever else a dying worker has to say (the traceback of a boot, the stacks
that faulthandler writes). It never blocks the worker: what does not fit is dropped.

A message is a NUL, the worker's token, a byte that says which, and the length of its data, then the data. The token is
random and known to this worker and the master alone, so nothing that a program writes to a wrong descriptor is taken
for an order. The master reads it as hostile input all the same: bounded, and each kind at most once a read.
"""

import contextlib
import fcntl
import os
import select
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass

import prefork.kernel.private_fds as private_fds

READY = b"\x01"
LEAVES = b"\x02"  # it drains although the master may not have asked
RECYCLE = b"\x03"  # it asks to be recycled
STOP = b"\x04"  # the program called shutdown() in a worker
STUCK = b"\x05"  # it leaves, for a request past its deadline cannot be interrupted
EXITS = b"\x06"  # it leaves of its own accord
_KINDS = READY + LEAVES + RECYCLE + STOP + STUCK + EXITS

TOKEN = 8  # bytes
DATA_LIMIT = 255  # bytes of a message: with it a message is far below PIPE_BUF, and so is written whole or not at all
_HEAD = 1 + TOKEN + 2
TEXT_LIMIT = 65536

_PR_SET_PDEATHSIG = 1


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
        fds: list[int] = []
        try:
            with private_fds.fork_lock():
                for private in (1, 0):
                    fds += (pipe := os.pipe())
                    private_fds.add([pipe[private]])
            for fd in fds[2:]:
                os.set_blocking(fd, False)
        except BaseException:
            private_fds.close(fds)
            raise
        return cls(*fds)

    def of_master(self) -> tuple[int, int]:
        return self.lifeline_write, self.uplink_read

    def of_worker(self) -> tuple[int, int]:
        return self.lifeline_read, self.uplink_write


def prepare() -> None:
    """In the master, before its first fork: find the system call of the second guard."""
    global _prctl
    if sys.platform == "linux" and _prctl is None:
        with contextlib.suppress(Exception):  # a Python that was built without ctypes
            import ctypes

            _prctl = ctypes.CDLL(None).prctl


_prctl: Callable[[int, int], int] | None = None


def arm(lifeline_read: int, *, main_thread: bool) -> None:
    """In the worker: die with the master, from now on. If it is dead already, die now.

    Parameters
    ----------
    main_thread
        The main thread of the master has forked this process, so the end of the forking thread is that of the master.
    """
    if main_thread and _prctl is not None:
        _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
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

    def __init__(self, fd: int, token: bytes) -> None:
        self.fd, self._token = fd, token

    def say(self, kind: bytes, text: str = "") -> None:
        """One message. What does not fit into the pipe, and what of the text is over 255 bytes, is dropped."""
        data = text.encode("utf-8", "replace")[:DATA_LIMIT]
        self._write(b"\0" + self._token + kind + bytes((len(data),)) + data)

    def tell(self, text: str) -> None:
        """Free text, for the report of this worker's death."""
        self._write(text.encode("utf-8", "replace").translate(None, b"\0")[-TEXT_LIMIT // 2 :])

    def _write(self, data: bytes) -> None:
        with contextlib.suppress(OSError):
            os.write(self.fd, data)


class Downlink:
    """The master's end: splits what arrives into messages and text."""

    def __init__(self, fd: int, token: bytes) -> None:
        self.fd, self._mark = fd, b"\0" + token
        self._text = bytearray()
        self._rest = b""  # of a message whose end has not come yet

    def read(self) -> tuple[dict[bytes, str], bool]:
        """The messages that arrived, each kind with its text, and whether the other end is closed. Never blocks.

        Raises
        ------
        OSError
            The system refused to read; nothing is lost by it.
        """
        messages: dict[bytes, str] = {}
        for _ in range(4):
            try:
                data = os.read(self.fd, 16384)
            except BlockingIOError:
                return messages, False
            except OSError:
                if messages:
                    return messages, False  # the failure comes again, if it lasts
                raise
            if not data:
                return messages, True
            self.feed(data, messages)
        return messages, False

    def feed(self, data: bytes, messages: dict[bytes, str]) -> None:
        """Take in bytes, in pieces of any size. Of several messages of a kind the last one counts."""
        data = self._rest + data
        self._rest = b""
        place = 0
        while (start := data.find(b"\0", place)) >= 0:
            self._keep(data[place:start])
            head = data[start : start + _HEAD]
            if not self._mark.startswith(head[: TOKEN + 1]) and not head.startswith(self._mark):
                place = start + 1  # a NUL that is no message
                continue
            end = start + _HEAD + (head[-1] if len(head) == _HEAD else DATA_LIMIT)
            if len(data) < end:
                self._rest = data[start:]
                return
            if (kind := head[-2:-1]) in _KINDS:
                messages[kind] = data[start + _HEAD : end].decode("utf-8", "replace")
            place = end
        self._keep(data[place:])

    def _keep(self, text: bytes) -> None:
        self._text += text[: TEXT_LIMIT - len(self._text)]

    @property
    def text(self) -> str:
        """What arrived beside the messages. Control characters, which would reach a terminal, are shown as `?`."""
        text = self._text.decode("utf-8", "replace")
        return "".join(c if c.isprintable() or c in "\n\t" else "?" for c in text).strip()

"""The uplink: the pipe on which a worker speaks to its master. Both ends of it.

It carries messages, and free text for whatever else a dying worker has to say: the traceback of a boot, the stacks that
faulthandler writes. It never blocks the worker: what does not fit is dropped.

A message is a NUL, the worker's token, a byte for its kind, the length of its data, and the data. The token is random
and known to this worker and the master alone, so nothing that a program writes to a wrong descriptor is taken for an
order. The master reads it as hostile input all the same: bounded, and each kind at most once per read.
"""

import contextlib
import os

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


class UplinkWriter:
    """The worker's end."""

    def __init__(self, fd: int, token: bytes) -> None:
        self.fd, self._token = fd, token

    def say(self, kind: bytes, text: str = "") -> None:
        """Send one message. It is dropped if it does not fit into the pipe; its text is cut at `DATA_LIMIT`."""
        data = text.encode("utf-8", "replace")[:DATA_LIMIT]
        self._write(b"\0" + self._token + kind + bytes((len(data),)) + data)

    def tell(self, text: str) -> None:
        """Send free text, for the report of this worker's death."""
        self._write(text.encode("utf-8", "replace").translate(None, b"\0")[-TEXT_LIMIT // 2 :])

    def _write(self, data: bytes) -> None:
        with contextlib.suppress(OSError):
            os.write(self.fd, data)


class UplinkReader:
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
        """Take in bytes, in pieces of any size. Of several messages of a kind the last counts."""
        data = self._rest + data
        self._rest = b""
        position = 0
        while (start := data.find(b"\0", position)) >= 0:
            self._keep(data[position:start])
            head = data[start : start + _HEAD]
            if not self._mark.startswith(head[: TOKEN + 1]) and not head.startswith(self._mark):
                position = start + 1  # a NUL that is no message
                continue
            end = start + _HEAD + (head[-1] if len(head) == _HEAD else DATA_LIMIT)
            if len(data) < end:
                self._rest = data[start:]
                return
            if (kind := head[-2:-1]) in _KINDS:
                messages[kind] = data[start + _HEAD : end].decode("utf-8", "replace")
            position = end
        self._keep(data[position:])

    def _keep(self, text: bytes) -> None:
        self._text += text[: TEXT_LIMIT - len(self._text)]

    @property
    def text(self) -> str:
        """What arrived beside the messages. Control characters, which would reach a terminal, are shown as `?`."""
        text = self._text.decode("utf-8", "replace")
        return "".join(c if c.isprintable() or c in "\n\t" else "?" for c in text).strip()

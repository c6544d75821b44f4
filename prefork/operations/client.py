"""Asks a pool at its control socket. What it answers is read as hostile input: bounded in size and time.

This side is a command that an operator runs again and again: it imports neither the master nor a worker.
"""

import contextlib
import socket
import struct
import time
from typing import Any

import prefork.operations.protocol as protocol
from prefork.operations.protocol import ControlError

TIMEOUT = 5.0  # seconds that a pool has to answer
ANSWER_LIMIT = 16 << 20  # bytes; a pool of 2048 workers needs 1 MiB
_AGAIN = 0.05  # seconds to the next try where the pool has too many clients
_CREDENTIALS = struct.Struct("3i")


class Connection:
    """A connection to a pool, for one request.

    To be read: `pid`, the process that listens, as the kernel tells it; 0: it is in another container.

    Raises
    ------
    ControlError
        Nobody answers there.
    """

    def __init__(self, path: str, deadline: float) -> None:
        self._path, self._deadline = path, deadline
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            self._socket.settimeout(self._left())
            self._socket.connect(path)
            credentials = self._socket.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
            self.pid: int = _CREDENTIALS.unpack(credentials)[0]
        except OSError as error:
            self._socket.close()
            raise self._failed(error) from None

    def ask(self, do: str, **members: int) -> dict[str, Any]:
        """Send the request and return the answer.

        Raises
        ------
        ControlError
            The pool refuses, or does not answer.
        """
        data = bytearray()
        try:
            self._socket.settimeout(self._left())
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # refused: the reason can be read
                self._socket.sendall(protocol.request_line(do, **members))
            while not data.endswith(b"\n") and len(data) <= ANSWER_LIMIT:
                self._socket.settimeout(self._left())
                if not (part := self._socket.recv(1 << 16)):
                    break
                data += part
        except OSError as error:
            raise self._failed(error) from None
        finally:
            self._socket.close()
        if not data:
            raise ControlError("no-answer", f"{self._path}: the pool has closed the connection without an answer")
        answer: dict[str, Any] = protocol.parse_answer(bytes(data))
        return answer

    def close(self) -> None:
        self._socket.close()

    def _left(self) -> float:
        return max(0.001, self._deadline - time.monotonic())

    def _failed(self, error: OSError) -> ControlError:
        if isinstance(error, BlockingIOError):
            return ControlError("busy", f"{self._path}: too many clients wait to be connected")
        if isinstance(error, TimeoutError):
            text = f"no answer within {TIMEOUT:g} s; its master may be stopped"
            return ControlError("no-answer", f"{self._path}: {text}")
        if isinstance(error, FileNotFoundError | ConnectionRefusedError):
            return ControlError("no-pool", f"{self._path}: no pool is there")
        return ControlError("no-pool", f"{self._path}: {error.strerror or error}")


def ask(path: str, do: str, timeout: float = TIMEOUT, **members: int) -> dict[str, Any]:
    """Ask a pool, again and again while it has too many clients.

    Raises
    ------
    ControlError
        The pool refuses, or does not answer within `timeout` seconds.
    """
    deadline = time.monotonic() + timeout
    while True:
        try:
            return Connection(path, deadline).ask(do, **members)
        except ControlError as error:
            if error.kind != "busy" or time.monotonic() + _AGAIN >= deadline:
                raise
            time.sleep(_AGAIN)

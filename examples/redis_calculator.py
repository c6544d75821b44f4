r"""A calculator that speaks the protocol of Redis (RESP 2), so that every Redis client can talk to it.

Run `python examples/redis_calculator.py [PORT]`, then one of

    redis-cli -p 9007 FACT 20
    redis-benchmark -p 9007 -q -n 20000 -P 8 ADD 40 2
    printf 'MUL 6 7\r\n' | nc -N 127.0.0.1 9007

Redis clients keep many connections open. Each is served by a thread of a worker. Requests that a client sends together
are answered together. A worker that is told to leave hangs up on the clients that have their answers; otherwise a
reload would wait for idle clients.
"""

import contextlib
import math
import operator
import socket
import sys
from collections.abc import Callable
from functools import reduce
from socketserver import TCPServer, ThreadingMixIn

from prefork import PreforkMixIn, StreamRequestHandler, SyncWorker

MAX_WORDS = 64  # in a command
MAX_COMMAND = 16384  # bytes


class ProtocolError(Exception):
    """What cannot be understood at all: the connection ends after the answer."""


# -- the protocol ------------------------------------------------------------------------------------------------------


def take_command(data: bytearray) -> list[bytes] | None:
    """Remove the first command from `data`: words on a line, or an array of strings. None: it is not whole yet."""
    line, end = _line(data, 0)
    if end and not line.startswith(b"*"):
        del data[:end]
        return line.split()
    words: list[bytes] = []
    for _ in range(_number(line, MAX_WORDS) if end else 0):
        line, start = _line(data, end)
        if start and not line.startswith(b"$"):
            raise ProtocolError(f"expected '$', got {line[:1]!r}")
        end = start + _number(line, MAX_COMMAND) + 2 if start else 0
        if not end or end > len(data):
            end = 0
            break
        words.append(bytes(data[start : end - 2]))
    if not end and len(data) > MAX_COMMAND:
        raise ProtocolError("the command is too long")
    del data[:end]
    return words if end else None


def _line(data: bytearray, start: int) -> tuple[bytes, int]:
    """The line at `start`, and where the next one begins; 0 while its end has not come."""
    end = data.find(b"\n", start)
    return bytes(data[start:end]).removesuffix(b"\r"), end + 1


def _number(line: bytes, limit: int) -> int:
    if not line[1:].isdigit() or len(line) > 8 or int(line[1:]) > limit:
        raise ProtocolError("invalid length")
    return int(line[1:])


def encode(value: object) -> bytes:
    match value:
        case int() if -(2**63) <= value < 2**63:
            return b":%d\r\n" % value
        case list():
            return b"*%d\r\n%b" % (len(value), b"".join(map(encode, value)))
        case Exception():
            return f"-ERR {value}\r\n".encode()
    text = value if isinstance(value, bytes) else str(value).encode()
    return b"$%d\r\n%b\r\n" % (len(text), text)


# -- the commands ------------------------------------------------------------------------------------------------------


def factorial(words: list[bytes]) -> int:
    (number,) = map(int, words)
    if not 0 <= number <= 1000:
        raise ValueError("a number from 0 to 1000, please")
    return math.factorial(number)


COMMANDS: dict[bytes, Callable[[list[bytes]], object]] = {
    b"ADD": lambda words: sum(map(int, words)),
    b"MUL": lambda words: reduce(operator.mul, map(int, words), 1),
    b"FACT": factorial,
    b"PING": lambda words: words[0] if words else b"PONG",
    b"COMMAND": lambda words: [],  # what redis-cli asks first
    b"CONFIG": lambda words: [words[-1], b""] if len(words) == 2 else [],  # what redis-benchmark asks first
}


def answer(words: list[bytes]) -> bytes:
    command = COMMANDS.get(words[0].upper())
    if command is None:
        return encode(ValueError(f"unknown command {words[0][:32].decode('latin-1')!a}"))
    try:
        return encode(command(words[1:]))
    except ValueError as error:  # also a number of more digits than int() takes
        return encode(error)


# -- the server --------------------------------------------------------------------------------------------------------


class Client(StreamRequestHandler):
    wbufsize = -1  # several answers, one segment
    disable_nagle_algorithm = True
    timeout = 60.0  # seconds of silence
    server: "CalculatorServer"

    def handle(self) -> None:
        data = bytearray()
        with contextlib.suppress(ConnectionError, TimeoutError):
            while chunk := self.connection.recv(65536):
                data += chunk
                try:
                    while (words := take_command(data)) is not None:
                        if words:
                            self.wfile.write(answer(words))
                except ProtocolError as error:
                    self.wfile.write(encode(error))
                    return
                self.wfile.flush()
                self.server.answered(self.connection)

    def finish(self) -> None:
        self.server.idle.discard(self.connection)
        super().finish()


class CalculatorWorker(SyncWorker):
    server: "CalculatorServer"

    def drain(self) -> None:
        super().drain()
        for client in list(self.server.idle):
            hang_up(client)


class CalculatorServer(PreforkMixIn, ThreadingMixIn, TCPServer):
    worker_class = CalculatorWorker
    workers = 4
    idle: set[socket.socket]  # each worker's own

    def answered(self, client: socket.socket) -> None:
        self.idle.add(client)
        if self.worker and self.worker.draining:  # asked after the add: `drain()` sees it, or it sees `draining`
            hang_up(client)


def hang_up(client: socket.socket) -> None:
    """Have its handler read what has come, and then the end of the stream."""
    with contextlib.suppress(OSError):
        client.shutdown(socket.SHUT_RD)


if __name__ == "__main__":
    port = int(sys.argv[1]) if len(sys.argv) > 1 else 9007
    with CalculatorServer(("127.0.0.1", port), Client) as server:
        server.idle = set()
        server.serve_forever()

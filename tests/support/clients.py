"""A single client: an address as text, one request, one answer.

A request is one line, `ID [ORDER ...]`; the answer of the programs in tests/programs is `PID:ID[:RESULT]` and the end
of the stream, or one datagram.
"""

import itertools
import os
import re
import socket
import struct
import time
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from .waiting import until

_number = itertools.count()
_ANSWER = re.compile(rb"(\d+):([^:\n]*)(?::(.*))?\n", re.DOTALL)


@dataclass(frozen=True)
class Address:
    """`tcp://127.0.0.1:9999`, `udp://...`, `unix:/path`, `unixgram:/path`."""

    kind: str
    where: str
    port: int = 0

    @classmethod
    def parse(cls, text: str) -> "Address":
        kind, _, rest = text.partition(":")
        if kind in ("unix", "unixgram"):
            return cls(kind, rest)
        host, _, port = rest.removeprefix("//").rpartition(":")
        return cls(kind, host.strip("[]"), int(port))

    def __str__(self) -> str:
        if self.is_unix:
            return f"{self.kind}:{self.where}"
        host = f"[{self.where}]" if ":" in self.where else self.where
        return f"{self.kind}://{host}:{self.port}"

    @property
    def is_unix(self) -> bool:
        return self.kind in ("unix", "unixgram")

    @property
    def is_stream(self) -> bool:
        return self.kind in ("tcp", "unix")

    @property
    def family(self) -> socket.AddressFamily:
        if self.is_unix:
            return socket.AF_UNIX
        return socket.AF_INET6 if ":" in self.where else socket.AF_INET

    @property
    def target(self) -> str | tuple[str, int]:
        return self.where if self.is_unix else (self.where, self.port)

    def socket(self) -> socket.socket:
        """A socket that can reach it, not connected; a Unix datagram one has a name to answer to."""
        sock = socket.socket(self.family, socket.SOCK_STREAM if self.is_stream else socket.SOCK_DGRAM)
        if self.kind == "unixgram":
            sock.bind("")  # Linux: a unique abstract name
        return sock


class Reply(NamedTuple):
    """An answer, checked to the byte but for the pid and the result."""

    pid: int
    result: str
    seconds: float


def dial(address: Address, timeout: float = 5.0, window: int = 0) -> socket.socket:
    """A connected socket. `window`: bytes that it takes before it is read from; 0: as many as the kernel likes."""
    sock = address.socket()
    try:
        sock.settimeout(timeout)
        if window:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, window)
        sock.connect(address.target)
    except BaseException:
        sock.close()
        raise
    return sock


def reset(sock: socket.socket) -> None:
    """Close with a RST (socket(7), SO_LINGER 0)."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    sock.close()


def queued(address: Address) -> int:
    """How many clients of TCP nobody has accepted yet, as the kernel shows the length of a listener's queue."""
    for line in Path("/proc/net/tcp").read_text().splitlines()[1:]:
        _, local, _, state, queues, *_ = line.split()
        if state == "0A" and int(local.partition(":")[2], 16) == address.port:
            return int(queues.partition(":")[2], 16)
    raise AssertionError(f"nobody listens at {address}")


def hear(sock: socket.socket, address: Address) -> bytes:
    """Everything up to the end of the stream, or one datagram."""
    if not address.is_stream:
        return sock.recv(65536)
    parts = []
    while part := sock.recv(65536):
        parts.append(part)
    return b"".join(parts)


def converse(sock: socket.socket, address: Address, order: str, identity: str) -> Reply:
    """Send one request on a connected socket and read its answer."""
    begun = time.monotonic()
    sock.sendall(f"{identity} {order}".strip().encode() + b"\n")
    answer = hear(sock, address)
    match = _ANSWER.fullmatch(answer)
    assert match and match[2].decode() == identity, f"asked {identity!r} {order!r}, got {answer!r}"
    return Reply(int(match[1]), (match[3] or b"").decode(), time.monotonic() - begun)


def ask(address: Address, order: str = "", timeout: float = 5.0) -> Reply:
    """One request on a connection of its own, with an identity of its own."""
    with dial(address, timeout) as sock:
        return converse(sock, address, order, f"ask-{os.getpid()}-{next(_number)}")


def pids_serving(address: Address, number: int, timeout: float = 5.0, without: Iterable[int] = ()) -> set[int]:
    """Ask until `number` different workers, none of them in `without`, have answered: these are surely ready."""
    gone, seen = set(without), set[int]()

    def enough() -> bool:
        try:
            seen.add(ask(address, timeout=timeout).pid)
        except (ConnectionError, TimeoutError):  # a worker that was being killed had it
            return False
        return len(seen - gone) >= number

    until(enough, timeout, f"{number} workers answer at {address}", every=0)
    return seen - gone


def queue_up(address: Address, number: int, stack: ExitStack, timeout: float = 5.0) -> dict[str, socket.socket]:
    """`number` connected clients whose requests are sent and not yet answered, by identity."""
    clients = {}
    for index in range(number):
        sock = stack.enter_context(dial(address, timeout))
        sock.sendall(f"queued-{index}\n".encode())
        clients[f"queued-{index}"] = sock
    return clients


def has_ipv6() -> bool:
    """Whether this machine has the loopback address of IPv6."""
    try:
        with socket.create_server(("::1", 0), family=socket.AF_INET6):
            return True
    except OSError:
        return False

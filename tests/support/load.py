"""The clients of a `ledger.Load`: one process, one epoll loop.

    python load.py CONTROL RESULT ADDRESS CLIENTS PAUSE SECONDS

Each client is a closed loop: connect, send a unique id, read to the end, compare to the byte, again. Nothing is sent
twice. CONTROL is a file of shared counters (`COUNTERS`), RESULT the JSON of what was lost. It ends when the counter
`stop` is set, after SECONDS, or when its parent is gone.
"""

import json
import mmap
import os
import select
import socket
import sys
import time
from collections import Counter
from pathlib import Path

sys.path[:1] = [str(Path(__file__).resolve().parent.parent)]

from support.clients import Address  # noqa: E402  # a script beside the package it belongs to

COUNTERS = ("stop", "ok", "reset", "refused", "unanswered", "short", "mismatch", "unconnected", "overflow")
CONNECT_TIMEOUT = (
    0.25  # a SYN that a stopping server does not take is repeated by the kernel after 1 s: too slow for a test
)
ANSWER_TIMEOUT = 10.0
DATAGRAM_TIMEOUT = 2.0
RETRY = 0.002
MOST_LOSSES = 10_000


class Client:
    """One closed loop. `state` is connecting, waiting or resting; `until` is when that is over."""

    def __init__(self, load: "Clients", name: str) -> None:
        self.load = load
        self.name = name
        self.number = 0
        self.sock: socket.socket | None = None
        self.identity = b""
        self.heard = b""
        self.state = "resting"
        self.until = 0.0
        self.begun = 0.0

    def begin(self, now: float) -> None:
        self.number += 1
        self.identity = f"{self.name}-{self.number}".encode()
        self.heard = b""
        self.begun = now
        address = self.load.address
        sock = address.socket()
        sock.setblocking(False)
        self.sock = sock
        try:
            sock.connect(address.target)
        except BlockingIOError as error:
            if address.is_unix:  # EAGAIN: the backlog is full
                self.end("overflow", str(error), now)
                return
        except OSError as error:
            self.end("refused", str(error), now)
            return
        self.load.clients[sock.fileno()] = self
        self.load.poll.register(sock.fileno(), select.EPOLLOUT)
        self.state, self.until = "connecting", now + CONNECT_TIMEOUT

    def act(self, now: float) -> None:
        try:
            if self.state == "connecting":
                self.connected(now)
            else:
                self.hear(now)
        except (ConnectionResetError, BrokenPipeError) as error:
            self.end("reset", f"{error} while {self.state}", now)
        except BlockingIOError as error:  # a Unix datagram queue is full
            self.end("overflow", str(error), now)
        except ConnectionRefusedError as error:  # a datagram to nobody
            self.end("refused", str(error), now)

    def connected(self, now: float) -> None:
        assert self.sock
        error = self.sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        if error:
            self.end("refused", os.strerror(error), now)
            return
        self.state, self.until = "waiting", now + self.load.patience
        self.load.poll.modify(self.sock.fileno(), select.EPOLLIN)
        self.sock.send(self.identity + b"\n")

    def hear(self, now: float) -> None:
        assert self.sock
        part = self.sock.recv(4096)
        self.heard += part
        if part and self.load.address.is_stream:
            return
        pid, _, rest = self.heard.partition(b":")
        if not self.heard:
            self.end("unanswered", "end of stream", now)
        elif pid.isdigit() and rest == self.identity + b"\n":
            self.load.by_pid[int(pid)] += 1
            self.end("ok", "", now)
        elif (pid.isdigit() or not rest) and (self.identity + b"\n").startswith(rest):
            self.end("short", repr(self.heard), now)
        else:
            self.end("mismatch", repr(self.heard), now)

    def late(self, now: float) -> None:
        if self.state == "resting":
            self.begin(now)
        elif self.state == "connecting":
            self.end("unconnected", "", now)
        else:
            self.end("unanswered", "silence", now)

    def end(self, kind: str, note: str, now: float) -> None:
        load = self.load
        load.count(kind)
        if kind not in ("ok", "refused", "unconnected", "overflow") and len(load.losses) < MOST_LOSSES:
            load.losses.append((self.identity.decode(), kind, note, self.begun, now))
        if kind == "refused":
            load.refused_at = [*load.refused_at[:1], now]
        assert self.sock
        load.clients.pop(self.sock.fileno(), None)
        self.sock.close()
        self.sock = None
        self.state, self.until = "resting", now + (load.pause if kind == "ok" else RETRY)


class Clients:
    """All clients, their poll and their counters."""

    def __init__(self, control: str, address: str, clients: int, pause: float, seconds: float) -> None:
        with open(control, "r+b") as file:
            self.counters = memoryview(mmap.mmap(file.fileno(), 0)).cast("Q")
        self.address = Address.parse(address)
        self.patience = ANSWER_TIMEOUT if self.address.is_stream else DATAGRAM_TIMEOUT
        self.pause = pause
        self.end = time.monotonic() + seconds
        self.poll = select.epoll()
        self.clients: dict[int, Client] = {}
        self.losses: list[tuple[str, str, str, float, float]] = []
        self.refused_at: list[float] = []
        self.by_pid: Counter[int] = Counter()
        self.all = [Client(self, f"{os.getpid()}.{index}") for index in range(clients)]

    def count(self, kind: str) -> None:
        self.counters[COUNTERS.index(kind)] += 1

    def run(self) -> None:
        """Until told to stop; then what is connected is heard out, within the timeouts."""
        parent = os.getppid()
        swept = 0.0
        stopping = False
        while True:
            now = time.monotonic()
            if not stopping and (self.counters[0] or now > self.end or os.getppid() != parent):
                stopping = True
            resting = [client for client in self.all if client.state == "resting"]
            if stopping:
                for client in self.all:
                    if client.state == "connecting":
                        client.end("unconnected", "stopped", now)
                if all(client.state == "resting" for client in self.all):
                    return
            else:
                for client in resting:
                    if client.until <= now:
                        client.begin(now)
            if now - swept > 0.02:
                swept = now
                for client in self.all:
                    if client.state != "resting" and client.until <= now:
                        client.late(now)
            wait = min([0.02] + [max(0.0, client.until - now) for client in self.all if client.state == "resting"])
            for descriptor, _ in self.poll.poll(0.02 if stopping else wait):
                if descriptor in self.clients:
                    self.clients[descriptor].act(time.monotonic())


def main() -> None:
    control, result, address, clients, pause, seconds = sys.argv[1:]
    load = Clients(control, address, int(clients), float(pause), float(seconds))
    load.run()
    found = {
        "counts": {name: load.counters[index] for index, name in enumerate(COUNTERS)},
        "losses": load.losses,
        "refused_at": load.refused_at,
        "by_pid": load.by_pid,
    }
    Path(result).write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    main()

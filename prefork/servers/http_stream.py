"""The two ends of a connection of `BufferedHTTPMixIn`: `HoldingWriter` holds a reply back, `Wire` receives requests.

A handler waits for its client in `Wire` only. There the reply is sent before a wait, so that neither side waits for the
other; there an idle connection ends; and there a worker notices that it is to leave.
"""

import io
import socket
import threading
from time import monotonic
from typing import Any

from prefork.kernel.unpatched import select


class HoldingWriter(io.BufferedIOBase):
    """Holds back what is written, up to `limit` bytes. What could not be sent is not tried again."""

    def __init__(self, sock: socket.socket, limit: int) -> None:
        self._sock, self._limit = sock, limit
        self._lock = threading.Lock()
        self._parts: list[bytes] = []
        self.held = 0

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        return self._sock.fileno()

    def write(self, data: Any) -> int:
        if self.closed:
            raise ValueError("write to closed file")
        part = data if type(data) is bytes else bytes(memoryview(data))
        with self._lock:
            self._parts.append(part)
            self.held += len(part)
            if self.held > self._limit:
                self._send()
        return len(part)

    def flush(self) -> None:
        if self.held:
            with self._lock:
                self._send()

    def _send(self) -> None:
        parts, self._parts, self.held = self._parts, [], 0
        self._sock.sendall(parts[0] if len(parts) == 1 else b"".join(parts))


class Wire(io.RawIOBase):
    """The receiving end of a connection of a `BufferedHTTPMixIn`, whose limits it keeps."""

    def __init__(self, handler: Any, writer: HoldingWriter) -> None:
        self._sock: socket.socket = handler.connection
        self._writer = writer
        self._fd: int = self._sock.fileno()
        self._pending = getattr(self._sock, "pending", None)
        self._turn, self._parting, self._most = handler.turn, handler.parting, handler.most_requests
        self._worker: Any = getattr(handler.server, "worker", None)
        self._keep, self._limit = 5.0, 0.0
        self._listeners: list[int] = []
        if self._worker is not None:  # None: the mix-in serves with any server
            self._keep = self._worker.options.keepalive_timeout
            self._limit = self._worker.options.request_timeout or 0.0
            self._listeners = [server.fileno() for server in self._worker.servers]
        self._poll: select.poll | None = None
        self._turn_ends = monotonic() + self._turn
        self.requests = 0
        self.taken = 0  # bytes
        self.idle = False  # no request has begun: the client may take its time
        self.quiet = False  # a read returns what is buffered and does not receive

    def readable(self) -> bool:
        return True

    def fileno(self) -> int:
        return self._fd

    def readinto(self, buffer: Any) -> int | None:
        if self.quiet:
            return None
        if self._writer.held:
            self._writer.flush()
        idle, self.idle = self.idle, False
        if idle and not self._wait_for_request():
            return 0
        try:
            count: int = self._sock.recv_into(buffer)
        except ConnectionError:
            if idle:
                return 0  # the client of an idle connection may go
            raise
        self.taken += count
        return count

    def is_over(self) -> bool:
        """Whether this connection ends with the request in progress."""
        if not self._keep or self.requests >= self._most or (self._worker is not None and self._worker.draining):
            return True
        now = monotonic()
        if now < self._turn_ends:
            return False
        self._turn_ends = now + self._turn
        return self._others_wait()

    def _others_wait(self) -> bool:
        """Whether a client is queued at a listener of this worker."""
        if not self._listeners or self._worker.draining:  # a drained listener's descriptor is always readable
            return False
        poll = select.poll()
        for fd in self._listeners:
            if fd >= 0:
                poll.register(fd, select.POLLIN)
        return bool(poll.poll(0))

    def _wait_for_request(self) -> bool:
        """Wait for the next request of an idle connection; False: the connection ends without a request."""
        if self._pending is not None and self._pending():  # TLS has received more than it gave
            return True
        if self._poll is None:
            self._poll = select.poll()
            self._poll.register(self._fd, select.POLLIN)
            if self._worker is not None:
                self._poll.register(self._worker.drain_fd, select.POLLIN)
        if self._limit:
            self._worker.extend_deadline(self._keep + self._limit)
        wait, ends, leaves = min(self._turn, self._keep), 0.0, False
        while True:
            events = self._poll.poll(wait * 1000)
            if events and (len(events) > 1 or events[0][0] == self._fd):
                if self._limit:
                    self._worker.extend_deadline(self._limit)
                return True
            now = monotonic()
            ends = ends or now - wait + self._keep
            if events:
                leaves = True
                self._poll.unregister(self._worker.drain_fd)
                ends = now + self._parting
            elif now >= ends or (not leaves and self._others_wait()):
                return False
            wait = max(0.0, min(self._turn, ends - now))

"""An HTTP/1.1 client that sends what it is told, byte by byte if need be, and reads answers strictly."""

import socket
import threading
from collections import Counter
from dataclasses import dataclass
from types import TracebackType

from .clients import Address, dial


class Unanswered(Exception):
    """The connection ended before a whole answer had come. `nothing`: not even a byte of it."""

    def __init__(self, got: bytes) -> None:
        super().__init__(f"the connection ended after {got[-200:]!r}")
        self.nothing = not got


@dataclass(frozen=True)
class Answer:
    """A whole answer; names of headers in small letters."""

    status: int
    reason: str
    headers: dict[str, str]
    body: bytes
    chunked: bool

    @property
    def closes(self) -> bool:
        return self.headers.get("connection", "").lower() == "close"


class Web:
    """One connection."""

    def __init__(self, address: Address, timeout: float = 10.0, window: int = 0) -> None:
        self.sock = dial(address, timeout, window)
        if self.sock.family != socket.AF_UNIX:
            self.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.buffer = b""

    def __enter__(self) -> "Web":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.sock.close()

    def send(self, *parts: bytes) -> "Web":
        for part in parts:
            self.sock.sendall(part)
        return self

    def get(self, path: str = "/", *headers: str, method: str = "GET", body: bytes = b"") -> Answer:
        lines = [f"{method} {path} HTTP/1.1", "Host: test", *headers]
        if body:
            lines.append(f"Content-Length: {len(body)}")
        self.send("\r\n".join([*lines, "", ""]).encode() + body)
        return self.answer(method)

    def answer(self, method: str = "GET") -> Answer:
        """The next answer; interim ones (100) are answers too."""
        while b"\r\n\r\n" not in self.buffer:
            self._more()
        head, _, self.buffer = self.buffer.partition(b"\r\n\r\n")
        first, *lines = head.decode("latin-1").split("\r\n")
        version, status, reason = first.split(" ", 2)
        assert version == "HTTP/1.1", first
        headers: dict[str, str] = {}
        for line in lines:
            name, colon, value = line.partition(": ")
            assert colon and name.lower() not in headers, line
            headers[name.lower()] = value
        chunked = headers.get("transfer-encoding") == "chunked"
        assert not (chunked and "content-length" in headers)
        if method == "HEAD" or status[0] == "1" or status in ("204", "304"):
            body = b""
        elif chunked:
            body = self._chunks()
        elif "content-length" in headers:
            body = self._exactly(int(headers["content-length"]))
        else:
            assert headers.get("connection") == "close", first
            body = self.rest()
        return Answer(int(status), reason, headers, body, chunked)

    def rest(self) -> bytes:
        """All that still comes, to the end of the stream."""
        parts, self.buffer = [self.buffer], b""
        while part := self.sock.recv(1 << 20):
            parts.append(part)
        return b"".join(parts)

    def is_over(self) -> bool:
        """Whether the server has ended the stream and sent nothing more: by its end, or by a reset."""
        try:
            return self.rest() == b""
        except ConnectionResetError:
            return True

    def _more(self) -> None:
        part = self.sock.recv(1 << 16)
        if not part:
            raise Unanswered(self.buffer)
        self.buffer += part

    def _exactly(self, size: int) -> bytes:
        parts = [self.buffer]
        left = size - len(self.buffer)
        while left > 0:
            part = self.sock.recv(min(left, 1 << 20))
            if not part:
                raise Unanswered(b"".join(parts))
            parts.append(part)
            left -= len(part)
        whole = b"".join(parts)
        self.buffer = whole[size:]
        return whole[:size]

    def _line(self) -> bytes:
        while b"\r\n" not in self.buffer:
            self._more()
        line, _, self.buffer = self.buffer.partition(b"\r\n")
        return line

    def _chunks(self) -> bytes:
        body = b""
        while size := int(self._line(), 16):
            body += self._exactly(size)
            assert self._exactly(2) == b"\r\n"
        assert self._line() == b""
        return body


class KeepAlive:
    """Clients that ask again and again on kept connections, and count what becomes of each request.

    `lost`: it was sent, and its connection ended without an answer, though nothing had said that it would. `refused`:
    there was nobody to connect to.
    """

    def __init__(self, address: Address, clients: int = 8, path: str = "/") -> None:
        self.address, self.path = address, path
        self.counts: Counter[str] = Counter()
        self._over = threading.Event()
        self._threads = [threading.Thread(target=self._run, daemon=True) for _ in range(clients)]
        for thread in self._threads:
            thread.start()

    def _run(self) -> None:
        counts: Counter[str] = Counter()
        while not self._over.is_set():
            try:
                with Web(self.address) as web:
                    self._converse(web, counts)
            except (ConnectionError, TimeoutError, OSError) as error:
                counts["refused" if isinstance(error, ConnectionRefusedError | FileNotFoundError) else "lost"] += 1
        self.counts.update(counts)

    def _converse(self, web: Web, counts: Counter[str]) -> None:
        while not self._over.is_set():
            try:
                answer = web.get(self.path)
            except Unanswered:
                counts["lost"] += 1
                return
            counts["ok" if answer.status == 200 else str(answer.status)] += 1
            self.counts["sum"] += 1
            if answer.closes:
                counts["closed"] += 1
                return

    def stop(self) -> Counter[str]:
        self._over.set()
        for thread in self._threads:
            thread.join(20)
            assert not thread.is_alive()
        return self.counts

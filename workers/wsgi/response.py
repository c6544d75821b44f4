"""An exchange: one request of a client, and the answer that PEP 3333's start_response, write and iterables make of it.

The head and the first part of the body leave in one send. Where the connection is closed after an answer that is a
list, the end of the stream leaves in the same segment (MSG_MORE, then close), which saves several microseconds.
"""

import os
import socket
from collections.abc import Callable, Iterable
from time import monotonic
from types import TracebackType
from typing import Any

import prefork.kernel.logs as logs
import prefork.kernel.readiness as readiness
from prefork.kernel.unpatched import select
from prefork.workers.wsgi.file_wrapper import FileWrapper, plain_file
from prefork.workers.wsgi.header_lines import (
    DATE,
    FAULTS,
    LENGTH,
    SERVER,
    header_line,
    known_headers,
    known_statuses,
    refusal,
    status_line,
)
from prefork.workers.wsgi.limits import DONTWAIT, Client

log = logs.get("prefork")

# A number, not an enum: to join two flags of an enum takes 44 bytecodes.
MORE = DONTWAIT | int(getattr(socket, "MSG_MORE", 0))
_JOIN = 65536  # bytes: parts are copied together up to this, to save a system call

NO_BODY: list[bytes] = []  # the body of all requests that have none; it is never changed

ExcInfo = tuple[type[BaseException], BaseException, TracebackType | None]


class Gone(ConnectionError):
    """The client does not take its answer: it has left, or its time is over."""


class Exchange:
    """One request, of which the head is complete, and the answer to it.

    They are one object because a second object would cost a twentieth of all that a request does. `make_exchange()`
    sets its attributes, not an `__init__`: a call from C to an `__init__` in Python costs as much as all of them.
    """

    __slots__ = (
        *("body", "complete", "early", "environ", "expects", "http11", "keep", "method", "size", "target"),
        *("begun", "excess", "kept", "sent", "status", "whole", "_bare", "_chunked", "_client"),
        *("_length", "_lines", "_own", "_plain"),
    )

    # The request.
    environ: dict[str, Any]
    method: str  # this and the target once more, because the environment is the application's to change
    target: bytes
    http11: bool
    keep: bool  # the client wants the connection kept
    body: list[bytes]  # the parts that have come and were not read yet
    complete: bool  # the whole body has come
    # Only where the head tells of a body or the like.
    early: bool  # the application is called before the body is complete
    size: int  # bytes of the body that have come
    expects: bool  # the client waits for "100 Continue"
    # The answer.
    status: str
    begun: bool  # the head was sent
    kept: bool  # the connection can be used again; known once the head was sent
    sent: int  # bytes of the body
    excess: bool  # the application gave more of it than its Content-Length
    whole: bool  # the kernel has all of it: nothing that goes wrong afterwards may undo it
    _client: Client
    _plain: bool

    # -- what the application calls --------------------------------------------------------------------------------

    def start(
        self, status: str, headers: list[tuple[str, str]], exc_info: ExcInfo | None = None
    ) -> Callable[[bytes], None]:
        """`start_response`."""
        if exc_info:
            try:
                if self.begun:
                    raise exc_info[1].with_traceback(exc_info[2])
            finally:
                exc_info = None  # otherwise the frame would hold itself
        elif self.status:
            raise AssertionError("start_response() was called a second time without exc_info")
        line, bare = known_statuses.get(status) or status_line(status)
        lines, length, own = [line], -1, 0
        for header in headers:
            try:
                known = known_headers.get(header)
            except TypeError:
                known = None  # a list in the place of a tuple
            kind, line, number = known or header_line(*header)
            if kind:
                if kind == LENGTH:
                    length = number
                    if bare and not status.startswith("304"):
                        continue
                else:
                    own |= kind
            lines.append(line)
        self.status, self._lines, self._length = status, lines, length
        self._plain = not (own or bare) and self.http11 and self.method != "HEAD"
        self._own, self._bare, self._chunked, self.excess = own, bare, False, False
        return self.write

    def write(self, data: bytes) -> None:
        """The callable that `start_response` returns. Empty data sends nothing, not even the head."""
        _check_bytes(data)
        if not data:
            return
        if self.whole:
            self._leave_out()
            return
        if self._head_only():
            if not self.begun:
                self._send(self._begin(-1))
                self.whole = True
            return
        size, length = len(data), self._length
        if 0 <= length < self.sent + size:
            self.excess = True
            data = data[: length - self.sent]
            size = len(data)
        self.sent += size
        if not self.begun:
            head = self._begin(-1)
            if self._chunked:
                head += b"%x\r\n" % size
            self._send(head, data, b"\r\n" if self._chunked else b"")
        elif self._chunked:
            self._send(b"%x\r\n" % size, data, b"\r\n")
        else:
            self._send(b"", data)
        self.whole = self.sent == length

    # -- what the worker calls -------------------------------------------------------------------------------------

    def run(self, application: Callable[..., Any]) -> None:
        """Call the application, and send its answer. Its exceptions are raised, after the `close()` of its iterable."""
        result = application(self.environ, self.start)
        kind = type(result)
        if kind is list and self._plain and len(result) == 1 and self._send_plain(result[0]):
            return
        if (kind is list or kind is tuple) and not self.begun:
            self._send_whole(result)
            return
        try:
            if kind is FileWrapper and self._send_file(result):
                return
            self._send_parts(result)
        finally:
            if hasattr(result, "close"):
                result.close()

    def continue_(self) -> None:
        """Tell a client to send the body that it holds back, because the application reads it."""
        if not self.begun:
            self._send(b"HTTP/1.1 100 Continue\r\n\r\n")

    def fail(self, status: int) -> None:
        """Answer with an error of the server's own, and no more on this connection."""
        self.begun, self.kept, self._length = True, False, -1
        self.status = f"{status} {FAULTS[status]}"
        head, body = refusal(status, self._client.listener.worker.clock)
        if self.method != "HEAD":
            head += body
            self.sent = len(body)
        self._send(head)
        self.whole = True

    # -- inside ----------------------------------------------------------------------------------------------------

    def _head_only(self) -> bool:
        if not self.status:
            raise AssertionError("the application did not call start_response()")
        return self._bare or self.method == "HEAD"

    def _send_plain(self, data: bytes) -> bool:
        """Send the usual answer: one part, not large, under a plain head. Returns whether the answer was such a one."""
        if self.begun or type(data) is not bytes or (size := len(data)) > _JOIN:
            return False
        lines = self._lines
        if self._length < 0:
            lines.append(b"Content-Length: %d\r\n" % size)
        elif self._length != size:
            return False
        clock = self._client.listener.worker.clock
        if monotonic() >= clock.until:
            clock.look()
        kept = self._may_keep()
        lines.append(clock.kept if kept else clock.closed)
        lines.append(data)
        self.begun, self.kept, self.sent = True, kept, size
        # There is nothing to close, so nothing delays the end of the stream, which may share the answer's segment.
        self._push(b"".join(lines), DONTWAIT if kept else MORE)
        self.whole = True
        return True

    def _may_keep(self) -> bool:
        client = self._client
        listener = client.listener
        return self.keep and self.complete and client.served < listener.keep and not listener.worker.draining

    def _send_whole(self, parts: list[bytes] | tuple[bytes, ...]) -> None:
        """Send a body that is complete: its length is known, and a small body leaves in one send with the head."""
        for part in parts:
            _check_bytes(part)
        size = sum(map(len, parts))
        if self._head_only() or 0 <= self._length != size or size > _JOIN:
            if self._length < 0 and not self._bare and size:
                self._length = size
                self._lines.append(b"Content-Length: %d\r\n" % size)
            self._send_parts(parts)
            return
        self.sent = size
        head = self._begin(size)
        self._push(head + b"".join(parts), DONTWAIT if self.kept else MORE)
        self.whole = True

    def _send_parts(self, parts: Iterable[bytes]) -> None:
        """Iterate as long as there is something to send: otherwise an iterable without an end would never notice that
        nobody wants its parts.

        An answer without a body is asked for no part, unless `start_response()` is still to be called, which the first
        part does at the latest. After the last byte that Content-Length allows one more part is asked for: most
        iterables end there.
        """
        steps = iter(parts)
        if not self.status:
            for data in steps:
                self.write(data)
                break
        if not self._head_only():
            for data in steps:
                if self.whole:
                    self.excess = self.excess or bool(data)
                    break
                self.write(data)
        self._end()

    def _begin(self, size: int) -> bytes:
        """The head, complete. `size` is that of the whole body where it is known, else -1."""
        lines, clock, http11 = self._lines, self._client.listener.worker.clock, self.http11
        kept = self._may_keep()
        clock.look()
        if self._length < 0 and not self._bare:
            if size >= 0:
                self._length = size
                lines.append(b"Content-Length: %d\r\n" % size)
            elif self.method == "HEAD":
                pass
            elif http11:
                self._chunked = True
                lines.append(b"Transfer-Encoding: chunked\r\n")
            else:
                kept = False
        if self._own & SERVER == 0:
            lines.append(clock.server)
        if self._own & DATE == 0:
            lines.append(clock.date)
        if not kept:
            lines.append(b"Connection: close\r\n")
        elif not http11:
            lines.append(b"Connection: keep-alive\r\n")
        lines.append(b"\r\n")
        self.begun, self.kept = True, kept
        return b"".join(lines)

    def _end(self) -> None:
        head_only = self._head_only()
        if not self.begun:
            self._send(self._begin(-1 if head_only else 0))
        elif self._chunked:
            self._send(b"0\r\n\r\n")
        self.whole = head_only or self.sent >= self._length
        if not self.whole:
            self.kept = False
            text = "the application sent %d bytes of a body of %d bytes; the connection is closed [PF0608]"
            log.error(text, self.sent, self._length)
        elif self.excess:
            text = "the application sent more than its Content-Length of %d bytes; the rest is dropped [PF0609]"
            log.error(text, self._length)

    def _leave_out(self) -> None:
        """Drop data that is written after the end of the answer. The client may have left by then, and an application
        that writes for ever must be told so."""
        self.excess = not self._head_only()
        if readiness.has_ended(self._client.fd):
            raise self._lost("the client has left")

    def _lost(self, why: object) -> Gone:
        """The client does not get the whole answer, whatever the application makes of this exception."""
        self.kept = False
        if not self.whole:
            self._client.broken = True
        return Gone(str(why))

    def _send_file(self, wrapper: FileWrapper) -> bool:
        """Have the kernel send a file. Returns whether it has; if not, the rest of the file is to be read."""
        if self.begun or self._head_only() or not (plain := plain_file(wrapper.filelike)):
            return False
        fd, offset, size = plain
        if self._length >= 0:
            size = min(size, self._length)
        sock = self._client.sock
        sock.setblocking(False)  # sendfile has no flag for it; nothing here counts on a blocking socket
        self._send(self._begin(size), more=size > 0)
        while self.sent < size:
            try:
                count = os.sendfile(sock.fileno(), fd, offset + self.sent, min(size - self.sent, 1 << 20))
            except BlockingIOError:
                self._wait()
                continue
            except OSError:
                # The client's or the file's error, which this call does not tell; reading and sending apart does.
                wrapper.filelike.seek(offset + self.sent)
                return False
            if not count:
                break  # the file was truncated meanwhile
            self.sent += count
        self._end()
        return True

    def _send(self, head: bytes, data: bytes = b"", tail: bytes = b"", more: bool = False) -> None:
        """Send all of it, waiting for the client where it must."""
        flags = MORE if more else DONTWAIT
        if len(data) <= _JOIN:
            self._push(head + data + tail, flags)
        else:
            if head:
                self._push(head, MORE)
            self._push(data, MORE if tail else flags)
            if tail:
                self._push(tail, flags)

    def _push(self, data: bytes, flags: int) -> None:
        send = self._client.sock.send
        try:
            count = send(data, flags)
            if count == len(data):
                return
        except BlockingIOError:
            count = 0
        except OSError as error:
            raise self._lost(error) from error
        view = memoryview(data)[count:]
        while view:
            self._wait()
            try:
                view = view[send(view, flags) :]
            except BlockingIOError:
                continue
            except OSError as error:
                raise self._lost(error) from error

    def _wait(self) -> None:
        """Until the client takes more."""
        poll = select.poll()
        poll.register(self._client.sock, select.POLLOUT)
        if not poll.poll(self._client.listener.limits.SEND_TIMEOUT * 1000):
            raise self._lost("the client took nothing for too long")


def make_exchange(
    client: Client, environ: dict[str, Any], method: str, target: bytes, keep: bool, http11: bool
) -> Exchange:
    """For a head that is complete: a request without a body. Where the head tells of a body the parser changes that."""
    exchange = Exchange()
    exchange._client = client
    exchange.environ = environ
    exchange.method = method
    exchange.target = target
    exchange.keep, exchange.http11 = keep, http11
    exchange.body, exchange.complete = NO_BODY, True
    exchange.begun = exchange.kept = exchange.whole = exchange._plain = False
    exchange.status, exchange.sent = "", 0
    return exchange


def _check_bytes(part: bytes) -> None:
    if type(part) is not bytes:
        raise TypeError(f"an application must give bytes, not {type(part).__name__}")

"""The response side of the worker class `wsgi`: PEP 3333's start_response, write and iterables become bytes.

The head and the first part of the body leave in one send. Where the connection is closed after an answer that is a
list, the end of the stream leaves in the same segment (MSG_MORE, then close), which saves several microseconds.
"""

import io
import os
import re
import socket
import stat
from collections.abc import Callable, Iterable, Iterator
from time import monotonic, time
from types import TracebackType
from typing import Any, Protocol
from wsgiref.handlers import format_date_time

import prefork.kernel.logs as logs
import prefork.kernel.readiness as readiness
from prefork.kernel.unpatched import select
from prefork.workers.wsgi.parser import DONTWAIT, FAULTS, NO_BODY, Connection, Request

log = logs.get("prefork")

# Numbers: to join two flags of an enum takes 44 bytecodes.
MORE = DONTWAIT | int(getattr(socket, "MSG_MORE", 0))
_JOIN = 65536  # bytes: parts are copied together up to this, to save a system call

_PLAIN, _LENGTH, _DATE, _SERVER, _HOP = 0, 1, 2, 4, 8
# PEP 3333: an application must not use HTTP/1.1's hop-by-hop features.
_HOPS = ("Connection", "Keep-Alive", "Proxy-Authenticate", "Proxy-Authorization", "TE", "Trailers", "Trailer")
_KINDS = {"content-length": _LENGTH, "date": _DATE, "server": _SERVER}
_KINDS |= {name.lower(): _HOP for name in (*_HOPS, "Transfer-Encoding", "Upgrade")}
_TOKEN = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")
_STATUS = re.compile(r"[2-9][0-9][0-9] [\t -~\x80-\xff]*")
# Lines that were checked and encoded once: an application says mostly the same again. By line, for one that is new each
# time must not cost more than itself. Where there are too many all are forgotten, and those in use come back.
_names: dict[str, int] = {}
_statuses: dict[str, tuple[bytes, bool]] = {}
_headers: dict[tuple[str, str], tuple[int, bytes, int]] = {}
_LEARNED = 1000
_NAMED = {"name"}  # attributes of a file that change nothing of what its methods do
_SHORT = 256  # bytes of a line that is remembered

ExcInfo = tuple[type[BaseException], BaseException, TracebackType | None]


class Gone(ConnectionError):
    """The client does not take its answer: it has left, or its time is over."""


class FileWrapper:
    """`wsgi.file_wrapper`: a file that the kernel sends by itself where it can."""

    def __init__(self, filelike: Any, block_size: int = 65536) -> None:
        self.filelike, self.block_size = filelike, block_size
        if hasattr(filelike, "close"):
            self.close = filelike.close

    def __iter__(self) -> Iterator[bytes]:
        return iter(lambda: self.filelike.read(self.block_size), b"")


class Clock:
    """The Date header, made once a second: `look()` when it is `until`.

    `kept`, `closed`: the end of nearly every head, of a connection that is kept or not. `until` is on the monotonic
    clock, for nobody can wait on a clock that may be set: set back, it would show the same second for as long.
    """

    def __init__(self, server: str) -> None:
        self.server = f"Server: {server}\r\n".encode("latin-1") if server else b""
        self.until = 0.0
        self.date = self.kept = self.closed = b""

    def look(self) -> None:
        if (begun := monotonic()) >= self.until:
            now = time()
            self.date = f"Date: {format_date_time(now)}\r\n".encode("latin-1")
            self.kept = self.server + self.date + b"\r\n"
            self.closed = self.server + self.date + b"Connection: close\r\n\r\n"
            self.until = begun + 1.0 - now % 1.0  # last: other threads take what is there until then


def refusal(status: int, clock: Clock) -> tuple[bytes, bytes]:
    """Head and body of an error of the server's own, after which the connection is closed."""
    body = f"{FAULTS[status]}\n"
    clock.look()
    line, _ = _status_line(f"{status} {FAULTS[status]}")
    kind = f"Content-Type: text/plain\r\nContent-Length: {len(body)}\r\n"
    return line + kind.encode("latin-1") + clock.closed, body.encode("latin-1")


class Host(Protocol):
    """What a response asks of its worker: the Date, and whether it is about to leave."""

    clock: Clock
    draining: bool


class Response(Request):
    """A request and the answer to it, in one object: a second one would cost a twentieth of all that a request does.

    `begun`: its head has been sent. `kept`: the connection can be used again; known once it has begun. `sent`: bytes of
    the body. `excess`: the application gave more of it than its Content-Length. `whole`: the kernel has all of it, and
    nothing that goes wrong afterwards may undo it.
    """

    __slots__ = (
        *("begun", "excess", "kept", "sent", "status", "whole", "_bare", "_chunked", "_connection", "_host"),
        *("_length", "_lines", "_own", "_plain"),
    )

    status: str
    whole: bool
    _connection: Connection
    _host: Host

    @classmethod
    def maker(cls, host: Host) -> Callable[[Connection, dict[str, Any], str, bytes, bool, bool], "Response"]:
        """What a parser makes requests with."""

        def make(
            connection: Connection, environ: dict[str, Any], method: str, target: bytes, keep: bool, http11: bool
        ) -> Response:
            one = cls()
            one._connection, one._host = connection, host
            one.environ, one.method, one.target, one.keep, one.http11 = environ, method, target, keep, http11
            one.body, one.complete = NO_BODY, True
            one.begun = one.kept = one.whole = one._plain = False
            one.status, one.sent = "", 0
            return one

        return make

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
                exc_info = None  # or it would hold its own frame
        elif self.status:
            raise AssertionError("start_response() was called again, without exc_info")
        line, bare = _statuses.get(status) or _status_line(status)
        lines, length, own = [line], -1, 0
        for header in headers:
            try:
                known = _headers.get(header)
            except TypeError:
                known = None  # a list in the place of a tuple
            kind, line, number = known or _header_line(*header)
            if kind:
                if kind == _LENGTH:
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
        """What `start_response` returns. Empty data sends nothing, also no head."""
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
        """Call the application, and send what it gives. Its exceptions are raised, after its `close()`."""
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
        """The application reads a body that the client holds back until it is told to send it."""
        if not self.begun:
            self._send(b"HTTP/1.1 100 Continue\r\n\r\n")

    def fail(self, status: int) -> None:
        """Answer with an error of the server's own, and no more on this connection."""
        self.begun, self.kept, self._length = True, False, -1
        self.status = f"{status} {FAULTS[status]}"
        head, body = refusal(status, self._host.clock)
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
        """What nearly every answer is: one part, which is not large, under a head without anything special."""
        if self.begun or type(data) is not bytes or (size := len(data)) > _JOIN:
            return False
        lines = self._lines
        if self._length < 0:
            lines.append(b"Content-Length: %d\r\n" % size)
        elif self._length != size:
            return False
        clock = self._host.clock
        if monotonic() >= clock.until:
            clock.look()
        kept = self._may_keep()
        lines.append(clock.kept if kept else clock.closed)
        lines.append(data)
        self.begun, self.kept, self.sent = True, kept, size
        # With nothing to close nothing delays the end of the stream, which may then share its segment.
        self._push(b"".join(lines), DONTWAIT if kept else MORE)
        self.whole = True
        return True

    def _may_keep(self) -> bool:
        connection = self._connection
        return self.keep and self.complete and connection.served < connection.site.keep and not self._host.draining

    def _send_whole(self, parts: list[bytes] | tuple[bytes, ...]) -> None:
        """All of it is there: its length is known, and where it is small it is one send with the head."""
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
        """Iterate, for as long as there is something to send: what gives parts for ever never notices otherwise that
        nobody wants them.

        Of what has no body no part is asked for, unless `start_response()` is still to be called, which the first one
        does at the latest. After the last byte that Content-Length allows there is one more step, in which most end.
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
        lines, clock, http11 = self._lines, self._host.clock, self.http11
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
        if self._own & _SERVER == 0:
            lines.append(clock.server)
        if self._own & _DATE == 0:
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
            log.error("the application gave %d bytes of a body of %d; its client is let go", self.sent, self._length)
        elif self.excess:
            log.error("the application gave more than its Content-Length of %d bytes; that is left out", self._length)

    def _leave_out(self) -> None:
        """What is written after the end of the answer. Its client may leave by then: an application that writes for
        ever has to be told."""
        self.excess = not self._head_only()
        if readiness.has_ended(self._connection.fd):
            raise self._lost("the client has left")

    def _lost(self, why: object) -> Gone:
        """The client does not get all of the answer, whatever the application makes of this exception."""
        self.kept = False
        if not self.whole:
            self._connection.broken = True
        return Gone(str(why))

    def _send_file(self, wrapper: FileWrapper) -> bool:
        """Whether the kernel has sent the file. If it has not, all that is left of it is to be read."""
        if self.begun or self._head_only() or not (plain := _plain_file(wrapper.filelike)):
            return False
        fd, offset, size = plain
        if self._length >= 0:
            size = min(size, self._length)
        sock = self._connection.sock
        sock.setblocking(False)  # sendfile has no flag for it; nothing here counts on a blocking socket
        self._send(self._begin(size), more=size > 0)
        while self.sent < size:
            try:
                count = os.sendfile(sock.fileno(), fd, offset + self.sent, min(size - self.sent, 1 << 20))
            except BlockingIOError:
                self._wait()
                continue
            except OSError:
                # The client's, or the file's, which this does not tell: reading and sending apart will.
                wrapper.filelike.seek(offset + self.sent)
                return False
            if not count:
                break  # it was truncated meanwhile
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
        send = self._connection.sock.send
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
        poll.register(self._connection.sock, select.POLLOUT)
        if not poll.poll(self._connection.site.limits.SEND_TIMEOUT * 1000):
            raise self._lost("the client took nothing for too long")


def _plain_file(file: Any) -> tuple[int, int, int] | None:
    """Descriptor, position and bytes to its end, of a file whose `read()` gives what the kernel would send.

    Not of any object that has a `fileno()`: the one of a gzip.GzipFile is that of the compressed file, a subclass or an
    instance may have a `read()` of its own, and a file of /proc or /sys is not as long as it says, and has no blocks.
    """
    kind = type(file)
    raw = file if kind is io.FileIO else file.raw if kind in (io.BufferedReader, io.BufferedRandom) else None
    if type(raw) is not io.FileIO or not {*vars(file), *vars(raw)} <= _NAMED:
        return None
    if kind is io.BufferedRandom:
        file.flush()
    fd = raw.fileno()
    info = os.fstat(fd)
    if not (stat.S_ISREG(info.st_mode) and info.st_blocks and raw.readable()):
        return None
    offset = file.tell()
    return fd, offset, max(0, info.st_size - offset)


def _check_bytes(part: bytes) -> None:
    if type(part) is not bytes:
        raise TypeError(f"an application must give bytes, not {type(part).__name__}")


def _status_line(status: str) -> tuple[bytes, bool]:
    """It, and whether such an answer has no body."""
    if not isinstance(status, str) or not _STATUS.fullmatch(status):
        raise ValueError(f"start_response: {status!r} is no status; it is a text such as '200 OK'")
    known = ("HTTP/1.1 " + status + "\r\n").encode("latin-1"), status[:3] in ("204", "304")
    if type(status) is str and len(status) < _SHORT:  # a class of one's own may be equal to what it is not
        _room(_statuses)[status] = known
    return known


def _header_line(name: str, value: str) -> tuple[int, bytes, int]:
    """What kind of header it is, its line, and the number that a Content-Length is."""
    kind = _names.get(name)
    if kind is None:
        kind = _learn_name(name)
    line = name + ": " + value + "\r\n"
    if "\n" in value or "\r" in value or "\0" in value:
        raise ValueError(f"{name}: a response header contains a control character")
    if kind == _LENGTH and not (value.isascii() and value.isdigit()):
        raise ValueError(f"Content-Length: {value!r} is no length")
    known = kind, line.encode("latin-1"), int(value) if kind == _LENGTH else -1
    if type(name) is type(value) is str and len(line) < _SHORT:
        _room(_headers)[name, value] = known
    return known


def _learn_name(name: str) -> int:
    if not isinstance(name, str) or not _TOKEN.fullmatch(name):
        raise ValueError(f"start_response: {name!r} is no name of a header")
    kind = _KINDS.get(name.lower(), _PLAIN)
    if kind == _HOP:
        raise ValueError(f"{name}: a hop-by-hop header is the server's own (PEP 3333)")
    if type(name) is str and len(name) < _SHORT:
        _room(_names)[name] = kind
    return kind


def _room(learned: dict[Any, Any]) -> dict[Any, Any]:
    if len(learned) >= _LEARNED:
        learned.clear()
    return learned

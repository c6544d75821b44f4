"""The lines of an answer's head: checked, encoded, and remembered for the next answer that has them.

An application mostly says the same again. Lines are remembered one by one: where a line changes with each answer, it
must not cost more than itself. A full memory forgets everything, and the lines in use come back.
"""

import re
from time import monotonic, time
from typing import Any
from wsgiref.handlers import format_date_time

FAULTS = {
    400: "Bad Request",
    408: "Request Timeout",
    413: "Content Too Large",
    414: "URI Too Long",
    417: "Expectation Failed",
    431: "Request Header Fields Too Large",
    500: "Internal Server Error",
    501: "Not Implemented",
    503: "Service Unavailable",
    505: "HTTP Version Not Supported",
}

PLAIN, LENGTH, DATE, SERVER, HOP = 0, 1, 2, 4, 8  # kinds of headers
# PEP 3333: an application must not use HTTP/1.1's hop-by-hop features.
_HOPS = ("Connection", "Keep-Alive", "Proxy-Authenticate", "Proxy-Authorization", "TE", "Trailers", "Trailer")
_KINDS = {"content-length": LENGTH, "date": DATE, "server": SERVER}
_KINDS |= {name.lower(): HOP for name in (*_HOPS, "Transfer-Encoding", "Upgrade")}
_TOKEN = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")
_STATUS = re.compile(r"[2-9][0-9][0-9] [\t -~\x80-\xff]*")

known_statuses: dict[str, tuple[bytes, bool]] = {}  # the results of `status_line()`
known_headers: dict[tuple[str, str], tuple[int, bytes, int]] = {}  # the results of `header_line()`
_known_names: dict[str, int] = {}
_REMEMBERED = 1000  # lines in each memory
_SHORT = 256  # bytes of a line that is remembered


class Clock:
    """The Date header, made once a second: call `look()` when the monotonic clock has reached `until`.

    `kept` and `closed` are the end of nearly every head, of a connection that is kept or not. `until` is on the
    monotonic clock, because the other clock may be set: set back, it would show the same second for as long.
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
            self.until = begun + 1.0 - now % 1.0  # last: until then other threads use the lines that are there


def refusal(status: int, clock: Clock) -> tuple[bytes, bytes]:
    """Head and body of an error of the server's own, after which the connection is closed."""
    body = f"{FAULTS[status]}\n"
    clock.look()
    line, _ = status_line(f"{status} {FAULTS[status]}")
    kind = f"Content-Type: text/plain\r\nContent-Length: {len(body)}\r\n"
    return line + kind.encode("latin-1") + clock.closed, body.encode("latin-1")


def status_line(status: str) -> tuple[bytes, bool]:
    """The line, and whether an answer with this status has no body."""
    if not isinstance(status, str) or not _STATUS.fullmatch(status):
        raise ValueError(f"start_response: {status!r} is not a status; it must be a string such as '200 OK'")
    known = ("HTTP/1.1 " + status + "\r\n").encode("latin-1"), status[:3] in ("204", "304")
    if type(status) is str and len(status) < _SHORT:  # a subclass may be equal to a text that it is not
        _with_room(known_statuses)[status] = known
    return known


def header_line(name: str, value: str) -> tuple[int, bytes, int]:
    """The kind of the header, its line, and the number of a Content-Length (of others -1)."""
    kind = _known_names.get(name)
    if kind is None:
        kind = _learn_name(name)
    line = name + ": " + value + "\r\n"
    if "\n" in value or "\r" in value or "\0" in value:
        raise ValueError(f"{name}: a response header contains a control character")
    if kind == LENGTH and not (value.isascii() and value.isdigit()):
        raise ValueError(f"Content-Length: {value!r} is not a length")
    known = kind, line.encode("latin-1"), int(value) if kind == LENGTH else -1
    if type(name) is type(value) is str and len(line) < _SHORT:
        _with_room(known_headers)[name, value] = known
    return known


def _learn_name(name: str) -> int:
    if not isinstance(name, str) or not _TOKEN.fullmatch(name):
        raise ValueError(f"start_response: {name!r} is not the name of a header")
    kind = _KINDS.get(name.lower(), PLAIN)
    if kind == HOP:
        raise ValueError(f"{name}: the server itself sets hop-by-hop headers (PEP 3333)")
    if type(name) is str and len(name) < _SHORT:
        _with_room(_known_names)[name] = kind
    return kind


def _with_room(memory: dict[Any, Any]) -> dict[Any, Any]:
    if len(memory) >= _REMEMBERED:
        memory.clear()
    return memory

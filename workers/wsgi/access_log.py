"""The access log of the worker class `wsgi`: the combined format, one write per line.

Each worker opens the file and appends to it, so lines of several workers do not mix. USR1 opens it again.
"""

import time

from prefork.kernel.access_file import AccessFile
from prefork.workers.wsgi.parser import Connection
from prefork.workers.wsgi.response import Exchange

_LINE = 200  # characters that are shown of a first line that was refused
_ESCAPES = {code: f"\\x{code:02x}" for code in (*range(32), 34, 92, *range(127, 256))}


class AccessLog:
    """One line a exchange. `path`: a file, or `-` for standard output.

    Raises
    ------
    OSError
        The file cannot be opened.
    """

    def __init__(self, path: str) -> None:
        self._file = AccessFile(path)
        self._second = 0
        self._when = ""

    def write(self, connection: Connection, exchange: Exchange) -> None:
        environ, peer = exchange.environ, connection.peer
        host = peer[0] if isinstance(peer, tuple) else "-"
        target = exchange.target.decode("latin-1").replace('"', "%22")
        version = "HTTP/1.1" if exchange.http11 else "HTTP/1.0"
        referer, agent = _quoted(environ.get("HTTP_REFERER")), _quoted(environ.get("HTTP_USER_AGENT"))
        self._file.write(
            f'{host} - - {self._time()} "{exchange.method} {target} {version}" {exchange.status[:3] or "-"} '
            f'{exchange.sent} "{referer}" "{agent}"\n'
        )

    def refuse(self, connection: Connection, size: int) -> None:
        """Write a line for bytes that made no request: its first line as far as known, and the server's own answer."""
        environ, peer = connection.head, connection.peer
        host = peer[0] if isinstance(peer, tuple) else "-"
        referer, agent = _quoted(environ.get("HTTP_REFERER")), _quoted(environ.get("HTTP_USER_AGENT"))
        self._file.write(
            f'{host} - - {self._time()} "{_quoted(connection.line[:_LINE])}" {connection.fault} {size} '
            f'"{referer}" "{agent}"\n'
        )

    def _time(self) -> str:
        now = int(time.time())
        if now != self._second:
            local = time.localtime(now)
            month = ("Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec")[
                local.tm_mon - 1
            ]
            self._second, self._when = now, time.strftime(f"[%d/{month}/%Y:%H:%M:%S %z]", local)
        return self._when


def _quoted(text: object) -> str:
    return str(text).translate(_ESCAPES) if text else "-"

"""The first lines of the log: what the program was taken for, the URL to open, and how to stop and reload.

The texts are made here from values; `cli` logs them. The lines of the pool follow: where it listens, and that it is
ready.
"""

import socket
from collections.abc import Iterable

import prefork.kernel.host_port as host_port

_HERE = {"0.0.0.0": "127.0.0.1", "::": "::1"}  # by which a client of this machine gets in


def url(kind: int, address: object) -> str | None:
    """What a browser of this machine opens for a listener that speaks HTTP; None: a Unix socket, or no stream."""
    if kind != socket.SOCK_STREAM or not isinstance(address, tuple):
        return None
    host = str(address[0])
    return f"http://{host_port.host_port(_HERE.get(host, host), address[1])}"


def first_lines(program: str, workers: int, urls: Iterable[str], pid: int) -> list[str]:
    """The lines, in order.

    Parameters
    ----------
    program
        What it was taken for, and the class of workers.
    urls
        What can be opened.
    """
    number = f"{workers} worker{'' if workers == 1 else 's'}"
    opens = ", ".join(urls)
    return [
        f"{program}, {number}" + (f"; open {opens}" if opens else ""),
        f"pid {pid}; to stop type Ctrl-C or kill -TERM {pid}; to load new code type kill -HUP {pid}",
    ]

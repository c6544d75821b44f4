"""What `-b/--bind` takes, and where a program listens without it.

| typed | listens on |
|---|---|
| `HOST:PORT`, `localhost:PORT`, `[::1]:PORT` | that address |
| `PORT` | 127.0.0.1, as without `-b` |
| `:PORT`, `*:PORT` | every IPv4 address of the machine, as in gunicorn |
| `[::]:PORT` | every address of the machine, IPv6 and IPv4 |
| a path with a slash | a Unix socket |
| `tcp://HOST:PORT`, `udp://HOST:PORT`, `unix:PATH`, `unixgram:PATH` | the same, with the kind of the socket |
| nothing | 127.0.0.1:8000; with PORT in the environment 0.0.0.0:$PORT |

An address that does not say whether it takes streams or datagrams takes what the program serves.
"""

import os
import re
import socket
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from prefork.errors import OptionError
from prefork.kernel.program_directory import ProgramDirectory

UNIX_PATH = 107  # bytes
DEFAULT_PORT = 8000

_UNIX = (("unix:", socket.SOCK_STREAM), ("unixgram:", socket.SOCK_DGRAM))
_INTERNET = (("tcp://", socket.SOCK_STREAM), ("udp://", socket.SOCK_DGRAM))
_HTTP = re.compile(r"(https?|wss?)://([^/]*)(/.*)?", re.IGNORECASE)
_FORMS = "use HOST:PORT, PORT, a path with a slash, udp://HOST:PORT or unixgram:PATH"


@dataclass(frozen=True, slots=True)
class BindAddress:
    """Where to listen: the argument of one `--bind`."""

    family: int
    kind: int  # SOCK_STREAM or SOCK_DGRAM; 0: what the program serves
    address: Any  # as socketserver takes it
    text: str  # as it was typed

    @classmethod
    def parse(cls, text: str, place: ProgramDirectory) -> "BindAddress":
        """An address as it was typed; an IPv6 host in brackets; a path that begins with @ is a name without a file
        (Linux).

        Parameters
        ----------
        place
            Where a relative path begins.

        Raises
        ------
        OptionError
            naming the part that is wrong.
        """
        for scheme, kind in _UNIX:
            if text.startswith(scheme):
                return _unix(text, text[len(scheme) :], scheme, kind, place)
        for scheme, kind in _INTERNET:
            if text.startswith(scheme):
                return _internet(text, text[len(scheme) :], scheme, kind)
        if match := _HTTP.fullmatch(text):
            raise OptionError(f"--bind: {text!r} is a URL; {_instead_of_url(match)}", code="PF0103")
        if "://" in text or text.startswith(("fd:", "systemd")):
            raise OptionError(f"--bind: {text!r} is no address; {_FORMS}", code="PF0103")
        if "/" in text:
            return _unix(text, text, "", 0, place)
        return _internet(text, text, "", 0)

    def of_kind(self, kind: int) -> "BindAddress":
        """The same; where it was typed without a kind of socket, with this one."""
        return self if self.kind else replace(self, kind=kind)

    @property
    def is_abstract(self) -> bool:
        """Whether it is a name of a Unix socket without a file."""
        return self.family == socket.AF_UNIX and self.address[0] == "\0"


@dataclass(frozen=True, slots=True)
class BindAddresses:
    """Where a program is to listen.

    Parameters
    ----------
    typed
        What was given with `--bind`.
    port
        PORT of the command's environment, which counts where nothing was typed.
    """

    typed: tuple[BindAddress, ...] = ()
    port: str = ""

    def of_kind(self, kind: int) -> list[BindAddress]:
        """The addresses for a program that takes this kind of socket. Raises OptionError for a wrong PORT."""
        return [address.of_kind(kind) for address in self.typed or (default_address(self.port),)]


def default_address(port: str) -> BindAddress:
    """Where to listen without `--bind`.

    A platform that sets PORT sends requests from outside of the machine or container. Without it only programs of this
    machine get in.

    Raises
    ------
    OptionError
        PORT is no port.
    """
    text = port.strip()
    if not text:
        return BindAddress(socket.AF_INET, 0, ("127.0.0.1", DEFAULT_PORT), f"127.0.0.1:{DEFAULT_PORT}")
    if not _is_port(text):
        raise OptionError(
            f"PORT in the environment is {port!r}, which is no port; set it to 0 to 65535, or type -b HOST:PORT",
            code="PF0103",
        )
    return BindAddress(socket.AF_INET, 0, ("0.0.0.0", int(text)), f"0.0.0.0:{text}")


def _unix(text: str, path: str, scheme: str, kind: int, place: ProgramDirectory) -> BindAddress:
    if path.startswith("//"):  # as a URL: unix:///run/name.sock
        path = "/" + path.lstrip("/")
    if not path or path == "/":
        raise OptionError(f"--bind: {text!r} names no path; write {scheme}/run/name.sock", code="PF0103")
    if path.endswith("/") or (path[0] != "@" and os.path.isdir(place.absolute(path))):
        raise OptionError(
            f"--bind: {text!r} is a directory; add the name of the socket: {text.rstrip('/')}/name.sock", code="PF0103"
        )
    if len(os.fsencode(path)) > UNIX_PATH:
        raise OptionError(
            f"--bind: the path in {text!r} is longer than the {UNIX_PATH} bytes of a Unix socket; use a shorter one",
            code="PF0103",
        )
    if path[0] == "@":
        return BindAddress(socket.AF_UNIX, kind, _abstract(path, text), text)
    # Absolute: the program may change its directory before the path is bound. One that would be too long for a socket
    # is left as it is.
    absolute = place.absolute(path.removeprefix("./"))
    return BindAddress(socket.AF_UNIX, kind, absolute if len(os.fsencode(absolute)) <= UNIX_PATH else path, text)


def _abstract(path: str, text: str) -> str:
    if sys.platform != "linux":
        raise OptionError(
            f"--bind: {text!r} names an abstract socket, which only Linux has; write ./{path} for a file", code="PF0103"
        )
    if path == "@":
        raise OptionError(f"--bind: {text!r} names no socket; write {text}name", code="PF0103")
    return "\0" + path[1:]


def _internet(text: str, rest: str, scheme: str, kind: int) -> BindAddress:
    host, colon, port = rest.rpartition(":")
    if not scheme and not colon and _is_digits(rest):
        host, colon = "127.0.0.1", ":"
    bracketed = host.startswith("[") and host.endswith("]")
    if rest.count(":") > 1 and not bracketed and not (rest.startswith("[") and rest.endswith("]")):
        raise OptionError(
            f"--bind: {text!r}: write an IPv6 address in brackets: {_with_brackets(rest, scheme)}", code="PF0103"
        )
    if not colon or (rest.startswith("[") and not bracketed):
        if not scheme and not _looks_like_host(rest):
            raise OptionError(f"--bind: {text!r} is no address; {_FORMS}{_file_hint(rest)}", code="PF0103")
        raise OptionError(f"--bind: {text!r} names no port; write {scheme}{rest}:{DEFAULT_PORT}", code="PF0103")
    if not _is_port(port):
        raise OptionError(f"--bind: {port!r} in {text!r} is no port; use 0 to 65535", code="PF0103")
    family = socket.AF_INET6 if bracketed else socket.AF_INET
    name = host[1:-1] if bracketed else host
    return BindAddress(family, kind, ("0.0.0.0" if name in ("", "*") and not bracketed else name, int(port)), text)


def _is_digits(text: str) -> bool:
    return text.isascii() and text.isdigit()


def _is_port(text: str) -> bool:
    return _is_digits(text) and len(text) <= 5 and int(text) <= 65535


def _looks_like_host(text: str) -> bool:
    return text == "localhost" or text.startswith("[") or bool(re.fullmatch(r"\d+\.\d+\.\d+\.\d+", text))


def _file_hint(text: str) -> str:
    return f"; for a Unix socket in this directory write ./{text}" if text.endswith((".sock", ".socket")) else ""


def _with_brackets(rest: str, scheme: str) -> str:
    host, _, port = rest.rpartition(":")
    is_whole = rest.endswith("::") or not _is_digits(port) or len(port) < 2
    return f"{scheme}[{rest}]:{DEFAULT_PORT}" if is_whole else f"{scheme}[{host.strip('[]')}]:{port}"


def _instead_of_url(match: re.Match[str]) -> str:
    scheme, where = match[1].lower(), match[2]
    if scheme in ("https", "wss"):
        return f"prefork speaks no TLS: type -b {where}, and let a proxy such as nginx speak it"
    where = where if re.search(r":\d+$", where) else f"{where}:80"
    return f"type the address alone: -b {where}"


def is_ipv6_wildcard(server: Any) -> bool:
    """Whether a server is to listen on every address of IPv6."""
    if server.address_family != socket.AF_INET6:
        return False
    host = server.server_address[0]
    try:
        return not host or not any(socket.inet_pton(socket.AF_INET6, host))
    except OSError:  # a name, or an address with a zone
        return False


def leaves_ipv4(server: Any, addresses: Sequence[BindAddress]) -> bool:
    """Whether a server of every IPv6 address leaves those of IPv4, on the same port, to another `--bind`."""
    port = server.server_address[1]
    ports = [
        address.address[1]
        for address in addresses
        if address.family == socket.AF_INET and address.of_kind(server.socket_type).kind == server.socket_type
    ]
    return port != 0 and port in ports

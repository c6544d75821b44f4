"""What `--bind` takes: `tcp://HOST:PORT`, `udp://HOST:PORT`, `unix:PATH`, `unixgram:PATH`."""

import os
import socket
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from prefork.errors import OptionError
from prefork.kernel.program_directory import ProgramDirectory

UNIX_PATH = 107  # bytes


@dataclass(frozen=True, slots=True)
class BindAddress:
    """Where to listen: the argument of one `--bind`."""

    family: int
    kind: int
    address: Any  # as socketserver takes it
    text: str  # as it was typed

    @classmethod
    def parse(cls, text: str, place: ProgramDirectory) -> "BindAddress":
        """`tcp://HOST:PORT`, `udp://HOST:PORT`, `unix:PATH`, `unixgram:PATH`; an IPv6 host in brackets; a path that
        begins with @ is a name without a file (Linux).

        Parameters
        ----------
        place
            Where a relative path begins.

        Raises
        ------
        OptionError
            naming the part that is wrong.
        """
        for scheme, kind in (("unix:", socket.SOCK_STREAM), ("unixgram:", socket.SOCK_DGRAM)):
            if text.startswith(scheme):
                path = text[len(scheme) :]
                if not path:
                    raise OptionError(f"--bind: {text!r} names no path; write {scheme}/run/name.sock")
                if len(os.fsencode(path)) > UNIX_PATH:
                    raise OptionError(
                        f"--bind: the path in {text!r} is longer than the {UNIX_PATH} bytes a Unix socket may have"
                    )
                if path[0] == "@":
                    return cls(socket.AF_UNIX, kind, _abstract(path, text), text)
                # Absolute: the program may change its directory before the path is bound. One that would be too long
                # for a socket is left as it is.
                absolute = place.absolute(path)
                return cls(socket.AF_UNIX, kind, absolute if len(os.fsencode(absolute)) <= UNIX_PATH else path, text)
        for scheme, kind in (("tcp://", socket.SOCK_STREAM), ("udp://", socket.SOCK_DGRAM)):
            if text.startswith(scheme):
                host, colon, port = text[len(scheme) :].rpartition(":")
                bracketed = host.startswith("[") and host.endswith("]")
                if not colon or (":" in host and not bracketed):
                    raise OptionError(
                        f"--bind: {text!r} needs a host and a port: {scheme}127.0.0.1:9999, {scheme}[::1]:9999"
                    )
                if not (port.isascii() and port.isdigit() and int(port) <= 65535):
                    raise OptionError(f"--bind: {port!r} in {text!r} is no port; use 0 to 65535")
                family = socket.AF_INET6 if bracketed else socket.AF_INET
                return cls(family, kind, (host[1:-1] if bracketed else host, int(port)), text)
        raise OptionError(
            f"--bind: {text!r} is no address; use tcp://HOST:PORT, udp://HOST:PORT, unix:PATH or unixgram:PATH"
        )

    @property
    def is_abstract(self) -> bool:
        """Whether it is a name of a Unix socket without a file."""
        return self.family == socket.AF_UNIX and self.address[0] == "\0"


def _abstract(path: str, text: str) -> str:
    if sys.platform != "linux":
        raise OptionError(f"--bind: {text!r} names an abstract socket, which only Linux has; write ./{path} for a file")
    if path == "@":
        raise OptionError(f"--bind: {text!r} names no socket; write {text}name")
    return "\0" + path[1:]


def leaves_ipv4(server: Any, addresses: Sequence[BindAddress]) -> bool:
    """Whether a server of all IPv6 addresses leaves those of IPv4, on the same port, to another `--bind`. Where there
    is none it takes what the system gives it, which is usually both."""
    if server.address_family != socket.AF_INET6:
        return False
    host, port = server.server_address[:2]
    try:
        is_wildcard = not host or not any(socket.inet_pton(socket.AF_INET6, host))
    except OSError:  # a name, or an address with a zone
        return False
    ipv4 = (socket.AF_INET, server.socket_type)
    ports = [address.address[1] for address in addresses if (address.family, address.kind) == ipv4]
    return is_wildcard and port != 0 and port in ports

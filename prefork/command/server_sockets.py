"""How the servers of a program get their sockets in a child of the command, though the program makes them itself.

The first probe lets them bind, and remembers in which order and where. From then on the master has the listeners: a
worker's servers get them in that order, and those of a reload's probe by the addresses that they ask for.
"""

import contextlib
import json
import os
import socket
import socketserver
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import prefork.kernel.listener as listener
import prefork.servers.mixin as mixin
from prefork.errors import OptionError

Take = Callable[[Any], socket.socket | None]


@contextlib.contextmanager
def binding(take: Take, claims: Mapping[str, object] | None = None) -> Iterator[list[tuple[Any, object]]]:
    """Servers that are made inside get their listener from `take(server)`; where that is None they bind.

    Replaced is socketserver's own `server_bind()`, where every override ends, and that of the mix-in, which claims a
    Unix path before. In a child of the command nobody else makes servers meanwhile.

    Parameters
    ----------
    claims
        Settings that a server has before it claims its path. None: it claims none, since the master has it.

    Returns
    -------
    The servers in the order in which they ask for a listener, each with the address it asks for (see `plain()`).
    """
    bind, activate = socketserver.TCPServer.server_bind, socketserver.TCPServer.server_activate
    claim = mixin.PreforkMixIn.server_bind
    asked: list[tuple[Any, object]] = []
    adopted: set[int] = set()

    def server_bind(self: Any) -> None:
        asked.append((self, plain(self.server_address)))
        sock = take(self)
        if sock is None:
            bind(self)
            return
        self.socket.close()
        self.socket = sock
        self.server_address = sock.getsockname()
        adopted.add(id(self))

    def server_activate(self: Any) -> None:
        if id(self) not in adopted:
            activate(self)

    def server_claim(self: Any) -> None:
        if claims is None:
            super(mixin.PreforkMixIn, self).server_bind()
        else:
            vars(self).update(claims)
            claim(self)

    def replace(bind: Any, activate: Any, claim: Any) -> None:
        socketserver.TCPServer.server_bind = bind  # type: ignore[method-assign]
        socketserver.TCPServer.server_activate = activate  # type: ignore[method-assign]
        mixin.PreforkMixIn.server_bind = claim  # type: ignore[method-assign]

    replace(server_bind, server_activate, server_claim)
    try:
        yield asked
    finally:
        replace(bind, activate, claim)


def in_order(sockets: list[socket.socket]) -> Take:
    """Gives each server the next listener; after the last one servers bind for themselves."""
    remaining = iter(sockets)
    return lambda server: next(remaining, None)


def by_address(addresses: list[object], sockets: list[socket.socket]) -> Take:
    """Gives each server the next listener, if it asks for the address of that.

    A server that asks for another one raises OptionError, or OSError where it could not be bound at all.
    """
    remaining = list(zip(addresses, sockets, strict=True))

    def take(server: Any) -> socket.socket:
        address, sock = remaining[0] if remaining else (None, None)
        # An address typed without a kind of socket takes the kind that the program serves, which may have changed.
        if sock is not None and address == plain(server.server_address) and sock.type == server.socket_type:
            remaining.pop(0)
            return sock
        if server.address_family != socket.AF_UNIX:  # binding there would leave a file
            with socket.socket(server.address_family, server.socket_type) as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                probe.bind(server.server_address)
        where = listener.describe_address(server.address_family, server.socket_type, server.server_address)
        raise OptionError(f"the program now wants {where}; other addresses need a restart", code="PF0303")

    return take


def plain(address: object) -> object:
    """An address as JSON gives it back."""
    return json.loads(json.dumps(address if not isinstance(address, bytes) else os.fsdecode(address)))

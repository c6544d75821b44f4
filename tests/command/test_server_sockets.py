"""How servers that a program makes get their sockets from the command."""

import os
import socket
import socketserver
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

import prefork
from prefork import OptionError
from prefork.command.server_sockets import binding, by_address, in_order, plain

HANDLER = socketserver.BaseRequestHandler
ORIGINALS = [
    (socketserver.TCPServer, "server_bind"),
    (socketserver.TCPServer, "server_activate"),
    (prefork.PreforkMixIn, "server_bind"),
]


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


def listen(stack: ExitStack, number: int) -> list[socket.socket]:
    return [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(number)]


def make(stack: ExitStack, kind: type[Any], address: object) -> Any:
    return stack.enter_context(kind(address, HANDLER))


@pytest.mark.parametrize("kind", [socketserver.TCPServer, prefork.PreforkTCPServer])
def test_in_order(stack: ExitStack, kind: type[Any]) -> None:
    """Servers get the listeners one after the other, whatever address they name; after the last one they bind."""
    sockets = listen(stack, 2)
    with binding(in_order(sockets)) as asked:
        servers = [make(stack, kind, ("127.0.0.1", 0)) for _ in range(3)]
    assert [server.socket for server in servers[:2]] == sockets
    assert [server.server_address for server in servers[:2]] == [sock.getsockname() for sock in sockets]
    assert servers[2].server_address[1] not in (0, *(sock.getsockname()[1] for sock in sockets))
    assert asked == [(server, ["127.0.0.1", 0]) for server in servers]


def test_by_address(stack: ExitStack) -> None:
    """A server gets the next listener if it asks for its address, and is refused if it asks for another."""
    sockets = listen(stack, 2)
    addresses = [sock.getsockname() for sock in sockets]
    with binding(by_address([plain(address) for address in addresses], sockets)):
        assert make(stack, prefork.PreforkTCPServer, addresses[0]).socket is sockets[0]
        with pytest.raises(OptionError, match=r"the program now wants tcp://127\.0\.0\.1:0; other addresses"):
            make(stack, prefork.PreforkTCPServer, ("127.0.0.1", 0))
        with pytest.raises(OSError, match="in use"):
            make(stack, prefork.PreforkTCPServer, addresses[0])
        assert make(stack, prefork.PreforkTCPServer, addresses[1]).socket is sockets[1]


def test_an_adopted_path_is_not_claimed(stack: ExitStack, tmp_path: Path) -> None:
    """A server that adopts a Unix listener leaves file and lock to their owner; one that binds has the settings."""
    path = str(tmp_path / "s")
    with binding(lambda server: None, claims={"unix_mode": 0o640}):
        owner = make(stack, prefork.PreforkUnixStreamServer, path)
    assert os.stat(path).st_mode & 0o777 == 0o640 and owner._claim is not None
    with binding(in_order([owner.socket.dup()])):
        make(stack, prefork.PreforkUnixStreamServer, path).server_close()
    assert sorted(os.listdir(tmp_path)) == ["s", "s.lock"]


@pytest.mark.parametrize("raises", [False, True])
def test_everything_is_put_back(raises: bool) -> None:
    """After the block socketserver and the mix-in bind as they did, also where it has raised."""
    before = [getattr(kind, name) for kind, name in ORIGINALS]
    with pytest.raises(ZeroDivisionError) if raises else ExitStack(), binding(lambda server: None):
        assert all(getattr(kind, name) is not was for (kind, name), was in zip(ORIGINALS, before, strict=True))
        if raises:
            raise ZeroDivisionError
    assert [getattr(kind, name) for kind, name in ORIGINALS] == before

"""socketserver's contract: construction by hand, a bind that fails, closing, and the attributes of a server."""

import os
import socket
import socketserver
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import prefork
from support import ask, descriptors, dial
from support.clients import hear
from support.contract import KINDS, simple
from support.scripts import Start, launch

pytestmark = pytest.mark.timeout(60)


# -- construction ----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_bind_and_activate_by_hand(start: Start, kind: str) -> None:
    """With bind_and_activate=False nothing is bound until server_bind() and server_activate() are called."""
    base, handler, address, family = KINDS[kind]
    program = launch(
        start,
        f"""
        class Server(prefork.{base}):
            {family or "pass"}

        server = Server({address}, {handler}, False)
        assert server.server_address == {address}, server.server_address
        server.server_bind()
        server.server_activate()
        assert server.server_address == server.socket.getsockname() and server.server_address != ("127.0.0.1", 0)
        assert server.fileno() == server.socket.fileno()
        try:
            server.serve_forever()
        finally:
            server.server_close()
        assert server.fileno() == -1
        """,
    ).ready()
    ask(program.address)
    program.finish()


@pytest.fixture
def flat() -> Iterator[None]:
    """This process has no descriptor more after the test than before it."""
    before = descriptors(os.getpid())
    yield
    assert not descriptors(os.getpid()) - before


@pytest.mark.parametrize("server_class", [prefork.PreforkTCPServer, prefork.PreforkUDPServer])
def test_failed_bind_leaks_nothing(flat: None, server_class: Any) -> None:
    """A bind that fails raises its own OSError and leaves no descriptor."""
    kind = server_class.socket_type
    with socket.socket(socket.AF_INET, kind) as taken:
        taken.bind(("127.0.0.1", 0))
        if kind == socket.SOCK_STREAM:
            taken.listen()
        for _ in range(20):
            with pytest.raises(OSError, match="in use"):
                type("Once", (server_class,), {"allow_reuse_address": False})(
                    taken.getsockname(), socketserver.BaseRequestHandler
                )


@pytest.mark.parametrize("server_class", [prefork.PreforkUnixStreamServer, prefork.PreforkUnixDatagramServer])
def test_failed_unix_bind_leaks_nothing(flat: None, tmp_path: Path, server_class: Any) -> None:
    """A Unix bind that fails leaves no descriptor, no lock and no file, wherever it failed."""
    with pytest.raises(FileNotFoundError):
        server_class(str(tmp_path / "no" / "where"), socketserver.BaseRequestHandler)
    with pytest.raises(OSError, match="path too long"):
        server_class(str(tmp_path / ("x" * 120)), socketserver.BaseRequestHandler)

    class Refuses(server_class):  # type: ignore[misc]
        def server_activate(self) -> None:
            raise RuntimeError("ordered trouble")

    with pytest.raises(RuntimeError, match="ordered"):
        Refuses(str(tmp_path / "s"), socketserver.BaseRequestHandler)
    assert os.listdir(tmp_path) == []


def test_leaving_the_block_closes(flat: None, tmp_path: Path) -> None:
    """Leaving the `with` block closes the listener, and a second close is harmless, pool or no pool."""
    path = tmp_path / "s"
    with prefork.PreforkUnixStreamServer(str(path), socketserver.BaseRequestHandler) as server:
        assert path.is_socket()
        assert server.active_children == set()
    assert server.fileno() == -1 and os.listdir(tmp_path) == []
    server.server_close()


def test_serving_a_closed_server() -> None:
    """A server that was closed says so instead of forking workers around nothing."""
    server = prefork.PreforkTCPServer(("127.0.0.1", 0), socketserver.BaseRequestHandler)
    server.server_close()
    with pytest.raises(prefork.OptionError, match="closed"):
        server.serve_forever()


# -- attributes ------------------------------------------------------------------------------------


def backlog_of(sock: socket.socket) -> int:
    """What the kernel keeps as the backlog of a TCP listener (tcp(7), TCP_INFO: tcpi_sacked)."""
    return int(struct.unpack_from("I", sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 104), 28)[0])


def test_request_queue_size_reaches_listen() -> None:
    """`request_queue_size` is the kernel's backlog: 1024 by default, what the class says otherwise."""
    limit = int(Path("/proc/sys/net/core/somaxconn").read_text())
    for size in (None, 7, 300):
        attributes = {} if size is None else {"request_queue_size": size}
        server_class = type("Sized", (prefork.PreforkTCPServer,), attributes)
        with server_class(("127.0.0.1", 0), socketserver.BaseRequestHandler) as server:
            assert backlog_of(server.socket) == min(size or 1024, limit)


@pytest.mark.parametrize("name", ["allow_reuse_address", "allow_reuse_port"])
@pytest.mark.parametrize("value", [True, False])
def test_reuse(name: str, value: bool) -> None:
    """`allow_reuse_address` and `allow_reuse_port` set the socket's options before the bind, or do not."""
    option = {"allow_reuse_address": socket.SO_REUSEADDR, "allow_reuse_port": socket.SO_REUSEPORT}[name]
    server_class = type("Reusing", (prefork.PreforkTCPServer,), {name: value})
    with server_class(("127.0.0.1", 0), socketserver.BaseRequestHandler) as server:
        assert bool(server.socket.getsockopt(socket.SOL_SOCKET, option)) is value


def test_attributes_of_a_server() -> None:
    """`address_family`, `socket_type`, `server_address` and `RequestHandlerClass` are what socketserver makes of
    them."""

    class Six(prefork.PreforkUDPServer):
        address_family = socket.AF_INET6

    with Six(("::1", 0), socketserver.DatagramRequestHandler) as server:
        assert (server.address_family, server.socket_type) == (socket.AF_INET6, socket.SOCK_DGRAM)
        assert server.server_address[0] == "::1" and server.server_address[1] != 0
        assert server.RequestHandlerClass is socketserver.DatagramRequestHandler
        assert (server.timeout, server.max_packet_size) == (None, socketserver.UDPServer.max_packet_size)


@pytest.mark.parametrize("kind", ["udp", "unixgram"])
def test_max_packet_size(start: Start, kind: str) -> None:
    """`max_packet_size` bounds what a worker takes of a datagram."""
    program = launch(start, simple(kind, "max_packet_size = 8")).ready()
    with dial(program.address) as sock:
        sock.sendall(b"12345678-and-more\n")
        assert hear(sock, program.address).split(b":")[1] == b"12345678"
    program.finish()

"""Listening sockets, tried on the real kernel."""

import os
import socket
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from prefork.kernel.listener import Listener, describe, describe_address
from support import descriptors

pytestmark = pytest.mark.timeout(60)


@pytest.fixture(autouse=True)
def flat() -> Iterator[None]:
    """This process has no descriptor more after the test than before it."""
    before = descriptors(os.getpid())
    yield
    assert not descriptors(os.getpid()) - before


@pytest.mark.parametrize(
    ("family", "kind", "address", "text"),
    [
        (socket.AF_INET, socket.SOCK_STREAM, ("127.0.0.1", 80), "tcp://127.0.0.1:80"),
        (socket.AF_INET, socket.SOCK_DGRAM, ("0.0.0.0", 53), "udp://0.0.0.0:53"),
        (socket.AF_INET6, socket.SOCK_STREAM, ("::1", 80, 0, 0), "tcp://[::1]:80"),
        (socket.AF_UNIX, socket.SOCK_STREAM, "/run/x", "unix:/run/x"),
        (socket.AF_UNIX, socket.SOCK_DGRAM, b"/run/x", "unixgram:/run/x"),
        (socket.AF_UNIX, socket.SOCK_STREAM, "\0name", "unix:@name"),
    ],
)
def test_names(family: int, kind: int, address: object, text: str) -> None:
    """An address is written as an operator types it."""
    assert describe_address(family, kind, address) == text


def test_name_of_a_closed_socket() -> None:
    """Describing a socket that is closed already is no error."""
    sock = socket.socket()
    sock.close()
    assert describe(sock) == "a closed socket"


def test_a_held_tcp_listener() -> None:
    """Held, a TCP listener keeps its queue and lets nobody new in; opened again, even as another object, it does."""
    with socket.create_server(("127.0.0.1", 0)) as sock, ExitStack() as stack:
        address = sock.getsockname()
        listener = Listener(sock)
        listener.open(blocking=True)
        stack.enter_context(socket.create_connection(address, 2))
        assert listener.waiting()
        listener.hold()
        assert listener.held and not listener.spent
        with pytest.raises(TimeoutError):
            socket.create_connection(address, 0.2).close()
        listener.empty()
        sock.accept()[0].close()
        with pytest.raises(BlockingIOError):
            sock.accept()
        assert not listener.waiting()
        again = Listener(sock, held=listener.held)
        again.open(blocking=True)
        assert os.get_blocking(sock.fileno()) and not again.held
        stack.enter_context(socket.create_connection(address, 2))
        sock.accept()[0].close()


def test_a_connection_outlives_the_hold() -> None:
    """The filter on the listener leaves established connections alone."""
    with socket.create_server(("127.0.0.1", 0)) as sock, socket.create_connection(sock.getsockname(), 2) as client:
        Listener(sock).hold()
        served, _ = sock.accept()
        with served:
            client.sendall(b"ping")
            assert served.recv(10) == b"ping"
            served.sendall(b"pong")
        assert (client.recv(10), client.recv(10)) == (b"pong", b"")


def test_a_held_udp_socket() -> None:
    """Held, a UDP socket keeps what is queued and drops what comes."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock, socket.socket(type=socket.SOCK_DGRAM) as client:
        sock.bind(("127.0.0.1", 0))
        client.connect(sock.getsockname())
        listener = Listener(sock)
        client.send(b"queued")
        listener.hold()
        client.send(b"late")
        listener.empty()
        assert sock.recv(10) == b"queued"
        with pytest.raises(BlockingIOError):
            os.read(sock.fileno(), 10)
        listener.open(blocking=True)
        client.send(b"again")
        assert sock.recv(10) == b"again"


def test_a_held_unix_listener(tmp_path: Path) -> None:
    """Held, a Unix listener keeps its queue, refuses who comes, and is spent."""
    path = str(tmp_path / "s")
    with socket.socket(socket.AF_UNIX) as sock, socket.socket(socket.AF_UNIX) as client:
        sock.bind(path)
        sock.listen()
        client.connect(path)
        listener = Listener(sock)
        listener.hold()
        assert listener.spent
        with socket.socket(socket.AF_UNIX) as late, pytest.raises(ConnectionRefusedError):
            late.connect(path)
        sock.accept()[0].close()


def test_holding_a_closed_socket() -> None:
    """A listener that the program has closed is no error of the master's."""
    for sock in (socket.create_server(("127.0.0.1", 0)), socket.socket(socket.AF_UNIX)):
        listener = Listener(sock)
        sock.close()
        listener.hold()
        listener.empty()

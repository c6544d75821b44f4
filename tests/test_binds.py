"""Addresses of the command: both kinds of IP on one port, files of Unix sockets and who may use them, names without a
file."""

import socket
from collections.abc import Callable
from typing import Any

import pytest

from programs2.scripts import Start, path_of_modules
from support import Address, Program, ask

pytestmark = pytest.mark.timeout(60)


@pytest.fixture
def command(start: Start) -> Callable[..., Program]:
    """`command("Handler", "-b", ...)`: the command over a handler of `kit`, with two workers."""

    def begin(name: str, *flags: object, text: str = "", **options: Any) -> Program:
        files = {"app.py": "from kit import *\n\n" + text}
        return start("prefork", f"app:{name}", "-w", 2, *flags, files=files, env=path_of_modules(), **options)

    return begin


Command = Callable[..., Program]


def has_ipv6() -> bool:
    try:
        with socket.socket(socket.AF_INET6) as probe:
            probe.bind(("::1", 0))
    except OSError:
        return False
    return True


needs_ipv6 = pytest.mark.skipif(not has_ipv6(), reason="needs IPv6")


# -- all addresses of both kinds -------------------------------------------------------------------


@needs_ipv6
@pytest.mark.parametrize(
    ("name", "hosts"),
    [
        ("Handler", ("0.0.0.0", "[::]")),
        ("Handler", ("[::0]", "0.0.0.0")),
        ("Handler", ("127.0.0.1", "[::]")),
        ("Datagrams", ("0.0.0.0", "[::]")),
    ],
)
def test_both_on_one_port(command: Command, port: int, name: str, hosts: tuple[str, str]) -> None:
    """All addresses of IPv4 and of IPv6, on one port and in either order, are served, before and after a reload."""
    scheme = "udp" if name == "Datagrams" else "tcp"
    flags = [flag for host in hosts for flag in ("-b", f"{scheme}://{host}:{port}")]
    program = command(name, *flags).ready(20)
    workers = program.wait_ready(2)
    for _ in range(2):
        for host in ("127.0.0.1", "::1"):
            assert ask(Address(scheme, host, port)).pid in workers
        program.reload()
        workers = program.wait_ready(2, without=workers)
    program.finish()


@needs_ipv6
def test_a_factory_on_one_port(command: Command, port: int) -> None:
    """So it is where the program makes the servers."""
    text = """
class Six(prefork.PreforkTCPServer):
    address_family = socket.AF_INET6

def made(address):
    return (Six if ":" in address[0] else prefork.PreforkTCPServer)(address, Handler)
"""
    program = command("made", "-b", f"tcp://[::]:{port}", "-b", f"tcp://0.0.0.0:{port}", text=text).ready(20)
    workers = program.wait_ready(2)
    assert {ask(Address("tcp", host, port)).pid in workers for host in ("127.0.0.1", "::1")} == {True}
    program.finish()


@needs_ipv6
def test_ipv6_alone(command: Command, port: int) -> None:
    """Alone, all addresses of IPv6 are what the system makes of them; so they are beside IPv4 on another port."""
    with open("/proc/sys/net/ipv6/bindv6only", encoding="ascii") as setting:
        if setting.read().strip() != "0":
            pytest.skip("this system keeps IPv4 out by itself")
    program = command("Handler", "-b", f"tcp://[::]:{port}", "-b", "tcp://0.0.0.0:0").ready(20)
    workers = program.wait_ready(2)
    assert ask(Address("tcp", "127.0.0.1", port)).pid in workers
    program.finish()

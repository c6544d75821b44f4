"""What `--bind` takes, and where a program listens without it."""

import os
import socket
from pathlib import Path

import pytest

from prefork.command.addresses import BindAddress, BindAddresses, default_address
from prefork.errors import OptionError
from prefork.kernel.program_directory import ProgramDirectory

V4, V6, UNIX = socket.AF_INET, socket.AF_INET6, socket.AF_UNIX
ANY, STREAM, DATAGRAM = 0, socket.SOCK_STREAM, socket.SOCK_DGRAM


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ProgramDirectory:
    """A directory that the command was started in."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PWD", str(tmp_path))
    return ProgramDirectory()


@pytest.mark.parametrize(
    ("text", "family", "kind", "address"),
    [
        ("8000", V4, ANY, ("127.0.0.1", 8000)),
        ("0", V4, ANY, ("127.0.0.1", 0)),
        (":8000", V4, ANY, ("0.0.0.0", 8000)),
        ("*:8000", V4, ANY, ("0.0.0.0", 8000)),
        ("127.0.0.1:8000", V4, ANY, ("127.0.0.1", 8000)),
        ("localhost:8000", V4, ANY, ("localhost", 8000)),
        ("example.org:8000", V4, ANY, ("example.org", 8000)),
        ("[::]:8000", V6, ANY, ("::", 8000)),
        ("[::1]:8000", V6, ANY, ("::1", 8000)),
        ("tcp://127.0.0.1:8000", V4, STREAM, ("127.0.0.1", 8000)),
        ("tcp://:8000", V4, STREAM, ("0.0.0.0", 8000)),
        ("udp://[::1]:8000", V6, DATAGRAM, ("::1", 8000)),
        ("/run/name.sock", UNIX, ANY, "/run/name.sock"),
        ("unix:/run/name.sock", UNIX, STREAM, "/run/name.sock"),
        ("unix://run/name.sock", UNIX, STREAM, "/run/name.sock"),
        ("unix:///run/name.sock", UNIX, STREAM, "/run/name.sock"),
        ("unixgram:/run/name.sock", UNIX, DATAGRAM, "/run/name.sock"),
        ("unix:@name", UNIX, STREAM, "\0name"),
    ],
)
def test_forms(place: ProgramDirectory, text: str, family: int, kind: int, address: object) -> None:
    """Every form that people type is understood; without a scheme the kind of socket is left to the program."""
    parsed = BindAddress.parse(text, place)
    assert (parsed.family, parsed.kind, parsed.address, parsed.text) == (family, kind, address, text)


@pytest.mark.parametrize("text", ["./name.sock", "unix:name.sock", "unix:./name.sock"])
def test_relative_paths(place: ProgramDirectory, text: str) -> None:
    """A relative path begins where the command was started."""
    assert BindAddress.parse(text, place).address == os.path.join(place.name, "name.sock")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "HOST:PORT"),
        ("name", "HOST:PORT"),
        ("name.sock", "./name.sock"),
        ("127.0.0.1", "127.0.0.1:8000"),
        ("localhost", "localhost:8000"),
        ("[::1]", "[::1]:8000"),
        ("tcp://localhost", "tcp://localhost:8000"),
        ("::1", "[::1]:8000"),
        ("::", "[::]:8000"),
        ("::1:8000", "[::1]:8000"),
        ("tcp://::1:80", "tcp://[::1]:80"),
        (":x", "'x'"),
        (":", "''"),
        ("65536", "65535"),
        (":99999999999", "65535"),
        (":\uff18\uff10", "65535"),
        ("http://127.0.0.1:8000/", "-b 127.0.0.1:8000"),
        ("http://127.0.0.1", "-b 127.0.0.1:80"),
        ("https://example.org:443", "no TLS"),
        ("fd://3", "no address"),
        ("unix:", "unix:/run/name.sock"),
        ("unix:///", "unix:/run/name.sock"),
        ("unix:@", "unix:@name"),
        ("/", "/run/name.sock"),
        ("./folder/", "./folder/name.sock"),
        ("/tmp", "/tmp/name.sock"),
    ],
)
def test_refused(place: ProgramDirectory, text: str, says: str) -> None:
    """What is no address is refused in one line, which shows what was typed and what to type."""
    with pytest.raises(OptionError) as caught:
        BindAddress.parse(text, place)
    assert str(caught.value).startswith("--bind: ") and says in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("port", "address"), [("", ("127.0.0.1", 8000)), (" ", ("127.0.0.1", 8000)), ("5000", ("0.0.0.0", 5000))]
)
def test_default(port: str, address: object) -> None:
    """Without --bind only this machine is served; where a platform sets PORT, everybody is."""
    assert default_address(port).address == address
    assert [each.address for each in BindAddresses(port=port).of_kind(STREAM)] == [address]


@pytest.mark.parametrize("port", ["x", "-1", "70000", "80 81", "tcp://10.0.0.1:80"])
def test_wrong_port_of_the_environment(place: ProgramDirectory, port: str) -> None:
    """A wrong PORT is named, and only where it would count."""
    with pytest.raises(OptionError, match="PORT in the environment is"):
        BindAddresses(port=port).of_kind(STREAM)
    typed = BindAddresses((BindAddress.parse(":0", place),), port)
    assert [each.kind for each in typed.of_kind(DATAGRAM)] == [DATAGRAM]


def test_a_scheme_keeps_its_kind(place: ProgramDirectory) -> None:
    """A kind that was typed is not replaced by that of the program, which then refuses it."""
    addresses = BindAddresses(tuple(BindAddress.parse(text, place) for text in ("tcp://:0", ":0", "./s")))
    assert [each.kind for each in addresses.of_kind(DATAGRAM)] == [STREAM, DATAGRAM, DATAGRAM]

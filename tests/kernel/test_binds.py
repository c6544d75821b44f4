"""Addresses of the command: both kinds of IP on one port, files of Unix sockets and who may use them, names without a
file."""

import grp
import os
import signal
import stat
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import prefork
from prefork.command.addresses import BindAddress
from prefork.errors import OptionError
from prefork.kernel.program_directory import ProgramDirectory
from support import Address, Program, ask
from support.clients import has_ipv6
from support.scripts import Start, path_of_modules

pytestmark = pytest.mark.timeout(60)


@pytest.fixture
def command(start: Start) -> Callable[..., Program]:
    """`command("Handler", "-b", ...)`: the command over a handler of `kit`, with two workers."""

    def begin(name: str, *flags: object, text: str = "", **options: Any) -> Program:
        files = {"app.py": "from kit import *\n\n" + text}
        return start("prefork", f"app:{name}", "-w", 2, *flags, files=files, env=path_of_modules(), **options)

    return begin


Command = Callable[..., Program]


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


# -- files of Unix sockets -------------------------------------------------------------------------

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root may give a file to any group")
GROUP = 54321  # of nobody here


def mode_of(path: Path | str) -> str:
    return f"{stat.S_IMODE(os.stat(path).st_mode):04o}"


@pytest.mark.parametrize("text", ["0660", "660", "0o660"])
def test_unix_mode(command: Command, text: str) -> None:
    """--unix-mode is octal however it is written, overrules the server's own, and holds for a factory's servers too."""
    text_of_server = """
class Own(prefork.PreforkUnixStreamServer):
    unix_mode = 0o600

def made(address):
    return Own(address, Handler)
"""
    program = command("made", "-b", "unix:{run}/s", "--unix-mode", text, text=text_of_server).ready(20)
    assert mode_of(program.run / "s") == "0660" and mode_of(program.run / "s.lock") == "0600"
    assert ask(program.address).pid in program.wait_ready(2)
    program.finish()


@needs_root
@pytest.mark.parametrize(("mode", "wanted"), [((), "0660"), (("--unix-mode", "0620"), "0620")])
@pytest.mark.parametrize(("scheme", "name"), [("unix", "Handler"), ("unixgram", "Datagrams")])
def test_unix_group(command: Command, scheme: str, name: str, mode: tuple[str, ...], wanted: str) -> None:
    """--unix-group gives the file to a group, and to that group what --unix-mode says, or all; a reload and a
    retirement change nothing, and the file is removed in the end."""
    program = command(name, "-b", f"{scheme}:{{run}}/s", "--unix-group", GROUP, *mode).ready(20)
    before = os.stat(program.run / "s")
    assert (before.st_gid, mode_of(program.run / "s")) == (GROUP, wanted)
    assert (os.stat(program.run / "s.lock").st_gid, mode_of(program.run / "s.lock")) == (os.getegid(), "0600")
    workers = program.wait_ready(2)
    program.reload()
    workers = program.wait_ready(2, without=workers)
    assert ask(program.address).pid in workers
    assert os.stat(program.run / "s").st_ino == before.st_ino
    program.finish()


@needs_root
def test_a_client_of_the_group(command: Command) -> None:
    """Another user in the group is served; one who is not is not let in."""
    program = command("Handler", "-b", "unix:{run}/s", "--unix-group", GROUP).ready(20)
    for directory in (program.directory, program.run):
        directory.chmod(0o755)
    for group, code in ((GROUP, 0), (GROUP + 1, 1)):
        dial = f"import os, socket; os.setgroups([]); os.setgid({group}); os.setuid(65534); "
        dial += f"socket.socket(socket.AF_UNIX).connect({str(program.run / 's')!r})"
        done = subprocess.run([sys.executable, "-c", dial], capture_output=True, text=True, timeout=20, check=False)
        assert (done.returncode, "PermissionError" in done.stderr) == (code, bool(code)), done.stderr
    program.finish()


@needs_root
def test_never_wider(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before its group has the file, nobody but the owner may use it; afterwards it has the mode that was asked for."""
    seen: list[tuple[str, str, int]] = []
    path = str(tmp_path / "s")

    class Server(prefork.PreforkUnixDatagramServer):
        unix_mode, unix_group = 0o666, str(GROUP)

    def watch(name: str, call: Callable[..., Any]) -> None:
        def watched(*given: Any) -> Any:
            if os.path.exists(path):
                seen.append((name, mode_of(path), os.stat(path).st_gid))
            return call(*given)

        monkeypatch.setattr(os, name, watched)

    for name in ("lstat", "chown", "chmod"):
        watch(name, getattr(os, name))
    with Server(path, prefork.DatagramRequestHandler):
        monkeypatch.undo()
        assert (mode_of(path), os.stat(path).st_gid) == ("0666", GROUP)
    assert seen == [("lstat", "0600", os.getegid()), ("chown", "0600", os.getegid()), ("chmod", "0600", GROUP)]


def test_a_group_by_name(tmp_path: Path) -> None:
    """The group may be a name, also as an attribute in a program."""
    name = grp.getgrgid(os.getegid()).gr_name

    class Server(prefork.PreforkUnixStreamServer):
        unix_group = name

    with Server(str(tmp_path / "s"), prefork.StreamRequestHandler):
        assert (mode_of(tmp_path / "s"), os.stat(tmp_path / "s").st_gid) == ("0660", os.getegid())
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--unix-group", "no-such-group"], "unix_group: there is no group 'no-such-group' on this system"),
        (["--unix-mode", "0800"], "must be an octal number from 0o0 to 0o777 (or None), not '0800'"),
        (["--unix-mode", "1777"], "must be an octal number from 0o0 to 0o777 (or None), not 1023"),
        (["--unix-mode", "rw"], "must be an octal number from 0o0 to 0o777 (or None), not 'rw'"),
    ],
)
def test_what_is_wrong_is_said(command: Command, flags: list[str], says: str) -> None:
    """A group or permissions that there are not: exit code 2, one line that names them, and nothing left."""
    program = command("Handler", "-b", "unix:{run}/s", *flags)
    assert program.wait_exit(20).code == 2
    assert says in program.log.splitlines()[-1]
    program.finish(code=2, allow=["usage: .*", " .*", "prefork: error: .*"])


def test_a_group_of_others(tmp_path: Path) -> None:
    """Who may not give the file to the group is told so: exit code 1, with the path, and nothing is left."""
    drop = "if os.geteuid() == 0:\n    os.setgroups([])\n    os.setgid(65534)\n    os.setuid(65534)\n"
    (tmp_path / "app.py").write_text("from kit import *\n" + drop)
    with tempfile.TemporaryDirectory() as folder:  # which anybody can reach
        os.chmod(folder, 0o777)
        flags = ["-b", f"unix:{folder}/s", "--unix-group", str(GROUP)]
        done = subprocess.run(
            [sys.executable, "-m", "prefork", "app:Handler", *flags],
            cwd=tmp_path,
            env={**os.environ, **path_of_modules()},
            capture_output=True,
            text=True,
            timeout=20,
            check=False,
        )
        assert (done.returncode, done.stderr.count("\n")) == (1, 1), done.stderr
        assert f"{folder}/s: its group cannot be set to {GROUP}: " in done.stderr
        assert os.listdir(folder) == []


# -- names without a file --------------------------------------------------------------------------


@pytest.mark.skipif(sys.platform != "linux", reason="abstract sockets are Linux's")
@pytest.mark.parametrize(("scheme", "name"), [("unix", "Handler"), ("unixgram", "Datagrams")])
def test_abstract(command: Command, port: int, scheme: str, name: str) -> None:
    """`@` is a name without a file: it is served before and after a reload, is nobody else's meanwhile, and is free
    after kill -9."""
    bind = f"{scheme}:@prefork-{port}"
    program = command(name, "-b", bind).ready(20)
    assert bind in program.log
    address = Address(scheme, f"\0prefork-{port}")
    workers = program.wait_ready(2)
    assert ask(address).pid in workers
    program.reload()
    workers = program.wait_ready(2, without=workers)
    assert ask(address).pid in workers
    second = command(name, "-b", bind)
    assert second.wait_exit(20).code == 1
    assert f"cannot listen on {bind}: Address already in use" in second.log
    second.finish(code=1, allow=["prefork: error: .*"])
    assert [path for path in (*program.run.iterdir(), *program.work.glob("@*"))] == []
    program.send(signal.SIGKILL)
    program.wait_exit()
    third = command(name, "-b", bind).ready(20)
    assert ask(address).pid in third.wait_ready(2)
    third.finish()
    program.finish(code=-signal.SIGKILL)


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["-b", "unix:@"], "--bind: 'unix:@' names no socket; write unix:@name"),
        (["-b", "unix:@a", "--unix-mode", "600"], "unix_mode: unix:@a has no file, everybody here may use it"),
        (["-b", "tcp://127.0.0.1:0", "-b", "unixgram:@a", "--unix-group", "0"], "unix_group: unixgram:@a has no file"),
        (["-b", "unix:@" + "a" * 107], "107 bytes"),
    ],
)
@pytest.mark.skipif(sys.platform != "linux", reason="abstract sockets are Linux's")
def test_abstract_and_wrong(command: Command, flags: list[str], says: str) -> None:
    """A name that is empty or too long, and permissions of what has none, are refused in one line."""
    program = command("Handler", *flags)
    assert program.wait_exit(20).code == 2
    assert says in program.log
    program.finish(code=2, allow=["prefork: error: .*"])


def test_abstract_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where there are no abstract sockets the mend is named; a file that begins with @ is still to be had."""
    monkeypatch.setattr(sys, "platform", "darwin")
    with pytest.raises(OptionError, match=r"only Linux has; write \./@a for a file"):
        BindAddress.parse("unix:@a", ProgramDirectory())
    assert os.path.basename(BindAddress.parse("unix:./@a", ProgramDirectory()).address) == "@a"

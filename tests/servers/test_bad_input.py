"""Bad settings, bad addresses, bad clients: a clear error or a pool that serves on, and nothing left behind."""

import contextlib
import os
import signal
import socket
import socketserver
import stat
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

import prefork
from support import Program, ask, descriptors, dial, patterns, pids_serving, until
from support.clients import hear, reset
from support.scripts import TCP, Notes, Start, launch, noted, path_of_modules, rest

pytestmark = pytest.mark.timeout(60)


@pytest.fixture(autouse=True)
def flat() -> Iterator[None]:
    """This process has no descriptor and no child more after the test than before it."""
    before = descriptors(os.getpid())
    yield
    assert not descriptors(os.getpid()) - before


# -- settings --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("workers", 0),
        ("workers", -1),
        ("workers", "4"),
        ("workers", 2.0),
        ("workers", True),
        ("workers", None),
        ("workers", 10**6),
        ("request_timeout", 0),
        ("request_timeout", "1"),
        ("request_timeout", float("nan")),
        ("boot_timeout", None),
        ("boot_timeout", 0.0),
        ("graceful_timeout", -1),
        ("graceful_timeout", float("inf")),
        ("max_requests", -1),
        ("max_requests_jitter", -1),
        ("max_memory", "1G"),
        ("max_lifetime", -0.5),
        ("max_surge", 0),
        ("unix_mode", 0o1777),
        ("block_on_close", "no"),
        ("worker_class", "nothing"),
        ("worker_class", "os:getpid"),
        ("worker_class", "no.such.module:Worker"),
        ("worker_class", object),
        ("worker_class", 7),
    ],
)
def test_wrong_settings(name: str, value: object) -> None:
    """A setting out of range or of the wrong type is one line that names it; nothing was forked or taken over."""
    server_class = type("Wrong", (prefork.PreforkTCPServer,), {name: value})
    with server_class(("127.0.0.1", 0), socketserver.BaseRequestHandler) as server:
        with pytest.raises(prefork.OptionError) as found:
            server.serve_forever()
        assert "\n" not in str(found.value) and str(found.value).startswith(f"{name}: ")
        assert server.active_children == set()
        with pytest.raises(prefork.OptionError):
            server.handle_request()


@pytest.mark.parametrize("handler", [None, 7, "Handler", object()])
def test_handler_that_is_none(handler: Any) -> None:
    """A handler class that cannot be called is refused before anything is forked, in one line."""
    with prefork.PreforkTCPServer(("127.0.0.1", 0), handler) as server:
        with pytest.raises(prefork.OptionError, match=r"^RequestHandlerClass: .* is not a handler") as found:
            server.serve_forever()
        assert "\n" not in str(found.value)


def test_handler_of_the_other_kind() -> None:
    """A stream handler on datagrams, or the other way round, is refused; a plain BaseRequestHandler serves either."""
    with (
        prefork.PreforkUDPServer(("127.0.0.1", 0), socketserver.StreamRequestHandler) as server,
        pytest.raises(prefork.OptionError, match="datagrams"),
    ):
        server.serve_forever()
    with (
        prefork.PreforkTCPServer(("127.0.0.1", 0), socketserver.DatagramRequestHandler) as server,
        pytest.raises(prefork.OptionError, match="streams"),
    ):
        server.serve_forever()


def test_nothing_to_serve() -> None:
    """serve() without a server says so."""
    with pytest.raises(prefork.OptionError, match="at least one"):
        prefork.serve()


# -- addresses -------------------------------------------------------------------------------------


class Silent(socketserver.BaseRequestHandler):
    """Answers nothing."""


UNIX = [prefork.PreforkUnixStreamServer, prefork.PreforkUnixDatagramServer]
PLAIN = {
    prefork.PreforkUnixStreamServer: socketserver.UnixStreamServer,
    prefork.PreforkUnixDatagramServer: socketserver.UnixDatagramServer,
}


@pytest.mark.parametrize("server_class", UNIX)
def test_live_path_of_another_server(tmp_path: Path, server_class: Any) -> None:
    """A path on which a server lives that knows nothing of prefork is refused, and its file stays as it is."""
    path = tmp_path / "s"
    with PLAIN[server_class](str(path), Silent) as other:
        other.socket.settimeout(2)
        inode = path.stat().st_ino
        for _ in range(3):
            with pytest.raises(OSError, match="another server") as found:
                server_class(str(path), Silent)
            assert found.value.filename == str(path)
        assert path.stat().st_ino == inode and os.listdir(tmp_path) == ["s"]
        with socket.socket(socket.AF_UNIX, server_class.socket_type) as client:
            client.connect(str(path))


@pytest.mark.parametrize("server_class", UNIX)
def test_live_path_of_the_other_kind(tmp_path: Path, server_class: Any) -> None:
    """A path on which a server of the other kind of socket lives is refused too."""
    (other_class,) = [plain for mine, plain in PLAIN.items() if mine is not server_class]
    path = tmp_path / "s"
    with other_class(str(path), Silent):
        with pytest.raises(OSError, match="another server"):
            server_class(str(path), Silent)
        assert os.listdir(tmp_path) == ["s"]


def test_live_path_with_a_full_backlog(tmp_path: Path) -> None:
    """A live server that is too busy to accept is no stale path."""
    path = tmp_path / "s"
    with socket.socket(socket.AF_UNIX) as other, ExitStack() as stack:
        other.bind(str(path))
        other.listen(0)
        with contextlib.suppress(BlockingIOError):
            while True:
                client = stack.enter_context(socket.socket(socket.AF_UNIX))
                client.setblocking(False)
                client.connect(str(path))
        with pytest.raises(OSError, match="another server"):
            prefork.PreforkUnixStreamServer(str(path), Silent)


@pytest.mark.parametrize("server_class", UNIX)
def test_stale_path(tmp_path: Path, server_class: Any) -> None:
    """A path that nobody lives on any more is taken over, and removed in the end."""
    path = tmp_path / "s"
    PLAIN[server_class](str(path), Silent).server_close()
    (tmp_path / "s.lock").write_bytes(b"")
    assert path.is_socket()
    with server_class(str(path), Silent):
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("what", ["file", "directory", "link"])
@pytest.mark.parametrize("server_class", UNIX)
def test_path_that_is_no_socket(tmp_path: Path, server_class: Any, what: str) -> None:
    """A file, a directory, or a link on the path is refused and not touched."""
    path = tmp_path / "s"
    if what == "file":
        path.write_text("precious")
    elif what == "directory":
        path.mkdir()
    else:
        path.symlink_to("elsewhere")
    with pytest.raises(OSError, match="not a socket"):
        server_class(str(path), Silent)
    assert os.listdir(tmp_path) == ["s"]
    if what == "file":
        assert path.read_text() == "precious"


def test_lock_that_is_a_link(tmp_path: Path) -> None:
    """A link in the place of the lock is not followed."""
    (tmp_path / "s.lock").symlink_to(tmp_path / "victim")
    with pytest.raises(OSError, match="symbolic"):
        prefork.PreforkUnixStreamServer(str(tmp_path / "s"), Silent)
    assert os.listdir(tmp_path) == ["s.lock"]


def test_path_is_ours_wherever_we_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A relative path is removed in the end although the program has changed its directory; its mode is as set."""
    monkeypatch.chdir(tmp_path)

    class Open(prefork.PreforkUnixStreamServer):
        unix_mode = 0o660

    with Open("s", Silent):
        assert stat.S_IMODE((tmp_path / "s").stat().st_mode) == 0o660
        monkeypatch.chdir("/")
    assert os.listdir(tmp_path) == []


def as_nobody(directory: Path, bind: str) -> tuple[int, str]:
    """The command, whose program gives up its privileges before the bind."""
    drop = "import os\nif os.geteuid() == 0:\n    os.setgroups([])\n    os.setgid(65534)\n    os.setuid(65534)\n"
    (directory / "app.py").write_text("from kit import *\n" + drop)
    command = [sys.executable, "-m", "prefork", "app:Handler", "-b", bind, "-w", "1"]
    done = subprocess.run(
        command,
        cwd=directory,
        env={**os.environ, **path_of_modules()},
        capture_output=True,
        text=True,
        timeout=20,
        check=False,
    )
    return done.returncode, done.stderr


def test_path_without_permission(tmp_path: Path) -> None:
    """A directory that may not be written: exit code 1, one line, and the path in it."""
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o555)
    code, err = as_nobody(tmp_path, f"unix:{closed}/s")
    assert (code, err.count("\n")) == (1, 1), err
    assert "ermission denied" in err and str(closed) in err
    assert os.listdir(closed) == []


def test_port_without_permission(tmp_path: Path) -> None:
    """A port that only root may have: exit code 1, one line, and the address in it."""
    lowest = int(Path("/proc/sys/net/ipv4/ip_unprivileged_port_start").read_text())
    if lowest <= 1:
        pytest.skip("this system lets everybody bind every port")
    code, err = as_nobody(tmp_path, "tcp://127.0.0.1:1")
    assert (code, err.count("\n")) == (1, 1), err
    assert "ermission denied" in err and "tcp://127.0.0.1:1" in err


# -- clients ---------------------------------------------------------------------------------------


def served(start: Start, kind: str = "PreforkTCPServer", handler: str = "Handler", extra: str = "pass") -> Program:
    address = 'str(RUN / "s")' if "Unix" in kind else TCP
    body = f"class S(prefork.{kind}):\n    workers = 2\n    {extra}\n\n"
    body += f"with S({address}, {handler}) as server:\n    server.serve_forever()\n"
    return launch(start, body, allow=[patterns.ANYTHING]).ready()


STREAMS = ["PreforkTCPServer", "PreforkUnixStreamServer"]


@pytest.mark.parametrize("kind", STREAMS)
def test_client_that_sends_nothing(start: Start, kind: str) -> None:
    """A client that connects and says nothing holds one worker; the others serve, and it is let go when it goes."""
    program = served(start, kind)
    workers = program.wait_ready(2)
    with dial(program.address):
        # Until the silent one is accepted both may answer; then one.
        until(lambda: len({ask(program.address).pid for _ in range(6)}) == 1, 10, "one worker serves")
    pids_serving(program.address, 2)
    assert program.wait_ready(2) == workers
    program.finish()


@pytest.mark.parametrize("kind", STREAMS)
@pytest.mark.parametrize(
    "data", [b"half a line", b"", b"\n", b"\0\xff\xfe\n", b"\x16\x03\x01\x02\x00" * 100 + b"\n", b"x" * 200_000],
    ids=["half", "empty", "newline", "bytes", "hello", "long"],
)  # fmt: skip
def test_client_that_sends_garbage(start: Start, kind: str, data: bytes) -> None:
    """Garbage, half a request, nothing at all, then the end: at worst the handler's error, never the worker."""
    program = served(start, kind)
    workers = program.wait_ready(2)
    for _ in range(6):
        with dial(program.address) as sock, contextlib.suppress(ConnectionError):
            sock.sendall(data)
            sock.shutdown(socket.SHUT_WR)
            rest(sock)
    pids_serving(program.address, 2)
    assert program.wait_ready(2) == workers
    program.finish()


@pytest.mark.parametrize("when", ["at once", "after the request", "during the answer"])
def test_client_that_resets(start: Start, when: str) -> None:
    """A reset, before the accept, before the answer, or in the middle of it, costs no worker."""
    program = served(start)
    workers = program.wait_ready(2)
    for _ in range(50):
        sock = dial(program.address)
        if when != "at once":
            sock.sendall(b"x\n")
        if when == "during the answer":
            sock.recv(1)
        reset(sock)
    pids_serving(program.address, 2)
    assert program.wait_ready(2) == workers
    program.finish()


@pytest.mark.parametrize("kind", STREAMS)
def test_flood_of_connects(start: Start, kind: str) -> None:
    """A thousand clients that connect and close at once, from several threads, leave the pool as it was."""
    program = served(start, kind)
    workers = program.wait_ready(2)

    def flood() -> None:
        for number in range(250):
            sock = dial(program.address)
            if number % 2 and not program.address.is_unix:
                reset(sock)
            else:
                sock.close()

    with program.flat():
        threads = [threading.Thread(target=flood) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        pids_serving(program.address, 2, timeout=20)
    assert program.wait_ready(2) == workers
    program.finish()


@pytest.mark.parametrize("size", [0, 1, 8193, 65507])
def test_datagrams_of_every_size(start: Start, size: int) -> None:
    """With a max_packet_size to match, a datagram of any size up to 65,507 bytes travels both ways."""
    program = launch(
        start,
        """
        class Echo(socketserver.DatagramRequestHandler):
            def handle(self):
                self.wfile.write(self.rfile.read())

        class S(prefork.PreforkUDPServer):
            workers = 2
            max_packet_size = 65536

        with S(("127.0.0.1", 0), Echo) as server:
            server.serve_forever()
        """,
    ).ready()
    data = os.urandom(size)
    for _ in range(5):
        with dial(program.address) as sock:
            sock.send(data)
            assert hear(sock, program.address) == data
    program.finish()


def test_datagram_too_long(start: Start, notes: Notes) -> None:
    """A datagram longer than max_packet_size is cut, as socketserver does, and an answer that is too long is an
    error."""
    program = launch(
        start,
        """
        class Long(socketserver.DatagramRequestHandler):
            def handle(self):
                data = self.rfile.read()
                note(f"got {len(data)}")
                self.wfile.write(data if len(data) < 100 else b"x" * 70000)

        class S(prefork.PreforkUDPServer):
            workers = 1

        with S(("127.0.0.1", 0), Long) as server:
            server.serve_forever()
        """,
        allow=[patterns.HANDLER_ERROR],
    ).ready()
    before = program.wait_ready(1)
    with dial(program.address) as sock:
        sock.send(b"x" * 65507)
        assert noted(notes, "got") == ["8192"]
        sock.send(b"short")
        assert hear(sock, program.address) == b"short"
    assert program.wait_ready(1) == before
    assert "too long" in program.log
    program.finish()


def test_datagram_from_nobody(start: Start) -> None:
    """A Unix datagram whose sender has no name cannot be answered: an error of the handler, not of the worker."""
    program = served(start, "PreforkUnixDatagramServer", "Datagrams")
    workers = program.wait_ready(2)
    for data in (b"x\n", b"", b"x raise\n") * 4:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
            sock.connect(program.address.where)
            sock.send(data)
    pids_serving(program.address, 2)
    assert program.wait_ready(2) == workers
    program.finish()


@pytest.mark.parametrize("loop", ["server.serve_forever()", "prefork.serve(server, other)"])
def test_datagrams_to_a_client_that_does_not_read(start: Start, notes: Notes, loop: str) -> None:
    """Answers wait for room at a client whose queue is full, also while the pool stops and beside other listeners."""
    program = launch(
        start,
        f"""
        class Slow(Datagrams):
            def finish(self):
                note("answers")
                super().finish()

        class S(prefork.PreforkUnixDatagramServer):
            workers = 2

        with S(str(RUN / "s"), Slow) as server, prefork.PreforkUDPServer(("127.0.0.1", 0), Slow) as other:
            {loop}
        """,
    ).ready()
    (path,) = (address.where for address in program.addresses if address.is_unix)
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as client:
        client.bind(str(program.run / "client"))
        client.settimeout(10)
        for number in range(13):  # 11 answers fill the queue, and each worker has another in progress
            client.sendto(f"n{number}\n".encode(), path)
            noted(notes, "answers", number + 1)
        program.send(signal.SIGTERM)
        program.wait_for(patterns.STOPPING)
        answers = {client.recv(1000).split(b":")[1] for _ in range(13)}
    assert answers == {b"n%d" % number for number in range(13)}
    assert program.wait_exit().code == 0
    os.unlink(program.run / "client")
    program.finish()


def test_client_with_a_strange_name(
    start: Start, tmp_path: Path, notes: Notes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A Unix client may be bound to any bytes; what is said of it is printable."""
    program = launch(
        start,
        """
        class S(prefork.PreforkUnixStreamServer):
            workers = 1

            def worker_exited(self, report):
                note(f"exit {report.serving!r}")

        with S(str(RUN / "s"), Handler) as server:
            server.serve_forever()
        """,
    ).ready()
    monkeypatch.chdir(tmp_path)
    with program.address.socket() as sock:
        sock.bind(b"\xff\n\x1b[31m")
        sock.connect(program.address.where)
        sock.sendall(b"x gate go\n")
        noted(notes, "begun")
        program.kill_workers(*program.children())
    (line,) = noted(notes, "exit")
    assert "\\x1b" not in line and "?" in line, line
    program.finish()

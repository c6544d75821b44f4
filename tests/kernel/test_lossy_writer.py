"""What cannot be written at once is dropped and counted, and never waited for."""

import contextlib
import logging
import os
import pty
import resource
import signal
import socket
import subprocess
import sys
import termios
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import prefork.kernel.log_stderr as log_stderr
from prefork.kernel.lossy_writer import Writer, reopen, settle
from support import descriptors
from support.pipes import drained, fill, pipe

pytestmark = pytest.mark.timeout(20)

DROPPED = b": 3 messages were dropped because standard error was full [PF0501]\n"


@pytest.fixture(autouse=True)
def flat() -> Iterator[None]:
    """This process has no descriptor more after the test than before it."""
    before = descriptors(os.getpid())
    yield
    assert not descriptors(os.getpid()) - before


@contextlib.contextmanager
def terminal() -> Iterator[tuple[int, int]]:
    master, slave = pty.openpty()
    try:
        yield master, slave
    finally:
        os.close(master)
        os.close(slave)


def check_full(to: Writer, reader: int) -> None:
    """What does not fit is dropped and counted; the count is said once there is room."""
    for number in range(1, 4):
        assert not to.write(b"lost\n")
        assert to.dropped == number
    assert b"lost" not in drained(reader)
    assert to.write(b"kept\n")
    assert to.dropped == 0
    said = drained(reader)
    assert said.endswith(DROPPED + b"kept\n") and b"lost" not in said
    to.close()
    to.close()


def in_child(act: Callable[[], object]) -> None:
    """Run a check in a process of its own, which may give things up for good."""
    pid = os.fork()
    if not pid:
        code = 1
        try:
            act()
            code = 0
        finally:
            os._exit(code)
    assert os.waitpid(pid, 0)[1] == 0


def test_full_pipe() -> None:
    """On a full pipe a write returns at once, and the descriptor itself stays blocking for its other owners."""
    with pipe() as (reader, end):
        to = Writer(end)
        fill(end)
        check_full(to, reader)
        assert os.get_blocking(end)


@pytest.mark.parametrize("known", [True, False])
def test_full_pipe_without_proc(monkeypatch: pytest.MonkeyPatch, known: bool) -> None:
    """Where the descriptor cannot be opened once more, the kernel is told not to wait; one that does not know how is
    asked for room before each write."""
    real = os.open

    def without_proc(path: str, flags: int, mode: int = 0o777) -> int:
        if str(path).startswith("/proc/"):
            raise FileNotFoundError(path)
        return real(path, flags, mode)

    monkeypatch.setattr(os, "open", without_proc)
    if not known:
        monkeypatch.setattr(os, "pwritev", lambda *arguments: os.lseek(-1, 0, 0))  # any error of the system would do
        monkeypatch.setattr("prefork.kernel.lossy_writer._UNKNOWN", (9,))
    with pipe() as (reader, end):
        to = Writer(end)
        fill(end)
        check_full(to, reader)


@pytest.mark.skipif(os.getuid() != 0, reason="only root can become somebody else")
def test_pipe_of_another_user() -> None:
    """A pipe that belongs to another user cannot be opened once more, and is not waited for either."""

    def act() -> None:
        with pipe() as (reader, end):
            os.setuid(65534)
            with pytest.raises(PermissionError):
                os.open(f"/proc/self/fd/{end}", os.O_WRONLY)
            to = Writer(end)
            fill(end)
            check_full(to, reader)

    in_child(act)


@pytest.mark.parametrize("seconds", [None, 5.0])
def test_full_socket(seconds: float | None) -> None:
    """A socket that nobody reads is no reason to wait either, also under a default timeout of the program's, which is
    not forced upon whoever shares the socket."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        socket.setdefaulttimeout(seconds)
        try:
            to = Writer(ours.fileno())
            assert os.get_blocking(ours.fileno())
            fill(ours.fileno())
            check_full(to, theirs.fileno())
        finally:
            socket.setdefaulttimeout(None)


def test_full_terminal() -> None:
    """A terminal that does not take anything any more is no reason to wait."""
    with terminal() as (master, slave):
        to = Writer(slave)
        assert to.write(b"seen\n")
        assert os.read(master, 100) == b"seen\r\n"
        for _ in range(100_000):
            if not to.write(b"x" * 1000 + b"\n"):
                break
        assert to.dropped == 1
        assert not to.write(b"lost\n")
        drained(master)
        to.close()


def test_stopped_terminal() -> None:
    """A terminal that was stopped (Ctrl-S) is no reason to wait, and gets the count once it goes on."""
    with terminal() as (master, slave):
        to = Writer(slave)
        termios.tcflow(slave, termios.TCOOFF)
        for _ in range(3):
            assert not to.write(b"lost\n")
        termios.tcflow(slave, termios.TCOON)
        assert to.write(b"kept\n")
        assert drained(master).replace(b"\r", b"").endswith(DROPPED + b"kept\n")
        to.close()


BACKGROUND = """
import os, signal, sys, termios
from prefork.kernel.lossy_writer import Writer

signal.signal(signal.SIGTTOU, lambda *_: os._exit(3))
attributes = termios.tcgetattr(2)
attributes[3] |= termios.TOSTOP
termios.tcsetattr(2, termios.TCSANOW, attributes)
pid = os.fork()
if not pid:
    os.setpgid(0, 0)
    os._exit(0 if Writer(2).write(b"said\\n") else 4)
sys.exit(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
"""


def test_terminal_of_others() -> None:
    """In the background of a terminal that stops those who write (`stty tostop`) a write is no signal to the master."""
    with terminal() as (master, slave):

        def lead() -> None:
            os.setsid()
            os.close(os.open(os.ttyname(slave), os.O_RDWR))  # the first that a session's leader opens becomes its own

        command = [sys.executable, "-c", BACKGROUND]
        done = subprocess.run(
            command, stdin=slave, stdout=slave, stderr=slave, preexec_fn=lead, timeout=15, check=False
        )
        assert done.returncode == 0
        assert drained(master) == b"said\r\n"


def test_disk_full() -> None:
    """On a full disk messages are dropped and counted, and the reason is known."""
    fd = os.open("/dev/full", os.O_WRONLY)
    try:
        to = Writer(fd)
        assert not to.write(b"lost\n")
        assert not to.write(b"lost\n")
        assert to.dropped == 2 and to.reason == "No space left on device"
        to.close()
    finally:
        os.close(fd)


def test_limit_of_size(tmp_path: Path) -> None:
    """At the limit of a file's size a line that was cut is ended before the next, and what was dropped is counted."""

    def act() -> None:
        to = Writer(str(tmp_path / "log"), "lines")
        resource.setrlimit(resource.RLIMIT_FSIZE, (15, resource.RLIM_INFINITY))
        assert to.write(b"0123456789\n") and not to.write(b"abcdefg\n") and not to.write(b"lost\n")
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        assert to.write(b"kept\n")

    in_child(act)
    first, cut, note, last = (tmp_path / "log").read_text().splitlines()
    assert (first, cut, last) == ("0123456789", "abcd", "kept")
    assert note.endswith(f": 2 lines were dropped because {tmp_path / 'log'} was full [PF0501]")


def test_long_text_is_cut_between_lines() -> None:
    """Of text that is longer than a pipe takes as one piece, whole lines arrive; a line that is cut, for it alone is as
    long, is ended before the next."""
    with pipe() as (reader, end):
        to = Writer(end)
        assert not to.write(b"".join(b"%09d\n" % number for number in range(10_000)))
        lines = drained(reader).splitlines(keepends=True)
        assert len(lines) > 5000 and all(len(line) == 10 for line in lines)
        assert not to.write(b"x" * 100_000 + b"\n")
        drained(reader)
        assert to.write(b"kept\n")
        assert drained(reader).startswith(b"\nprefork[")
        to.close()


def test_reader_is_gone() -> None:
    """A pipe whose reader is gone is like a full disk."""
    reader, end = os.pipe()
    os.close(reader)
    to = Writer(end)
    assert not to.write(b"lost\n")
    to.close()
    os.close(end)


def test_closed_descriptor() -> None:
    """A process without a standard error goes on, and nothing goes to whoever gets the number later."""
    reader, end = os.pipe()
    os.close(end)
    to = Writer(end)
    os.dup2(reader, end)
    assert not to.write(b"lost\n")
    to.close()
    os.close(reader)
    os.close(end)


def test_regular_file(tmp_path: Path) -> None:
    """A file gets every byte, in one piece or many."""
    with (tmp_path / "log").open("wb") as file:
        to = Writer(file.fileno())
        for number in range(3):
            assert to.write(b"%d" % number * 100_000)
        to.close()
    assert (tmp_path / "log").read_bytes() == b"0" * 100_000 + b"1" * 100_000 + b"2" * 100_000


def test_rotation(tmp_path: Path) -> None:
    """After a rotation a file is opened again by its path; where that fails the former one goes on, and it is said."""
    path = tmp_path / "log"
    to = Writer(str(path))
    to.write(b"1\n")
    path.rename(tmp_path / "log.1")
    assert reopen() == []
    to.write(b"2\n")
    path.rename(tmp_path / "log.2")
    path.mkdir()
    assert reopen() == [f"{path} cannot be opened again: Is a directory"]
    to.write(b"3\n")
    to.close()
    assert reopen() == []
    assert (tmp_path / "log.1").read_text() == "1\n" and (tmp_path / "log.2").read_text() == "2\n3\n"


def test_fifo_without_reader(tmp_path: Path) -> None:
    """A FIFO that nobody reads yet is no reason to wait; what fits into it is there for the reader."""
    os.mkfifo(tmp_path / "fifo")
    to = Writer(str(tmp_path / "fifo"))
    assert to.write(b"early\n")
    reader = os.open(tmp_path / "fifo", os.O_RDONLY | os.O_NONBLOCK)
    assert drained(reader) == b"early\n"
    to.close()
    os.close(reader)


def test_children_count_for_themselves() -> None:
    """What was dropped before a fork is reported by the parent alone, at the latest when it ends."""
    with pipe() as (reader, end):
        to = Writer(end)
        fill(end)
        for _ in range(3):
            to.write(b"lost\n")
        drained(reader)
        in_child(settle)
        assert drained(reader) == b""
        settle()
        assert drained(reader).endswith(DROPPED)
        to.close()


def test_handler() -> None:
    """A record is one line with time and pid; one that cannot be formatted is written raw, and nothing is raised."""
    with pipe() as (reader, end):
        handler = log_stderr.Handler(Writer(end))
        log = logging.Logger("here")
        log.addHandler(handler)
        log.error("caf\u00e9 \udcff %s", "x")
        log.error("%d", "no number")
        said = drained(reader).decode()
        assert f"prefork[{os.getpid()}] ERROR: caf\u00e9 \\udcff x\n" in said
        assert "ERROR: '%d' ('no number',)" in said
        handler.writer.close()


def test_handler_without_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    """A program may tell logging not to look for the pid; these lines have it nevertheless."""
    monkeypatch.setattr(logging, "logProcesses", False)
    with pipe() as (reader, end):
        handler = log_stderr.Handler(Writer(end))
        handler.handle(logging.makeLogRecord({"msg": "said", "process": None}))
        assert f" prefork[{os.getpid()}] ".encode() in drained(reader)
        handler.writer.close()


def test_signal_is_let_through() -> None:
    """Writing to a terminal leaves the signal mask as it was."""
    with terminal() as (_, slave):
        to = Writer(slave)
        before = signal.pthread_sigmask(signal.SIG_BLOCK, [])
        to.write(b"said\n")
        assert signal.pthread_sigmask(signal.SIG_BLOCK, []) == before
        to.close()

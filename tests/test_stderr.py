"""Standard error that cannot be written: dropped and counted, never waited for."""

import contextlib
import io
import logging
import os
import pty
import socket
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import prefork.stderr as stderr
from support import descriptors

pytestmark = pytest.mark.timeout(20)


@pytest.fixture(autouse=True)
def flat() -> Iterator[None]:
    """This process has no descriptor more after the test than before it."""
    before = descriptors(os.getpid())
    yield
    assert not descriptors(os.getpid()) - before


@contextlib.contextmanager
def pipe() -> Iterator[tuple[int, int]]:
    reader, writer = os.pipe()
    try:
        yield reader, writer
    finally:
        os.close(reader)
        os.close(writer)


def fill(fd: int) -> None:
    os.set_blocking(fd, False)
    with contextlib.suppress(BlockingIOError):
        while True:
            os.write(fd, b"." * 4096)
    os.set_blocking(fd, True)


def drained(fd: int) -> bytes:
    os.set_blocking(fd, False)
    parts = []
    with contextlib.suppress(BlockingIOError):
        while part := os.read(fd, 65536):
            parts.append(part)
    return b"".join(parts)


def check_full(writer: stderr.Writer, reader: int) -> None:
    """What does not fit is dropped and counted; the count is said once there is room."""
    for number in range(1, 4):
        assert not writer.write(b"lost\n")
        assert writer.dropped == number
    assert b"lost" not in drained(reader)
    assert writer.write(b"kept\n")
    assert writer.dropped == 0
    said = drained(reader)
    assert said.endswith(b"kept\n") and b" 3 messages were dropped" in said and b"lost" not in said


def test_full_pipe() -> None:
    """On a full pipe a write returns at once, and the descriptor itself stays blocking for its other owners."""
    with pipe() as (reader, writer):
        one = stderr.Writer(writer)
        fill(writer)
        check_full(one, reader)
        assert os.get_blocking(writer)
        one.close()
        one.close()


def test_full_pipe_without_proc(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the descriptor cannot be opened once more, the pipe is asked before each write."""
    real = os.open

    def without_proc(path: str, flags: int, mode: int = 0o777) -> int:
        if str(path).startswith("/proc/"):
            raise FileNotFoundError(path)
        return real(path, flags, mode)

    monkeypatch.setattr(os, "open", without_proc)
    with pipe() as (reader, writer):
        one = stderr.Writer(writer)
        fill(writer)
        check_full(one, reader)
        one.close()


def test_full_socket() -> None:
    """A socket that nobody reads is no reason to wait either."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        one = stderr.Writer(ours.fileno())
        fill(ours.fileno())
        check_full(one, theirs.fileno())
        one.close()


def test_stopped_terminal() -> None:
    """A terminal that does not take anything any more is no reason to wait."""
    master, slave = pty.openpty()
    try:
        one = stderr.Writer(slave)
        assert one.write(b"seen\n")
        assert os.read(master, 100) == b"seen\r\n"
        for _ in range(100_000):
            if not one.write(b"x" * 1000 + b"\n"):
                break
        assert one.dropped == 1
        assert not one.write(b"lost\n")
        drained(master)
        one.close()
    finally:
        os.close(master)
        os.close(slave)


def test_disk_full() -> None:
    """On a full disk messages are dropped and counted."""
    fd = os.open("/dev/full", os.O_WRONLY)
    try:
        one = stderr.Writer(fd)
        assert not one.write(b"lost\n")
        assert not one.write(b"lost\n")
        assert one.dropped == 2
        one.close()
    finally:
        os.close(fd)


def test_reader_is_gone() -> None:
    """A pipe whose reader is gone is like a full disk."""
    reader, writer = os.pipe()
    os.close(reader)
    one = stderr.Writer(writer)
    assert not one.write(b"lost\n")
    one.close()
    os.close(writer)


def test_closed_descriptor() -> None:
    """A process without a standard error goes on."""
    reader, writer = os.pipe()
    os.close(reader)
    os.close(writer)
    one = stderr.Writer(writer)
    assert not one.write(b"lost\n")
    one.close()


def test_regular_file(tmp_path: Path) -> None:
    """A file gets every byte, in one piece or many."""
    with (tmp_path / "log").open("wb") as file:
        one = stderr.Writer(file.fileno())
        for number in range(3):
            assert one.write(b"%d" % number * 100_000)
        one.close()
    assert (tmp_path / "log").read_bytes() == b"0" * 100_000 + b"1" * 100_000 + b"2" * 100_000


def test_handler() -> None:
    """A record is one line with time and pid; one that cannot be formatted is counted, and nothing is raised."""
    with pipe() as (reader, writer):
        handler = stderr.Handler(stderr.Writer(writer))
        log = logging.Logger("here")
        log.addHandler(handler)
        log.error("caf\u00e9 \udcff %s", "x")
        log.error("%d", "no number")
        assert handler.writer.dropped == 1
        log.error("after")
        said = drained(reader).decode()
        assert f"prefork[{os.getpid()}] ERROR: caf\u00e9 \\udcff x\n" in said
        assert "1 messages were dropped" in said and said.endswith("ERROR: after\n")
        handler.writer.close()


def test_replace(monkeypatch: pytest.MonkeyPatch) -> None:
    """A program's own sys.stderr is left alone."""
    mine = io.StringIO()
    monkeypatch.setattr(sys, "stderr", mine)
    stderr.replace()
    assert sys.stderr is mine
    monkeypatch.setattr(sys, "stderr", None)
    stderr.replace()
    assert sys.stderr is None

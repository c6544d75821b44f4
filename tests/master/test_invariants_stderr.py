"""Invariant 12 of the design: standard error that cannot be written."""

import contextlib
import os
import resource
import signal
from pathlib import Path

import pytest

from support import Address, Ledger, Program, ask, dial, patterns, pids_serving, until, within
from support.invariants import APP, UNIX, Start, wait_busy

pytestmark = pytest.mark.timeout(120)


def work_hard(program: Program, address: Address, workers: int = 2) -> None:
    """Serve, lose workers, reload, resize: all of it is logged."""
    for _ in range(20):
        ask(address)
    for _ in range(5):
        program.kill_workers(*program.wait_ready(workers))
        ask(address)
    for _ in range(2):
        before = program.wait_ready(workers)
        program.send(signal.SIGHUP)
        program.wait_ready(workers, timeout=10, without=before)
    before = program.wait_ready(workers)
    for _ in range(4 * workers):
        with dial(address) as connection:
            connection.sendall(b"x raise\n")
            assert connection.recv(100) == b""
    pids_serving(address, workers)
    assert program.children() == before, "an exception in a handler cost a worker, because it could not be told"


def start_mute(start: Start, *, stderr: int, limits: dict[int, int] | None = None) -> tuple[Program, Address]:
    """The command with a standard error that takes nothing, and a program that says something as it is imported."""
    files = {"app.py": "import sys\n\nprint('loaded', file=sys.stderr)\n" + APP.format(version="one")}
    program = start(
        "prefork",
        "app:Handler",
        "-b",
        UNIX,
        "-w",
        2,
        files=files,
        stderr=stderr,
        limits=limits,
        allow=[patterns.ANYTHING],
    )
    address = Address("unix", str(program.run / "socket"))

    def answers() -> bool:
        assert program.running
        with contextlib.suppress(OSError):
            return ask(address).pid > 0
        return False

    until(answers, 10, "it serves")
    return program, address


def test_invariant_12_full_pipe(start: Start, ledger: Ledger) -> None:
    """With standard error a pipe that nobody empties, serving and signals go on, and what was dropped is counted."""
    reader, writer = os.pipe()
    try:
        os.set_blocking(writer, False)
        with contextlib.suppress(BlockingIOError):
            while True:
                os.write(writer, b"." * 4096)
        os.set_blocking(writer, True)
        program, address = start_mute(start, stderr=writer)
        work_hard(program, address)
        os.close(writer)
        writer = -1
        os.set_blocking(reader, False)
        with contextlib.suppress(BlockingIOError):
            while True:
                os.read(reader, 65536)
        within(program.stop().seconds, 1.0)
        text = os.read(reader, 65536).decode()
        assert patterns.DROPPED.search(text), text
    finally:
        os.close(reader)
        if writer >= 0:
            os.close(writer)
    program.finish()


def test_invariant_12_dev_full(start: Start, ledger: Ledger) -> None:
    """With standard error on a full disk, serving and signals go on, and the exit code is right."""
    full = os.open("/dev/full", os.O_WRONLY)
    try:
        program, address = start_mute(start, stderr=full)
    finally:
        os.close(full)
    work_hard(program, address)
    within(program.stop().seconds, 1.0)
    program.finish()


def test_invariant_12_file_that_may_not_grow(start: Start, ledger: Ledger, tmp_path: Path) -> None:
    """With standard error a file at its size limit (EFBIG), serving and signals go on."""
    path = tmp_path / "stderr"
    path.write_bytes(b"." * 1024)
    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND)
    ledger.path.touch()
    # The ledger is a file too: 1 MiB is enough for it, and the log begins beyond.
    os.truncate(descriptor, 1 << 20)
    try:
        program, address = start_mute(start, stderr=descriptor, limits={resource.RLIMIT_FSIZE: 1 << 20})
    finally:
        os.close(descriptor)
    work_hard(program, address)
    within(program.stop().seconds, 1.0)
    program.finish()


def test_invariant_12_closed_reader(start: Start, ledger: Ledger) -> None:
    """With standard error a pipe whose reader is gone (EPIPE), serving and signals go on."""
    reader, writer = os.pipe()
    os.close(reader)
    try:
        program, address = start_mute(start, stderr=writer)
    finally:
        os.close(writer)
    work_hard(program, address)
    within(program.stop().seconds, 1.0)
    program.finish()


def test_invariant_12_log_file_on_a_full_disk(start: Start, ledger: Ledger) -> None:
    """A log file that cannot be written, nor closed, is reopened by USR1: no request fails of it, and TERM is heard."""
    program = start("pool.py", UNIX, "--workers", 2, "--log", "/dev/full", allow=[patterns.ANYTHING])
    address = Address("unix", str(program.run / "socket"))
    until(lambda: (program.run / "socket").exists(), 10, "it is bound")
    workers = program.wait_ready(2)
    with dial(address) as connection:
        connection.sendall(b"patient slices 0.4\n")
        wait_busy(ledger, 1)
        for _ in range(5):
            program.send(signal.SIGUSR1)
            ask(address)
        answer = b"".join(iter(lambda: connection.recv(100), b""))
    assert answer.endswith(b":patient\n")
    assert program.wait_ready(2) == workers
    program.send(signal.SIGSTOP)
    program.send(signal.SIGUSR1)
    program.send(signal.SIGTERM)
    program.send(signal.SIGCONT)
    assert program.wait_exit(2.0).code == 0
    program.finish()


def test_invariant_12_library_workers_do_not_block(start: Start, ledger: Ledger) -> None:
    """A library program whose handlers fail in a row before a full pipe: its workers serve on."""
    reader, writer = os.pipe()
    try:
        program = start("pool.py", UNIX, "--workers", 2, stderr=writer, allow=[patterns.ANYTHING])
        address = Address("unix", str(program.run / "socket"))
        until(lambda: (program.run / "socket").exists(), 10, "it is bound")
        program.wait_ready(2)
        os.set_blocking(writer, False)
        with contextlib.suppress(BlockingIOError):
            while True:
                os.write(writer, b"." * 4096)
        os.set_blocking(writer, True)
        for _ in range(50):
            with dial(address) as connection:
                connection.sendall(b"x raise\n")
                assert connection.recv(100) == b""
        pids_serving(address, 2)
        os.set_blocking(reader, False)
        with contextlib.suppress(BlockingIOError):
            while True:
                os.read(reader, 65536)
        program.stop()
    finally:
        os.close(reader)
        os.close(writer)
    program.finish()

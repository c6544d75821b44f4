"""Invariants 9, 10 and 11 of the design: the host's children, its endings, and its Unix paths."""

import contextlib
import os
import signal
import socket
import stat
from collections.abc import Callable
from pathlib import Path

import pytest

from support import Ledger, Program, ask, dial, patterns, pids_serving, title, until
from support.invariants import EVERY, TCP, Start, reload

pytestmark = pytest.mark.timeout(120)


# -- 9: children of the host -----------------------------------------------------------------------


@pytest.mark.parametrize("off_main", [False, True], ids=["main", "thread"])
def test_invariant_09_children_of_the_host_keep_their_exit_status(
    start: Start, ledger: Ledger, notes: Callable[[str], list[str]], off_main: bool
) -> None:
    """While workers die all the time, each child that the program started itself returns its own exit status."""
    options = ["--off-main"] if off_main else []
    program = start("pool.py", TCP, "--workers", 3, "--host-children", 100, *options, stdin=True).ready()

    def workers() -> list[int]:
        return [pid for pid in program.children() if patterns.TITLE_READY.search(title(pid))]

    while len(notes("child")) < 100:
        program.kill_workers(*until(workers, 5, "a worker"))
    for line in notes("child"):
        code, of_popen, of_spawn = line.split()
        assert code == of_popen == of_spawn
    pids_serving(program.address, 3)
    if off_main:
        program.tell("stop\n")
        assert program.wait_exit().code == 0
    program.finish(allow=[r".*DeprecationWarning: This process .* is multi-threaded.*", r"  .*"])


# -- 10: the program's own endings -----------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_invariant_10_atexit_and_finally_run_once_in_the_master(
    start: Start, ledger: Ledger, notes: Callable[[str], list[str]], number: signal.Signals
) -> None:
    """However workers end, `finally` blocks and atexit functions of the program run once, in the master."""
    program = start("pool.py", TCP, "--workers", 4, "--max-requests", 7, allow=[patterns.ANYTHING]).ready()
    address = program.address
    for order in ("leave 0", "leave 3", "exit 3", "interrupt", "raise", "segfault"):
        with dial(address) as connection, contextlib.suppress(ConnectionResetError):
            connection.sendall(f"x {order}\n".encode())
            assert connection.recv(100) == b""
    program.send(signal.SIGTERM, program.wait_ready(4)[0])
    program.send(signal.SIGQUIT, program.wait_ready(4)[1])
    reload(program)
    for _ in range(40):
        ask(address)
    assert program.stop(number).code == 0
    master = [str(program.pid)]
    assert (notes("begin"), notes("finally"), notes("atexit")) == (master, master, master)
    program.finish()


# -- 11: Unix paths --------------------------------------------------------------------------------


def socket_path(program: Program) -> Path:
    return Path(program.address.where)


@pytest.mark.parametrize("kind", ["unix", "unixgram"])
def test_invariant_11_second_instance_is_refused(start: Start, ledger: Ledger, kind: str) -> None:
    """Of two instances on one Unix path the second is refused with a clear error; the first serves on undisturbed."""
    first = start("pool.py", EVERY[kind], "--workers", 2).ready()
    inode = socket_path(first).stat().st_ino
    second = start("pool.py", first.address, "--workers", 2, directory=first.directory, allow=[patterns.ANYTHING])
    assert second.wait_exit().code not in (0, None)
    assert socket_path(first).stat().st_ino == inode
    for _ in range(4):
        assert ask(first.address).pid in first.children()
    assert "in use" in second.log.lower() or "another server" in second.log.lower()
    first.finish()
    second.finish(code=None)


@pytest.mark.parametrize("kind", ["unix", "unixgram"])
def test_invariant_11_stale_path_is_reused(start: Start, ledger: Ledger, kind: str) -> None:
    """A path that a killed server left behind is taken over by the next start, and removed by its stop."""
    first = start("pool.py", EVERY[kind], "--workers", 2).ready()
    path = socket_path(first)
    first.send(signal.SIGKILL)
    first.wait_exit()
    until(lambda: not first.remaining(), 2)
    assert path.exists()
    second = start("pool.py", first.address, "--workers", 2, directory=first.directory)
    ask(second.ready().address)
    second.finish()
    first.finish(code=-signal.SIGKILL)


@pytest.mark.parametrize("kind", ["unix", "unixgram"])
def test_invariant_11_only_our_own_file_is_removed(start: Start, ledger: Ledger, kind: str) -> None:
    """The socket's file is private by default; one that somebody else put in its place is left alone by the stop."""
    program = start("pool.py", EVERY[kind], "--workers", 2).ready()
    path = socket_path(program)
    found = path.stat()
    assert stat.S_ISSOCK(found.st_mode) and stat.S_IMODE(found.st_mode) == 0o600
    path.unlink()
    with socket.socket(socket.AF_UNIX) as other:
        other.bind(str(path))
        assert program.stop().code == 0
        program.finish(leftovers=[path.name])
    path.unlink()


@pytest.mark.parametrize("kind", ["unix", "unixgram"])
def test_invariant_11_a_file_that_is_no_socket_is_not_touched(start: Start, ledger: Ledger, kind: str) -> None:
    """A regular file on the path is an error of the start; its contents survive."""
    program = start(
        "pool.py", EVERY[kind].replace("{run}", "{work}"), files={"socket": "precious"}, allow=[patterns.ANYTHING]
    )
    assert program.wait_exit().code not in (0, None)
    assert (program.work / "socket").read_text() == "precious"
    assert os.listdir(program.work) == ["socket"]
    program.finish(code=None)

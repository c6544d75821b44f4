"""Claims on the paths of Unix sockets, tried on the real kernel."""

import contextlib
import errno
import multiprocessing
import os
import socket
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from prefork.kernel.unix_path import Claim, permissions
from support import descriptors, until

pytestmark = pytest.mark.timeout(60)


@pytest.fixture(autouse=True)
def flat() -> Iterator[None]:
    """This process has no descriptor more after the test than before it."""
    before = descriptors(os.getpid())
    yield
    assert not descriptors(os.getpid()) - before


def test_a_claim_and_its_end(tmp_path: Path) -> None:
    """A claim refuses a second one, knows its file, removes it and the lock, and can be released twice."""
    path = str(tmp_path / "s")
    claim = Claim(path, socket.SOCK_STREAM)
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(path)
        claim.bound()
        with pytest.raises(OSError, match="another server") as refusal:
            Claim(path, socket.SOCK_STREAM)
        assert refusal.value.errno == errno.EADDRINUSE and refusal.value.filename == path
    assert stat.S_IMODE(os.stat(path + ".lock").st_mode) == 0o600
    claim.release()
    claim.release()
    assert os.listdir(tmp_path) == []


def test_a_claim_leaves_other_files_alone(tmp_path: Path) -> None:
    """What somebody else put on the path after the bind is not removed."""
    path = tmp_path / "s"
    claim = Claim(str(path), socket.SOCK_STREAM)
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(path))
        claim.bound()
        path.unlink()
        path.write_text("somebody else's")
        claim.release()
    assert os.listdir(tmp_path) == ["s"]


def test_a_claim_that_never_bound(tmp_path: Path) -> None:
    """A claim that is released before the bind removes its lock only."""
    claim = Claim(str(tmp_path / "s"), socket.SOCK_STREAM)
    claim.release()
    assert os.listdir(tmp_path) == []


def test_a_claim_belongs_to_one_process(tmp_path: Path) -> None:
    """A forked child releases nothing; one that takes over does."""
    path = str(tmp_path / "s")
    claim = Claim(path, socket.SOCK_STREAM)
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(path)
        claim.bound()
    child = multiprocessing.get_context("fork").Process(target=claim.release)
    child.start()
    child.join(10)
    assert child.exitcode == 0
    child.close()
    assert sorted(os.listdir(tmp_path)) == ["s", "s.lock"]
    where, file, lock = claim.hand_over()
    other = Claim.take_over(where, file, os.dup(lock))
    other.release()
    assert os.listdir(tmp_path) == []
    claim.release()


RACE = """
import os, socket, sys
from prefork.kernel.unix_path import Claim
path = sys.argv[1]
for turn in range(200):
    sys.stdin.readline()
    try:
        claim = Claim(path, socket.SOCK_STREAM)
    except OSError as error:
        assert error.errno == 98, error
        print("refused", flush=True)
        sys.stdin.readline()
        continue
    sock = socket.socket(socket.AF_UNIX)
    sock.bind(path)
    sock.listen()
    claim.bound()
    print("owner", flush=True)
    sys.stdin.readline()
    if turn % 3:
        sock.close()
        claim.release()
    else:
        claim.release()
        sock.close()
"""


def test_claims_race(tmp_path: Path) -> None:
    """Of two processes that claim one path at the same moment, 200 times, exactly one is refused, whoever is first."""
    command = [sys.executable, "-c", RACE, str(tmp_path / "s")]
    with contextlib.ExitStack() as stack:
        both = [
            stack.enter_context(subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True))
            for _ in range(2)
        ]

        def tell() -> None:
            for process in both:
                assert process.stdin
                process.stdin.write("go\n")
                process.stdin.flush()

        for _ in range(200):
            tell()
            said = [process.stdout.readline().strip() for process in both if process.stdout]
            assert sorted(said) == ["owner", "refused"]
            assert (tmp_path / "s").is_socket()
            tell()
            # The next turn begins while the owner may still be releasing; a stale moment must not refuse both.
            until(lambda: not (tmp_path / "s.lock").exists(), 5)
        for process in both:
            assert process.wait(10) == 0
    assert os.listdir(tmp_path) == []


def test_permissions(tmp_path: Path) -> None:
    """Inside `permissions` a file is made with that mode, and the former mask is back after it, also after an error."""
    former = os.umask(0o027)
    try:
        with contextlib.suppress(ValueError), permissions(0o640):
            os.close(os.open(tmp_path / "f", os.O_CREAT | os.O_WRONLY, 0o777))
            raise ValueError
        assert stat.S_IMODE((tmp_path / "f").stat().st_mode) == 0o640
        assert os.umask(0o027) == 0o027
    finally:
        os.umask(former)

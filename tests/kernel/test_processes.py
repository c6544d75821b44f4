"""Fork, wait and kill: what a child inherits, what it does not, and what its parent keeps."""

import contextlib
import gc
import os
import select
import signal
import threading
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

import prefork.kernel.inherited_pipes as inherited_pipes
import prefork.kernel.private_fds as private_fds
import prefork.kernel.processes as processes
import prefork.kernel.readiness as readiness
from support import descriptors, until

pytestmark = pytest.mark.timeout(30)

Unblock = Callable[[], None]


@pytest.fixture(autouse=True)
def flat() -> Iterator[None]:
    """Nothing of the process is changed by a fork: descriptors, mask, collector, children."""
    gc.unfreeze()  # what the collection of tests froze
    before = descriptors(os.getpid())
    mask, frozen, collecting = signal.pthread_sigmask(signal.SIG_BLOCK, []), gc.get_freeze_count(), gc.isenabled()
    yield
    assert not descriptors(os.getpid()) - before
    assert signal.pthread_sigmask(signal.SIG_BLOCK, []) == mask
    assert gc.get_freeze_count() <= frozen and gc.isenabled() == collecting
    gc.freeze()


def collect(child: processes.Child, timeout: float = 10.0) -> tuple[int | None, int | None]:
    collected = until(child.reap, timeout, "the child ends")
    assert collected is not None
    child.release()
    return collected


@pytest.mark.parametrize("use_pidfd", [True, False])
def test_exit_code(use_pidfd: bool) -> None:
    """The child ends with the code that its function returns; it is collected with its peak memory, once."""
    child = processes.Child(processes.fork(lambda unblock: 42), use_pidfd=use_pidfd)
    status, memory = collect(child)
    assert status == 42
    assert memory is not None and memory > 1 << 20
    child.send(signal.SIGKILL)
    child.await_exit()


@pytest.mark.parametrize(
    "how",
    [SystemExit(7), KeyboardInterrupt(), ValueError("ordered"), GeneratorExit()],
    ids=lambda how: type(how).__name__,
)
def test_exceptions_do_not_escape(how: BaseException, capfd: pytest.CaptureFixture[str]) -> None:
    """Whatever its function raises, the child ends there: no `finally` of the caller runs in it."""
    ran = []

    def main(unblock: Unblock) -> int:
        raise how

    try:
        child = processes.Child(processes.fork(main))
    finally:
        ran.append(os.getpid())
    assert collect(child)[0] == 1
    assert ran == [os.getpid()]
    assert type(how).__name__ in capfd.readouterr().err


@pytest.mark.parametrize("use_pidfd", [True, False])
def test_signal_and_status(use_pidfd: bool) -> None:
    """A killed child is reported by the negative number of its signal."""

    def main(unblock: Unblock) -> int:
        select.select([], [], [], 60)
        return 0

    child = processes.Child(processes.fork(main), use_pidfd=use_pidfd)
    assert child.reap() is None
    child.send(signal.SIGKILL)
    if child.pidfd is not None:
        assert readiness.wait_readable(child.pidfd, 10)
    assert collect(child)[0] == -signal.SIGKILL


def test_stolen_exit() -> None:
    """An exit that somebody else has collected is an exit without a status."""
    child = processes.Child(processes.fork(lambda unblock: 3))
    os.waitpid(child.pid, 0)
    assert collect(child) == (None, None)


def test_only_its_own_child() -> None:
    """Collecting one child leaves every other alone."""
    stranger = os.spawnv(os.P_NOWAIT, "/bin/sh", ["sh", "-c", "exit 9"])
    child = processes.Child(processes.fork(lambda unblock: 1))
    assert collect(child)[0] == 1
    assert os.waitstatus_to_exitcode(os.waitpid(stranger, 0)[1]) == 9


def test_private_descriptors_are_closed() -> None:
    """A private descriptor is closed in our children and in a stranger's fork; others are inherited."""
    reader, writer = os.pipe()
    other_reader, other_writer = os.pipe()
    private_fds.add([reader, writer])

    def opened(fd: int) -> bool:
        try:
            os.fstat(fd)
        except OSError:
            return False
        return True

    def look() -> int:
        return opened(reader) | opened(writer) << 1 | opened(other_reader) << 2 | opened(other_writer) << 3

    try:
        assert collect(processes.Child(processes.fork(lambda unblock: look())))[0] == 0b1100
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            pid = os.fork()
        if pid == 0:
            os._exit(look())
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0b1100
        assert look() == 0b1111
    finally:
        private_fds.close([reader, writer])
        os.close(other_reader)
        os.close(other_writer)


def test_forgotten_descriptors_are_not_closed() -> None:
    """What is not private any more, because its owner closed it, is not closed under its next owner."""
    reader, writer = os.pipe()
    private_fds.add([reader])
    private_fds.forget([reader])
    try:
        assert collect(processes.Child(processes.fork(lambda unblock: int(os.fstat(reader).st_nlink))))[0] == 1
    finally:
        os.close(reader)
        os.close(writer)


def test_no_signal_is_lost_at_birth() -> None:
    """Signals sent to a child from its first moment on are all heard once it unblocks them."""
    for _ in range(50):
        reader, writer = os.pipe()

        def main(unblock: Unblock, writer: int = writer) -> int:
            signal.signal(signal.SIGTERM, lambda *_: os.write(writer, b"t"))
            unblock()
            for _ in range(1000):  # not one long sleep: a signal just before it would be heard only after it
                select.select([], [], [], 0.01)
            return 0

        child = processes.Child(processes.fork(main))
        child.send(signal.SIGTERM)
        os.close(writer)
        try:
            assert readiness.wait_readable(reader, 10)
            assert os.read(reader, 1) == b"t"
        finally:
            child.send(signal.SIGKILL)
            collect(child)
            os.close(reader)


def test_the_parents_wakeup_is_not_the_childs() -> None:
    """A child's signals do not arrive at the descriptor that wakes its parent."""
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    former = signal.set_wakeup_fd(writer)

    def main(unblock: Unblock) -> int:
        signal.signal(signal.SIGTERM, lambda *_: None)
        unblock()
        os.kill(os.getpid(), signal.SIGTERM)
        return 0

    try:
        collect(processes.Child(processes.fork(main)))
        assert not readiness.is_readable(reader)
    finally:
        signal.set_wakeup_fd(former)
        os.close(reader)
        os.close(writer)


@pytest.mark.parametrize("freeze", [True, False])
def test_freeze(freeze: bool) -> None:
    """With `freeze` the child's heap is frozen and its collector on; the parent's is as it was."""

    def main(unblock: Unblock) -> int:
        return (gc.get_freeze_count() > 1000) | gc.isenabled() << 1

    assert collect(processes.Child(processes.fork(main, freeze=freeze)))[0] == (0b11 if freeze else 0b10)


def test_a_refused_fork_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """A fork that the system refuses raises its OSError, and leaves mask and collector as they were."""

    def refuse() -> int:
        raise BlockingIOError(11, "Resource temporarily unavailable")

    monkeypatch.setattr(os, "fork", refuse)
    with pytest.raises(BlockingIOError):
        processes.fork(lambda unblock: 0)


def test_fork_beside_threads() -> None:
    """With other threads alive the fork is silent even where warnings are errors, and says whom the child will miss."""
    stop = threading.Event()
    thread = threading.Thread(target=stop.wait, name="somebody")
    thread.start()
    try:
        assert processes.threads_left_behind() == ["somebody"]
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            child = processes.Child(processes.fork(lambda unblock: len(threading.enumerate())))
        assert collect(child)[0] == 1
    finally:
        stop.set()
        thread.join()


def test_no_fork_comes_between() -> None:
    """While descriptors are made in `fork_lock()`, no fork of another thread happens."""
    forked = threading.Event()
    children: list[processes.Child] = []

    def fork() -> None:
        children.append(processes.Child(processes.fork(lambda unblock: 0)))
        forked.set()

    with private_fds.fork_lock():
        thread = threading.Thread(target=fork)
        thread.start()
        assert not forked.wait(0.1)
    assert forked.wait(10)
    thread.join()
    assert collect(children[0])[0] == 0


def test_forks_of_two_threads_do_not_meet(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a fork changes for its time, the filters of warnings and the collector, is the process's: one at a time."""
    both = threading.Barrier(2)

    def fork() -> int:
        with contextlib.suppress(threading.BrokenBarrierError):
            both.wait(0.1)
            raise AssertionError("two at once")
        raise BlockingIOError(11, "Resource temporarily unavailable")

    monkeypatch.setattr(os, "fork", fork)
    with ThreadPoolExecutor(2) as threads:
        ends = [threads.submit(processes.fork, lambda unblock: 0) for _ in range(2)]
        assert [type(end.exception()) for end in ends] == [BlockingIOError] * 2
    assert gc.isenabled()


def test_no_pidfd(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the kernel refuses a pidfd the child is watched by its pid, and still collected."""

    def refuse(pid: int) -> int:
        raise OSError(24, "Too many open files")

    monkeypatch.setattr(os, "pidfd_open", refuse, raising=False)
    child = processes.Child(processes.fork(lambda unblock: 5))
    assert child.pidfd is None
    assert collect(child)[0] == 5


def test_strangers_are_reaped_and_ours_are_not() -> None:
    """As process 1 the master collects orphans; one of its own keeps its exit until it is asked for."""
    ours = processes.Child(processes.fork(lambda unblock: 7))
    stranger = processes.fork(lambda unblock: 3)
    try:
        for pid in (ours.pid, stranger):
            os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
        assert processes.reap_strangers({ours.pid})
    finally:
        assert collect(ours)[0] == 7
    assert processes.reap_strangers(()) is False
    with pytest.raises(ChildProcessError):
        os.waitpid(stranger, os.WNOHANG)


def test_pipes_of_others_are_dropped() -> None:
    """A pipe that was made after the census, and is not to be kept, is /dev/null in the child; its number stays
    taken."""
    first = os.pipe()
    known = inherited_pipes.snapshot()
    strange, own = os.pipe(), os.pipe()

    def main(unblock: Unblock) -> int:
        inherited_pipes.drop(known, own)
        return sum(os.readlink(f"/proc/self/fd/{fd}").startswith("pipe:") for fd in (*first, *own)) * 10 + sum(
            os.readlink(f"/proc/self/fd/{fd}") == "/dev/null" for fd in strange
        )

    try:
        assert {fd for fd, _ in known} >= set(first)
        assert collect(processes.Child(processes.fork(main)))[0] == 42
    finally:
        for fd in (*first, *strange, *own):
            os.close(fd)

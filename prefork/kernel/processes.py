"""The only fork, wait and kill of the project.

A fork happens with every signal blocked in the forking thread, so that no signal is lost or read by the wrong process
between the fork and the moment the child has handlers of its own. The child runs one function and leaves through
`os._exit`: the `finally` blocks and `atexit` functions of whoever called fork never run in it. Those that the child
registers itself do (see `exit_handlers`).

Only pids that were forked here are ever waited for, so that a child which the host program started keeps its exit
status.

Descriptors that belong to the master alone are registered with `private()`. They are closed in every child of this
process that is a fork without an exec, also in one that the host program or another pool in it makes: a write end of a
lifeline that leaked would keep orphans alive. This set is the one piece of module state: descriptors belong to the
process, not to a pool.
"""

import contextlib
import errno
import fcntl
import gc
import io
import os
import resource  # noqa: F401  # os.wait4 imports it by itself, at a first exit: that is lost if no descriptor is left then
import signal
import socket
import stat
import sys
import termios
import threading
import traceback
import warnings
from collections.abc import Callable, Container, Iterable, Iterator
from typing import Any

import prefork.kernel.exit_handlers as exit_handlers
import prefork.kernel.lossy_writer as lossy_writer
from prefork.kernel.unpatched import select

# What is blocked around a fork: every standard signal. The real-time ones are left out because `signal` translates the
# former mask one by one, at 230 us a fork with them.
_SIGNALS = {one for one in signal.valid_signals() if one < 32} - {signal.SIGKILL, signal.SIGSTOP}

_private: set[int] = set()
# Held while descriptors are made and declared, and during a fork: no child can come between the two.
_lock = threading.RLock()


@contextlib.contextmanager
def fork_lock() -> Iterator[None]:
    """No fork of this module happens inside: what is opened in it can be declared private in time."""
    with _lock:
        yield


def private(fds: Iterable[int]) -> None:
    """Declare descriptors that no child may keep."""
    _private.update(fds)


def close(fds: Iterable[int]) -> None:
    """Close descriptors and forget that they were private."""
    for fd in fds:
        _private.discard(fd)
        with contextlib.suppress(OSError):
            os.close(fd)


def forget(fds: Iterable[int]) -> None:
    """Descriptors that are about to be closed by their owner."""
    _private.difference_update(fds)


def _after_fork() -> None:
    global _lock
    _lock = threading.RLock()
    left = sorted(_private)
    _private.clear()
    while left:  # in runs: a pool of 256 has 768 of them
        run = next((n for n, fd in enumerate(left) if fd != left[0] + n), len(left))
        os.closerange(left[0], left[0] + run)
        del left[:run]


os.register_at_fork(after_in_child=_after_fork)


class Child:
    """A process that was forked here.

    `pidfd` is readable once it is dead, or None where the system has none to give (EMFILE, another kernel): then
    `reap()` has to be tried from time to time.
    """

    def __init__(self, pid: int, *, use_pidfd: bool = True) -> None:
        self.pid = pid
        self.pidfd: int | None = None
        self.ended = False  # its pidfd said so
        self._reaped = False
        if use_pidfd and hasattr(os, "pidfd_open"):
            with contextlib.suppress(OSError), fork_lock():
                self.pidfd = os.pidfd_open(pid)
                private([self.pidfd])

    def note_end(self) -> None:
        self.ended = True

    def send(self, signum: int) -> None:
        """Send a signal, if the process is still there. The pid cannot be somebody else's: only we reap it.

        Where the system refuses the call by pidfd (a container's filter, an old kernel), the pid is used.

        Raises
        ------
        OSError
            EPERM: the process has another user now, and this one may not signal it.
        """
        if self._reaped:
            return
        if self.pidfd is not None:
            try:
                signal.pidfd_send_signal(self.pidfd, signum)
            except ProcessLookupError:
                return
            except OSError:
                pass
            else:
                return
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, signum)

    def reap(self) -> tuple[int | None, int | None] | None:
        """Collect the exit if there is one: (status, peak resident bytes), or None while the process lives.

        The status is None where somebody else in this process collected it first, the memory where the system did not
        tell it.
        """
        try:
            collected = self._collect(os.WNOHANG)
        except ChildProcessError:
            if self.pidfd is not None and not readable(self.pidfd):
                return None
            self._reaped = True
            return None, None
        self._reaped = collected is not None
        return collected

    def await_exit(self) -> None:
        """Wait for the end of a process that was sent SIGKILL."""
        with contextlib.suppress(ChildProcessError):
            while not self._reaped:
                self._reaped = self._collect(0) is not None
        self._reaped = True

    def _collect(self, options: int) -> tuple[int, int | None] | None:
        """Of wait4(2), or where it is refused of waitid(2). A child that asked to be traced by its parent also shows
        its stops here; they are not its end."""
        try:
            pid, status, usage = os.wait4(self.pid, options)
        except ChildProcessError:
            raise
        except OSError:
            info = os.waitid(os.P_PID, self.pid, os.WEXITED | options)
            if info is None or info.si_code not in (os.CLD_EXITED, os.CLD_KILLED, os.CLD_DUMPED):
                return None
            return (info.si_status if info.si_code == os.CLD_EXITED else -info.si_status), None
        if pid == 0 or not (os.WIFEXITED(status) or os.WIFSIGNALED(status)):
            return None
        return os.waitstatus_to_exitcode(status), usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)

    def release(self) -> None:
        """Give the descriptor back, once the exit is collected."""
        if self.pidfd is not None:
            close([self.pidfd])
            self.pidfd = None


def reap_strangers(ours: Container[int]) -> bool:
    """For process 1, to which the kernel hands every orphan: collect those that have ended, but none of `ours`.

    Whether one of ours stood in the way: ask again once it is collected.
    """
    with contextlib.suppress(ChildProcessError):
        while found := os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT):
            if found.si_pid in ours:
                return True
            os.waitpid(found.si_pid, os.WNOHANG)
    return False


def readable(fd: int) -> bool:
    """Whether a descriptor has something to read, now."""
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    return bool(poll.poll(0))


def has_ended(fd: int) -> bool:
    """Whether nothing more will come from a socket, whatever of it is still to be read: its other end has said so, or
    somebody here has shut it down. Where the system has no POLLRDHUP, only the latter is seen."""
    poll = select.poll()
    poll.register(fd, getattr(select, "POLLRDHUP", 0))
    return bool(poll.poll(0))


def fork(main: Callable[[Callable[[], None]], int], *, freeze: bool = True) -> int:
    """Fork a child that runs `main(unblock)` and exits with the code it returns. Returns its pid.

    `main` calls `unblock()` once its signal handlers are in place. Inherited: everything but private descriptors and
    other threads. With `freeze`, what exists before the fork is kept out of the child's garbage collections, so that
    those do not copy the pages they would only look at (`gc.freeze`; 108-145 MB became 1.1 MB over a 200 MB heap).

    Raises
    ------
    OSError
        EAGAIN or ENOMEM, where the system refuses.
    """
    # The filters of warnings and the collector belong to the process, not to one of the threads that may fork here.
    with fork_lock():
        return _fork(main, freeze)


def _fork(main: Callable[[Callable[[], None]], int], freeze: bool) -> int:
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
    # Unless the program froze its heap itself. A few hundred objects are frozen by the interpreter as it starts (3.12).
    thaw = freeze and gc.get_freeze_count() < 1000
    collecting = gc.isenabled()
    try:
        flushed = flush()
        gc.disable()
        if freeze:
            gc.freeze()
        with warnings.catch_warnings():
            # Since 3.12 a fork beside other threads warns, which is an exception where warnings are errors. The master
            # says it once and by name instead (`threads_left_behind`).
            warnings.simplefilter("ignore", DeprecationWarning)
            pid = os.fork()
        if pid == 0:
            if collecting:
                gc.enable()
            if not flushed:
                renew_stream("stdout")
            _child(main, mask)
    finally:
        if collecting:
            gc.enable()
        if thaw:
            gc.unfreeze()
        _set_mask(mask)
    return pid


def _set_mask(mask: set[signal.Signals | int]) -> None:
    """Without fail: a parent that went on with all signals blocked would be deaf, and the child's pid lost."""
    for _ in range(10):
        with contextlib.suppress(OSError):
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
            return


def _child(main: Callable[[Callable[[], None]], int], mask: set[signal.Signals | int]) -> None:
    code = 1
    try:
        signal.set_wakeup_fd(-1)
        exit_handlers.forget()
        wanted = {signal.SIGTERM, signal.SIGINT, signal.SIGQUIT, signal.SIGHUP, signal.SIGABRT, signal.SIGXCPU}
        code = main(lambda: (signal.pthread_sigmask(signal.SIG_SETMASK, mask - wanted), None)[1])
        exit_handlers.run()
    except BaseException:
        with contextlib.suppress(BaseException):
            lossy_writer.standard("stderr").write(traceback.format_exc().encode("utf-8", "backslashreplace"))
    finally:
        with contextlib.suppress(BaseException):
            _flush_finally()
            lossy_writer.settle()
        os._exit(code)


# -- the standard streams ----------------------------------------------------------------------------------------------


def fill_standard() -> None:
    """See to it that 0, 1 and 2 are open, on /dev/null where nothing else is (daemon(3)), and `sys` has its streams.

    A process may be started without them. The next file or connection would get such a number, and with it what anybody
    writes to standard error.
    """
    if not all(map(_is_open, range(3))):
        while (fd := nowhere()) <= 2:  # the lowest number that is free
            os.set_inheritable(fd, True)
        os.close(fd)
    for fd, name in enumerate(("stdin", "stdout", "stderr")):
        stream = getattr(sys, name)
        if stream is not None and not getattr(stream, "closed", False):
            continue
        # Python opens nothing that an exec inherits: such a number belongs to a file or a listener of the program.
        to = fd if os.get_inheritable(fd) else nowhere()
        new = open(to, "w" if fd else "r", encoding="utf-8", errors="backslashreplace", closefd=False)  # noqa: SIM115
        setattr(sys, name, new)
        setattr(sys, f"__{name}__", new)


def lift(sock: socket.socket) -> None:
    """Give a socket of the program's that has got one of these numbers another, and the number to /dev/null. The object
    stays the same."""
    fd = sock.fileno()
    if 0 <= fd <= 2:
        timeout, new = sock.gettimeout(), fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 3)
        family, kind, proto = sock.family, sock.type, sock.proto
        sock.detach()
        socket.socket.__init__(sock, family, kind, proto, new)
        sock.settimeout(timeout)
        null = nowhere()
        os.dup2(null, fd)
        os.close(null)


def _is_open(fd: int) -> bool:
    try:
        os.fstat(fd)
    except OSError:
        return False
    return True


def flush() -> bool:
    """Flush stdout and stderr where that cannot block: a reader that sleeps must not stop the pool. Whether nothing of
    stdout is left in this process for want of room."""
    return [_flush(stream) for stream in (sys.stderr, sys.stdout)][1]


def _flush(stream: Any) -> bool:
    try:
        if not _has_room(stream.fileno()):
            return False
        stream.flush()
    except Exception:  # there is none, or whatever a program has put there
        return True
    return True


def _has_room(fd: int) -> bool:
    """Whether all that a stream may keep back can be written now."""
    poll = select.poll()
    poll.register(fd, select.POLLOUT)
    if not poll.poll(0):
        return False
    # Of a pipe that means a page, and a stream keeps more.
    return not stat.S_ISFIFO(os.fstat(fd).st_mode) or fcntl.ioctl(fd, termios.FIONREAD, bytes(4)) == bytes(4)


def _flush_finally() -> None:
    """At the end of a child: flush what there is room for, and leave the rest."""
    for stream in (sys.stdout, sys.stderr):
        try:
            fd = stream.fileno()
            if not _has_room(fd):
                # In this process alone: its end is near.
                own = os.open(f"/proc/self/fd/{fd}", os.O_WRONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
                os.dup2(own, fd)
            stream.flush()
        except Exception:  # full, or whatever a program has put there
            continue


def renew_stream(name: str) -> None:
    """Put a new stream in the place of a standard one, if it is Python's own: what the old one keeps back belongs to
    somebody else, or its lock is held for ever."""
    old: Any = getattr(sys, name)
    if old is None or old is not getattr(sys, f"__{name}__"):
        return
    with contextlib.suppress(Exception):
        raw = io.FileIO(old.fileno(), "w", closefd=False)
        setattr(
            sys,
            name,
            io.TextIOWrapper(
                raw if old.write_through else io.BufferedWriter(raw),
                encoding=old.encoding,
                errors=old.errors,
                line_buffering=old.line_buffering,
                write_through=old.write_through,
            ),
        )


# -- what a child does not have, or must not ---------------------------------------------------------------------------


class OwnThread(threading.Thread):
    """A thread of the master's own, that no child misses."""


def threads_left_behind() -> list[str]:
    """Names of the threads that a forked child will not have."""
    own = threading.current_thread()
    return [t.name for t in threading.enumerate() if t is not own and not isinstance(t, OwnThread)]


def pipes() -> set[tuple[int, int]]:
    """The pipes that are open here beside the standard streams, by descriptor and inode; none where /proc is not."""
    found = set()
    with contextlib.suppress(OSError):
        for fd in map(int, os.listdir("/proc/self/fd")):
            with contextlib.suppress(OSError):
                entry = os.fstat(fd)
                if fd > 2 and stat.S_ISFIFO(entry.st_mode):
                    found.add((fd, entry.st_ino))
    return found


def drop_pipes(known: set[tuple[int, int]], keep: Iterable[int]) -> None:
    """In a child: put /dev/null in the place of every pipe that is neither `known` nor to be kept.

    Another thread of the parent may be inside `subprocess.Popen` at the fork. A child that kept the write end of the
    pipe by which it waits for its exec would make it wait for as long as the child lives. Closing them instead would
    give their numbers away, and objects in the child may still own those.
    """
    strangers = {fd for fd, _ in pipes() - known}.difference(keep)
    if strangers:
        null = nowhere()
        for fd in strangers:
            os.dup2(null, fd, inheritable=False)
        os.close(null)


def wake_reader(reader: int, writer: int) -> None:
    """Make the reading end of a non-blocking pipe readable; from a signal handler, too."""
    try:
        os.write(writer, b"\0")
    except BlockingIOError:
        pass  # it is already
    except OSError:  # refused: the end of the pipe wakes its reader, too
        os.dup2(reader, writer, inheritable=False)


def nowhere() -> int:
    """A descriptor to put in the place of another: of /dev/null or, where that is missing, of a pipe at its end."""
    try:
        return os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
    except OSError:
        reader, writer = os.pipe()
        os.close(writer)
        return reader


def refused(error: OSError) -> bool:
    """Whether an error says that the system has no room now, and may have some later."""
    return error.errno in (errno.EAGAIN, errno.ENOMEM, errno.EMFILE, errno.ENFILE, errno.ENOSPC, errno.ENOBUFS)


def wait_readable(fd: int, timeout: float) -> bool:
    """Wait until a descriptor has something to read, or `timeout` seconds have passed."""
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    return bool(poll.poll(max(0.0, timeout) * 1000))

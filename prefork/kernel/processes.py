"""The only fork, wait and kill of the project.

A fork happens with every signal blocked in the forking thread. So no signal is lost, or read by the wrong process,
between the fork and the moment when the child has its own handlers. The child runs one function and leaves through
`os._exit`: the `finally` blocks and `atexit` functions of the code that called fork never run in it. Those that the
child registers itself do (see `exit_handlers`).

Only pids that were forked here are ever waited for, so that a child which the host program started keeps its exit
status.
"""

import contextlib
import gc
import os
import resource  # noqa: F401  # or os.wait4 imports it at a first exit, which is lost if no descriptor is left then
import signal
import sys
import threading
import traceback
import warnings
from collections.abc import Callable, Container

import prefork.kernel.exit_handlers as exit_handlers
import prefork.kernel.lossy_writer as lossy_writer
import prefork.kernel.private_fds as private_fds
import prefork.kernel.standard_streams as standard_streams
from prefork.kernel.readiness import is_readable, wait_readable

# What a child runs: it is given a function that unblocks the signals, and returns the exit code.
Main = Callable[[Callable[[], None]], int]

_LONG = 3600.0  # seconds

# What is blocked around a fork: every standard signal. The real-time ones are left out because `signal` translates the
# former mask one by one: with them it takes 230 us per fork.
_SIGNALS = {signum for signum in signal.valid_signals() if signum < 32} - {signal.SIGKILL, signal.SIGSTOP}


class Child:
    """A process that was forked here.

    `pidfd` is readable once the process is dead. It is None where the system has none to give (EMFILE, another kernel):
    then `reap()` has to be tried from time to time.
    """

    def __init__(self, pid: int, *, use_pidfd: bool = True) -> None:
        self.pid = pid
        self.pidfd: int | None = None
        self.ended = False  # its pidfd said so
        self._reaped = False
        if use_pidfd and hasattr(os, "pidfd_open"):
            with contextlib.suppress(OSError), private_fds.fork_lock():
                self.pidfd = os.pidfd_open(pid)
                private_fds.add([self.pidfd])

    def note_end(self) -> None:
        self.ended = True

    def send(self, signum: int) -> None:
        """Send a signal, if the process is still there. The pid cannot belong to another process: only we reap it.

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
        """Collect the exit if the process has ended: (status, peak resident bytes), or None while the process lives.

        The status is None where other code in this process collected it first. The memory is None where the system did
        not tell it.
        """
        try:
            collected = self._collect(os.WNOHANG)
        except ChildProcessError:
            if self.pidfd is not None and not is_readable(self.pidfd):
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
        """Call wait4(2) or, where that is refused, waitid(2).

        A child that asked its parent to trace it also shows its stops here; they are not its end.
        """
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
            private_fds.close([self.pidfd])
            self.pidfd = None


def await_end(pid: int) -> None:
    """Wait until a process has ended that is nobody's child here. Where the kernel has no pidfd: do not wait."""
    with contextlib.suppress(OSError, AttributeError):
        fd = os.pidfd_open(pid)
        try:
            while not wait_readable(fd, _LONG):
                pass
        finally:
            os.close(fd)


def reap_strangers(ours: Container[int]) -> bool:
    """For process 1, to which the kernel hands every orphan: collect those that have ended, but none of `ours`.

    Returns whether one of ours stood in the way: ask again once it is collected.
    """
    with contextlib.suppress(ChildProcessError):
        while info := os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT):
            if info.si_pid in ours:
                return True
            os.waitpid(info.si_pid, os.WNOHANG)
    return False


class OwnThread(threading.Thread):
    """A thread of prefork's own, which no child misses."""


def threads_left_behind() -> list[str]:
    """Names of the threads that a forked child will not have."""
    current = threading.current_thread()
    return [
        thread.name for thread in threading.enumerate() if thread is not current and not isinstance(thread, OwnThread)
    ]


def fork(main: Main, *, freeze: bool = True) -> int:
    """Fork a child that runs `main(unblock)` and exits with the code it returns. Returns its pid.

    `main` calls `unblock()` once its signal handlers are in place. The child inherits everything but private
    descriptors and other threads. With `freeze`, what exists before the fork is kept out of the child's garbage
    collections, which would copy the pages that they only look at (`gc.freeze`; 108-145 MB became 1.1 MB over a 200 MB
    heap).

    Raises
    ------
    OSError
        EAGAIN or ENOMEM, where the system refuses.
    """
    # The filters of warnings and the collector belong to the process, not to one of the threads that may fork here.
    with private_fds.fork_lock():
        return _fork(main, freeze)


def _fork(main: Main, freeze: bool) -> int:
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
    # Unless the program froze its heap itself. A few hundred objects are frozen by the interpreter as it starts (3.12).
    thaw = freeze and gc.get_freeze_count() < 1000
    collecting = gc.isenabled()
    try:
        flushed = standard_streams.flush()
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
                standard_streams.renew("stdout")
            _child(main, mask)
    finally:
        if collecting:
            gc.enable()
        if thaw:
            gc.unfreeze()
        _set_mask(mask)
    return pid


def _set_mask(mask: set[signal.Signals | int]) -> None:
    """Restore the mask without fail: a parent that went on with all signals blocked would be deaf, and the child's pid
    lost."""
    for _ in range(10):
        with contextlib.suppress(OSError):
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
            return


def _child(main: Main, mask: set[signal.Signals | int]) -> None:
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
            standard_streams.flush_at_exit()
            lossy_writer.settle()
        os._exit(code)

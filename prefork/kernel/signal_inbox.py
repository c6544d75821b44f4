"""The signal inbox: the signals of the master, and everything else that wakes it.

Waiting cannot fail. While the epoll refuses a descriptor (ENOSPC, ENOMEM: it has limits of its own), everything is
waited for by poll(2). So it is where the epoll refuses to wait. Where poll refuses too, every descriptor is looked at
after a short sleep. So a callback may be called without a reason, and must not block.

Handlers only note which signal came. `set_wakeup_fd` (signal(7), CPython's own C-level handler) makes the selector
return. The bytes on that socket pair are never counted or interpreted: 200,000 signals arrived as 20,733 bytes. Other
threads wake the master through the same pair.

Handlers can only be installed by the main thread. Elsewhere the inbox has none, and a master is steered by its methods.

Where faulthandler is on (PYTHONFAULTHANDLER, `-X dev`), CPython runs every handler on the small stack that faulthandler
made for this thread. When several signals are pending at once, their frames lie one on top of the other: with AVX-512
five of them overflow it, and the kernel ends the process with SIGSEGV. While the inbox is installed that stack is a
large stack.
"""

import contextlib
import faulthandler
import functools
import mmap
import select
import selectors
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterable
from typing import Any

import prefork.kernel.private_fds as private_fds
import prefork.kernel.readiness as readiness

# A frame takes 3.4 KiB with AVX-512, 12 KiB with AMX; a master handles eight signals. Only touched pages take memory.
_ROOM = 512 * 1024
_PAUSE = 0.02  # seconds between two looks at everything where the system refuses every kind of waiting


class Inbox:
    """Waits for signals, descriptors, and `wake()`.

    Parameters
    ----------
    signals
        The signals to take over between `install()` and `restore()`. The latter puts the former handlers and wake-up
        descriptor back.
    """

    def __init__(self, signals: Iterable[signal.Signals]) -> None:
        self._signals = tuple(signals)
        with private_fds.fork_lock():
            self._selector = selectors.DefaultSelector()
            self._receiver, self._sender = socket.socketpair()
            self._own = [self._receiver.fileno(), self._sender.fileno()]
            if isinstance(self._selector, selectors.EpollSelector):
                self._own.append(self._selector.fileno())
            private_fds.add(self._own)
        self._receiver.setblocking(False)
        self._sender.setblocking(False)
        self._selector.register(self._receiver, selectors.EVENT_READ)
        self._callbacks: dict[int, Callable[[], None]] = {}
        self._refused: set[int] = set()  # of these, the descriptors that the epoll has not taken yet
        self._former: dict[signal.Signals, Any] = {}
        self._former_wakeup: int | None = None
        self._former_stack: Any = None
        self._pending: list[signal.Signals] = []

    def install(self) -> None:
        """Take the signals over, if this is the main thread."""
        if threading.current_thread() is not threading.main_thread():
            return
        self._former_stack = _enlarge_stack()
        self._former_wakeup = signal.set_wakeup_fd(self._sender.fileno(), warn_on_full_buffer=False)
        for signum in self._signals:
            self._former[signum] = signal.signal(signum, self._note)

    def restore(self) -> None:
        """Give the signals back."""
        for signum, handler in self._former.items():
            # None: it was not installed from Python, and cannot be put back from here either.
            signal.signal(signum, handler if handler is not None else signal.SIG_DFL)
        self._former.clear()
        if self._former_wakeup is not None:
            signal.set_wakeup_fd(self._former_wakeup)
            self._former_wakeup = None
        if self._former_stack is not None:
            _set_stack(self._former_stack)
            self._former_stack = None

    def close(self) -> None:
        """Give the descriptors back."""
        private_fds.forget(self._own)
        for owner in (self._selector, self._receiver, self._sender):
            with contextlib.suppress(OSError):  # the descriptor is gone whatever close(2) says
                owner.close()

    def _note(self, signum: int, frame: object) -> None:
        self._pending.append(signal.Signals(signum))
        self.wake()  # where the interpreter could not write to the pair itself: its wait goes on after a handler

    def wake(self) -> None:
        """From any thread: make `wait()` return."""
        with contextlib.suppress(OSError):  # full: it is awake already; closed: there is nobody to wake
            self._sender.send(b"\0")

    def watch(self, fd: int, callback: Callable[[], None]) -> None:
        """Have `wait()` return `callback` when the descriptor is readable."""
        self._callbacks[fd] = callback
        self._refused.add(fd)
        self._register()

    def unwatch(self, fd: int) -> None:
        self._callbacks.pop(fd, None)
        self._refused.discard(fd)
        with contextlib.suppress(KeyError, ValueError, OSError):
            self._selector.unregister(fd)

    def wait(self, timeout: float | None) -> tuple[list[Callable[[], None]], list[signal.Signals]]:
        """Sleep until something happens, at most `timeout` seconds.

        Returns the callbacks of the descriptors that are readable, and the signals that came.
        """
        if self._refused:
            self._register()
        for fd in (ready := self._select(0.0 if self._pending else timeout)):
            if fd == self._receiver.fileno():
                with contextlib.suppress(OSError):
                    while len(self._receiver.recv(4096)) == 4096:
                        pass
        signals, self._pending = self._pending, []
        return [self._callbacks[fd] for fd in ready if fd in self._callbacks], signals

    def pause(self, seconds: float) -> None:
        """Sleep until a signal, a `wake()`, or the end of the time."""
        if not self._pending:
            try:
                readiness.wait_readable(self._receiver.fileno(), seconds)
            except Exception:
                time.sleep(_PAUSE)

    def _register(self) -> None:
        for fd in list(self._refused):
            with contextlib.suppress(OSError):
                self._selector.register(fd, selectors.EVENT_READ)
                self._refused.discard(fd)

    def _select(self, timeout: float | None) -> list[int]:
        """The descriptors that are readable."""
        if not self._refused:
            with contextlib.suppress(Exception):  # of the system, or of a program that has replaced what is called here
                return [key.fd for key, _ in self._selector.select(timeout)]
        fds = [self._receiver.fileno(), *self._callbacks]
        try:
            poll = select.poll()
            for fd in fds:
                poll.register(fd, select.POLLIN)
            return [fd for fd, _ in poll.poll(None if timeout is None else timeout * 1000)]
        except Exception:
            time.sleep(_PAUSE)
            return fds


def _enlarge_stack() -> Any:
    """Have handlers run on a stack with room for all of them.

    Returns the former stack, or None where nothing was to be done.
    """
    if sys.platform != "linux" or not faulthandler.is_enabled():
        return None
    try:
        import ctypes
    except ImportError:  # a Python that was built without it
        return None

    class Stack(ctypes.Structure):
        _fields_ = (("address", ctypes.c_void_p), ("flags", ctypes.c_int), ("size", ctypes.c_size_t))

    stack = Stack(ctypes.addressof(ctypes.c_char.from_buffer(_stack())), 0, _ROOM)
    return _set_stack(stack)


def _set_stack(stack: Any) -> Any:
    """Call sigaltstack(2) for the calling thread. Returns the former stack, or None if the system refused."""
    import ctypes

    former = type(stack)()
    done = ctypes.CDLL(None).sigaltstack(ctypes.byref(stack), ctypes.byref(former)) == 0
    return former if done else None


@functools.cache
def _stack() -> mmap.mmap:
    """Made once and never given back: workers inherit its use. Private, or they would share what is on it."""
    return mmap.mmap(-1, _ROOM, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)

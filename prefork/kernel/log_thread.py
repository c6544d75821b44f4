"""The thread in which handlers of a program run while a master runs in its process.

Such a handler may wait for ever: for the reader of a pipe, for a network. So a bounded queue and a thread stand between
it and the master, as with `logging.handlers.QueueListener`. The first record for such a handler starts the thread. A
handler that has not returned for `STUCK_AFTER` seconds gets nothing more until it does, and meanwhile the log is on
standard error.

A fork waits at most `FORK_WAIT` for the thread to be between two records, so that no child inherits a lock that the
thread holds. A thread that is stuck does not delay a fork; the child then gets a new `sys.stdout`.

A worker has no such thread, because handlers of the program may fork.
"""

import atexit
import collections
import contextlib
import logging
import os
import threading
from time import monotonic

import prefork.kernel.log_delivery as log_delivery
import prefork.kernel.log_stderr as log_stderr
import prefork.kernel.processes as processes
import prefork.kernel.standard_streams as standard_streams

QUEUE_LIMIT = 1000  # records that may wait for the program's handlers
STUCK_AFTER = 0.5  # seconds after which a handler gets nothing more until it has returned
LAST_DELIVERY = 1.0  # seconds that the program's handlers have at the end of a master
FORK_WAIT = 0.05  # seconds


class Background:
    """Delivers records in a thread."""

    def __init__(self) -> None:
        # Not a `queue`: a program may have a module of that name, where the command is run as `python -m`.
        self._queue: collections.deque[tuple[logging.Logger, logging.LogRecord] | threading.Event | None]
        self._queue, self._filled = collections.deque(), threading.Semaphore(0)
        self._thread: threading.Thread | None = None
        self._since = 0.0  # when it began with the present record; 0: it has none
        self._dropped = 0
        self._stuck_was_said = False
        self._was_left = False  # behind, by `stop()`
        self._starting = threading.Lock()
        self.turn = threading.RLock()  # held around each record

    def put(self, logger: logging.Logger, record: logging.LogRecord) -> None:
        """Have a record delivered in the thread."""
        if self.is_stuck:
            if not self._stuck_was_said:
                self._stuck_was_said = True
                text = f"logging: a handler of the program has not returned for {STUCK_AFTER:g} s"
                log_stderr.say(f"{text}; until it returns, the log is written here [PF0505]")
            if log_delivery.targets(logger, record)[0]:
                log_stderr.say_record(record)
            return
        self._stuck_was_said = False
        if len(self._queue) >= QUEUE_LIMIT:
            self._dropped += 1
            return
        if count := self._dropped:
            self._dropped = 0
            text = "logging: %d records were dropped because handlers of the program are too slow [PF0506]"
            note = logger.makeRecord(logger.name, logging.WARNING, __file__, 0, text, (count,), None)
            self._add((logger, note))
        self._add((logger, record))
        if self._thread is None:
            self._start()

    def _add(self, item: tuple[logging.Logger, logging.LogRecord] | threading.Event | None) -> None:
        self._queue.append(item)
        self._filled.release()

    def _start(self) -> None:
        with self._starting:  # there may be several masters
            if self._thread is None:
                thread = processes.OwnThread(target=self._run, name="prefork-log", daemon=True)
                try:
                    thread.start()
                except RuntimeError:  # the system refuses; the next record tries again
                    self._empty()
                else:
                    self._thread = thread

    @property
    def is_stuck(self) -> bool:
        since = self._since
        return since > 0.0 and monotonic() - since > STUCK_AFTER

    def _run(self) -> None:
        while True:
            self._filled.acquire()
            try:
                item = self._queue.popleft()
            except IndexError:  # it was emptied
                continue
            if item is None:
                break
            if isinstance(item, threading.Event):
                item.set()
                continue
            with self.turn:
                self._since = monotonic()
                try:
                    log_delivery.deliver(*item, in_master=True)
                except BaseException as error:
                    log_delivery.blame(item[0], error)
                finally:
                    self._since = 0.0
        if self._was_left:
            atexit.register(logging.shutdown)

    def wait(self) -> bool:
        """Wait until all that is in the queue was delivered, at most `LAST_DELIVERY` seconds. False: it was not."""
        if self._thread is None:
            return True
        done, deadline = threading.Event(), monotonic() + LAST_DELIVERY
        self._add(done)
        while not done.wait(0.02):
            if self.is_stuck or monotonic() >= deadline:
                return False
        return True

    def stop(self) -> None:
        """End the thread. One that is stuck is left behind, and ends when it can."""
        done = self.wait()
        if not done:
            self._empty()
            self._was_left = True
            # It holds the lock of a handler, and perhaps of a stream: the end of the interpreter would wait for these.
            atexit.unregister(logging.shutdown)
            standard_streams.renew("stderr")
            standard_streams.renew("stdout")
        self._add(None)
        if done and self._thread is not None:
            self._thread.join(LAST_DELIVERY)

    def _empty(self) -> None:
        """Say here what no handler will get."""
        with contextlib.suppress(IndexError):
            while True:
                item = self._queue.popleft()
                if isinstance(item, tuple):
                    log_stderr.say_record(item[1])


current: Background | None = None  # while a master runs in this process


class _Fork(threading.local):
    held: Background | None = None  # whose turn this thread holds, during its fork
    was_stuck = False  # at the fork the thread held some lock, perhaps for ever


_fork = _Fork()


def was_stuck_at_fork() -> bool:
    """In a child: whether the thread had locks at the fork that nobody gives back here."""
    return _fork.was_stuck


def _before_fork() -> None:
    background = current
    _fork.was_stuck = background is not None and not background.turn.acquire(
        timeout=0.0 if background.is_stuck else FORK_WAIT
    )
    _fork.held = None if _fork.was_stuck else background


def _after_fork_in_parent() -> None:
    if _fork.held is not None:
        _fork.held.turn.release()
        _fork.held = None


def _after_fork_in_child() -> None:
    global current
    current = None


os.register_at_fork(before=_before_fork, after_in_parent=_after_fork_in_parent, after_in_child=_after_fork_in_child)

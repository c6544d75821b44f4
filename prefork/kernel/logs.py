"""The loggers of prefork, which work whatever a program does to logging, and never make a master wait.

A program configures logging for itself, and by default that disables every other logger (`disable_existing_loggers`).
Its handlers may raise, or wait for ever: for the reader of a pipe, for a network. What it wants of these loggers is
done: the handlers, levels and filters that it sets for them, or for the root where they propagate. Being disabled is
not what it wants: `get()` gives a logger a class that cannot be, and that survives filters and handlers which raise.

What no handler takes, and what is to be said of logging itself, goes to standard error through the one `Writer` that
neither waits nor raises.

While a master runs in the process of a program, records for code of the program's go through a bounded queue to a
thread, as with `logging.handlers.QueueListener`. The first such record starts it. Handlers of the standard library on
stdout and stderr, which most programs have, need no thread: their lines are written here, without waiting. A fork waits
at most `FORK_WAIT` for the thread to be between two records, so that no child inherits a lock that the thread holds.

A worker has no such thread, since handlers of the program may fork. There a handler that waits is the program's own
harm; only what was opened on stdout and stderr before the fork is pointed at streams that do not wait.
"""

import atexit
import collections
import contextlib
import logging
import os
import stat
import sys
import threading
from collections.abc import Iterator
from time import monotonic
from typing import Any, Literal

import prefork.kernel.lossy_writer as lossy_writer
import prefork.kernel.processes as processes
import prefork.kernel.standard_streams as standard_streams

FORMAT = "%(asctime)s prefork[%(process)s] %(levelname)s: %(message)s"
LIMIT = 1000  # records that may wait for the program's handlers
STUCK = 0.5  # seconds after which a handler gets nothing more until it has returned
FAREWELL = 1.0  # seconds that the program's handlers have at the end of a master
FORK_WAIT = 0.05  # seconds

Standard = Literal["stdout", "stderr"]


class Handler(logging.Handler):
    """A handler of prefork's own, on a `Writer`."""

    def __init__(self, to: lossy_writer.Writer, format: str = FORMAT) -> None:
        super().__init__()
        self.writer = to
        self.setFormatter(logging.Formatter(format))

    def emit(self, record: logging.LogRecord) -> None:
        self.writer.write(_line(self, record))


def _line(form: logging.Handler | logging.Formatter, record: logging.LogRecord) -> bytes:
    """Its text, also where the record cannot be formatted."""
    record.process = record.process or os.getpid()  # None where a program has set `logging.logProcesses` to False
    try:
        text = form.format(record)
    except Exception as error:
        text = f"prefork[{os.getpid()}] {record.levelname}: {record.msg!r} {record.args!r} ({error!r})"
    return f"{text}\n".encode("utf-8", "backslashreplace")


# -- the loggers -------------------------------------------------------------------------------------------------------


class Guarded(logging.Logger):
    """What `get()` makes of a logger. It takes no lock of the module `logging`, which a program's thread may hold."""

    @property
    def disabled(self) -> bool:  # an attribute of the base class, which dictConfig() and fileConfig() set
        return False

    @disabled.setter
    def disabled(self, value: object) -> None: ...

    def isEnabledFor(self, level: int) -> bool:
        # `logging.disable()` is an order in a script. Under the command the order is --log-level.
        return level >= self.getEffectiveLevel() and (_operated or level > self.manager.disable)

    def makeRecord(self, *args: Any, **kwargs: Any) -> logging.LogRecord:
        try:
            return super().makeRecord(*args, **kwargs)
        except Exception as error:  # of a factory, or a class, of the program's
            _blame(self, error)
            return logging.LogRecord(*args[:7])

    def handle(self, record: logging.LogRecord) -> None:
        try:
            background = _background
            if background is None or _is_harmless(self, record):
                _deliver(self, record)
            else:
                background.put(self, record)
        except Exception as error:  # of handlers that are none
            _blame(self, error)
            _say(record)


def get(name: str) -> logging.Logger:
    """The logger of that name, guarded."""
    logger = logging.getLogger(name)
    kind = type(logger)
    if not isinstance(logger, Guarded):
        # Also a logger that is there already, and that of a program with a class of its own (`setLoggerClass`).
        logger.__class__ = Guarded if kind is logging.Logger else type(kind.__name__, (Guarded, kind), {})
    return logger


def say(text: str) -> None:
    """A line of the log, to standard error. Neither waits nor raises; for whom logging is not to be trusted with it."""
    _say(logging.LogRecord("prefork", logging.ERROR, "", 0, "%s", (text,), None))


def write(text: str) -> None:
    """Text to standard error as it is. Neither waits nor raises."""
    _write(text.encode("utf-8", "backslashreplace"))


def _deliver(logger: logging.Logger, record: logging.LogRecord) -> None:
    """To every handler, whatever each of them does; to standard error if none takes it."""
    try:
        kept: Any = logger.filter(record)
    except Exception as error:
        _blame(logger, error)
        kept = True
    if not kept:
        return
    if isinstance(kept, logging.LogRecord):  # since 3.12 a filter may give another
        record = kept
    handlers, some = _targets(logger, record)
    taken = False
    if _is_patched(logger):
        try:
            logger.callHandlers(record)
            taken = True
        except Exception as error:
            _blame(logger, error)
    else:
        for handler in handlers:
            taken = _give(handler, record) or taken
    if not taken and (handlers or (not some and record.levelno >= logging.WARNING)):
        _say(record)


def _targets(logger: logging.Logger, record: logging.LogRecord) -> tuple[list[logging.Handler], bool]:
    """The handlers that want a record, and whether there are any at all."""
    handlers: list[logging.Handler] = []
    some = False
    here: logging.Logger | None = logger
    while here is not None:
        some = some or bool(here.handlers)
        handlers += [handler for handler in here.handlers if record.levelno >= handler.level]
        here = here.parent if here.propagate else None
    return handlers, some


def _is_patched(logger: logging.Logger) -> bool:
    """Whether somebody wants to see every record on its way, as Sentry and New Relic do."""
    return getattr(type(logger).callHandlers, "__globals__", None) is not vars(logging)


def _is_harmless(logger: logging.Logger, record: logging.LogRecord) -> bool:
    """Whether the delivery runs no code of the program's, and cannot wait."""
    return not (logger.filters or _is_patched(logger)) and all(
        type(handler) in (Handler, logging.NullHandler)
        or (
            _standard_of(handler) is not None
            and not handler.filters
            and type(handler.formatter) in (type(None), logging.Formatter)
        )
        for handler in _targets(logger, record)[0]
    )


def _standard_of(handler: logging.Handler) -> Standard | None:
    """The standard stream that a handler of the standard library writes to."""
    kind = type(handler)
    if not isinstance(handler, logging.StreamHandler) or handler.stream is None:
        return None
    stock = kind.emit is logging.StreamHandler.emit and kind.handle is logging.Handler.handle
    return _name_of(handler.stream) if stock else None


def _name_of(stream: object) -> Standard | None:
    return "stderr" if stream is sys.__stderr__ else "stdout" if stream is sys.__stdout__ else None


def _give(handler: logging.Handler, record: logging.LogRecord) -> bool:
    """Have a handler handle it. False: it failed."""
    problems: list[BaseException | None] = []
    kind = type(handler)
    try:
        if kind.handle is not logging.Handler.handle:
            handler.handle(record)
            return True
        kept: Any = handler.filter(record)
        if not kept:
            return True
        if isinstance(kept, logging.LogRecord):
            record = kept
        if _is_of_master() and (name := _standard_of(handler)):
            text = handler.format(record) + handler.terminator  # type: ignore[attr-defined]  # it is a StreamHandler
            _standard(name).write(text.encode("utf-8", "backslashreplace"))
            return True
        handler.acquire()
        try:
            if kind.handleError is logging.Handler.handleError and "handleError" not in vars(handler):
                # That prints to a sys.stderr which may wait, or says nothing (`logging.raiseExceptions`).
                handler.handleError = lambda record: problems.append(sys.exc_info()[1])  # type: ignore[method-assign]
                try:
                    handler.emit(record)
                finally:
                    del handler.handleError
            else:
                handler.emit(record)
        finally:
            handler.release()
    except Exception as error:
        problems.append(error)
    for problem in problems:
        _blame(handler, problem)
    return not problems


def _is_of_master() -> bool:
    return _background is not None or isinstance(threading.current_thread(), processes.OwnThread)


_blamed: set[tuple[type, type]] = set()


def _blame(what: object, error: BaseException | None) -> None:
    """Say, once of each kind, that code of the program failed in logging."""
    key = type(what), type(error)
    if key not in _blamed:
        _blamed.add(key)
        name = f"the handler {type(what).__name__}" if isinstance(what, logging.Handler) else "a filter or a class"
        say(f"logging: {name} of the program has failed: {error!r}; what no handler takes is logged here")


# -- standard error ----------------------------------------------------------------------------------------------------

_operated = False  # by the command, whose --log-level counts
_running = 0  # masters in this process
_is_child = False  # of a master
_lock = threading.Lock()  # for `_running`
_standards: dict[Standard, lossy_writer.Writer] = {}
_FORM = logging.Formatter(FORMAT)


def _standard(name: Standard) -> lossy_writer.Writer:
    if name not in _standards:
        _standards[name] = lossy_writer.standard(name)
    return _standards[name]


def _close_standards() -> None:
    while _standards:
        _standards.popitem()[1].close()


def _say(record: logging.LogRecord) -> None:
    _write(_line(_FORM, record))


def _write(data: bytes) -> None:
    _standard("stderr").write(data)
    if not (_running or _is_child):
        _close_standards()


def begin() -> None:
    """A master begins in this process: from now on no record makes it wait."""
    global _running, _background
    with _lock:
        _running += 1
        if _running == 1:
            if not _is_child:
                _close_standards()  # in a fork of a process that had a master
            _standard("stderr")
            _background = Background()


def end() -> None:
    """It is over. Handlers of the program have `FAREWELL` seconds for what is in the queue."""
    global _running, _background
    with _lock:
        try:
            if _running == 1 and _background is not None:
                background, _background = _background, None
                background.stop()
        finally:
            _running -= 1
            if not (_running or _is_child):
                _close_standards()


def wait() -> None:
    """Until the handlers of the program have what was logged, at most `FAREWELL` seconds."""
    if _background is not None:
        _background.wait()


@contextlib.contextmanager
def operated(level: str) -> Iterator[None]:
    """Under the command: log from `level` on to standard error, also in workers whatever their program does to the
    level of the root, or by `logging.disable()`."""
    global _operated
    begin()
    logger, handler = get("prefork"), Handler(_standard("stderr"))
    logger.addHandler(handler)
    logger.propagate = False
    logger.setLevel(level.upper())
    _operated = True
    former, sys.stderr = (
        sys.stderr,
        lossy_writer.stream(handler.writer, "<stderr>"),
    )  # for warnings, and what Python ignores
    try:
        yield
    finally:
        _operated, sys.stderr = False, former
        logger.removeHandler(handler)
        end()


def enter_child() -> None:
    """In a new child: it has the standard streams, and none that it inherits makes it wait. What the program has put in
    the place of `sys.stderr` is left alone."""
    global _is_child
    _is_child = True
    standard_streams.fill()
    if _forking.stuck:
        standard_streams.renew("stdout")
    for handler in handlers():
        if isinstance(handler, logging.StreamHandler) and handler.stream is not None:
            name = _name_of(handler.stream)
            if name:
                with contextlib.suppress(AttributeError):  # a property
                    handler.stream = lossy_writer.stream(_standard(name), f"<{name}>")
    if sys.stderr is None or sys.stderr is sys.__stderr__:
        sys.stderr = lossy_writer.stream(_standard("stderr"), "<stderr>")


# -- all handlers ------------------------------------------------------------------------------------------------------


def handlers() -> list[logging.Handler]:
    """Every handler of every logger, and those to which they hand records on."""
    loggers = [logging.root, *logging.root.manager.loggerDict.values()]
    known = [handler for logger in loggers for handler in getattr(logger, "handlers", ())]  # a PlaceHolder has none
    for handler in known:
        target = getattr(handler, "target", None)  # of a MemoryHandler
        if isinstance(target, logging.Handler) and target not in known:
            known.append(target)
    return known


def reopen() -> None:
    """Have everything that logs to a file open it again by its name, as after a rotation."""
    problems = lossy_writer.reopen()
    for handler in handlers():
        stream: Any = getattr(handler, "stream", None)
        if isinstance(handler, logging.FileHandler) and stream is not None:
            try:
                _reopen(stream.fileno(), handler.baseFilename)
            except (OSError, ValueError) as error:
                problems.append(f"{handler.baseFilename} cannot be opened again: {error}")
    for problem in problems:
        say(problem)


def _reopen(fd: int, path: str) -> None:
    if stat.S_ISREG(os.fstat(fd).st_mode):  # a FIFO is not rotated, and to open one may wait
        # dup2 under the stream, not close and open: this may run between two halves of a write.
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NONBLOCK | os.O_CLOEXEC
        new = os.open(path, flags, 0o666)
        os.dup2(new, fd, inheritable=False)
        os.close(new)


class AccessFile:
    """Where access lines go: a file, or (`-`) standard output. It does not wait, and no configuration of logging
    reaches it.

    Raises
    ------
    OSError
        The file cannot be opened.
    """

    def __init__(self, path: str) -> None:
        self._writer = (
            lossy_writer.standard("stdout", "access lines")
            if path == "-"
            else lossy_writer.Writer(path, "access lines")
        )
        self._say_at = 0.0

    def write(self, line: str) -> None:
        if not self._writer.write(line.encode("utf-8", "backslashreplace")) and monotonic() >= self._say_at:
            self._say_at = monotonic() + 60.0
            get("prefork").warning("access lines are dropped: %s: %s", self._writer.where, self._writer.reason)


# -- the thread for handlers of the program ----------------------------------------------------------------------------


class Background:
    """Delivers records in a thread."""

    def __init__(self) -> None:
        # Not a `queue`: a program may have a module of that name, where the command is run as `python -m`.
        self._queue: collections.deque[tuple[logging.Logger, logging.LogRecord] | threading.Event | None]
        self._queue, self._filled = collections.deque(), threading.Semaphore(0)
        self._thread: threading.Thread | None = None
        self._since = 0.0  # when it began with the record in hand; 0: it has none
        self._dropped = 0
        self._told = self._left = False
        self._starting = threading.Lock()
        self.turn = threading.RLock()  # held around each record

    def put(self, logger: logging.Logger, record: logging.LogRecord) -> None:
        if self.is_stuck:
            if not self._told:
                self._told = True
                say(f"logging: a handler of the program has not returned for {STUCK:g} s; meanwhile the log is here")
            if _targets(logger, record)[0]:
                _say(record)
            return
        self._told = False
        if len(self._queue) >= LIMIT:
            self._dropped += 1
            return
        if count := self._dropped:
            self._dropped = 0
            text = "logging: %d records were dropped, handlers of the program are too slow"
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
        return since > 0.0 and monotonic() - since > STUCK

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
                    _deliver(*item)
                except BaseException as error:
                    _blame(item[0], error)
                finally:
                    self._since = 0.0
        if self._left:
            atexit.register(logging.shutdown)

    def wait(self) -> bool:
        """Whether everything in the queue was delivered within `FAREWELL` seconds."""
        if self._thread is None:
            return True
        done, until = threading.Event(), monotonic() + FAREWELL
        self._add(done)
        while not done.wait(0.02):
            if self.is_stuck or monotonic() >= until:
                return False
        return True

    def stop(self) -> None:
        """End the thread; one that is stuck is left behind, and ends when it can."""
        done = self.wait()
        if not done:
            self._empty()
            self._left = True
            # It holds the lock of a handler, and perhaps of a stream: at the end of the interpreter these would be
            # waited for.
            atexit.unregister(logging.shutdown)
            standard_streams.renew("stderr")
            standard_streams.renew("stdout")
        self._add(None)
        if done and self._thread is not None:
            self._thread.join(FAREWELL)

    def _empty(self) -> None:
        """Say here what no handler will get."""
        with contextlib.suppress(IndexError):
            while True:
                item = self._queue.popleft()
                if isinstance(item, tuple):
                    _say(item[1])


class _Forking(threading.local):
    held: Background | None = None
    stuck = False  # the thread has some lock for ever


_background: Background | None = None
_forking = _Forking()


def _before_fork() -> None:
    background = _background
    _forking.stuck = background is not None and not background.turn.acquire(
        timeout=0.0 if background.is_stuck else FORK_WAIT
    )
    _forking.held = None if _forking.stuck else background


def _after_fork_in_parent() -> None:
    if _forking.held is not None:
        _forking.held.turn.release()
        _forking.held = None


def _after_fork_in_child() -> None:
    global _background, _running, _lock
    _background, _running, _lock = None, 0, threading.Lock()


os.register_at_fork(before=_before_fork, after_in_parent=_after_fork_in_parent, after_in_child=_after_fork_in_child)

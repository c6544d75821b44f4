"""How a record reaches the handlers of a program, whatever each of them does.

What a program wants of a logger is done: its handlers, levels and filters, and those of the root where the logger
propagates. A filter that raises lets the record pass. A handler that raises keeps no other from being called. What no
handler takes goes to standard error. What fails in the program's code is said there too, once of each kind.

In a master nothing waits for the reader of a standard stream: the lines of the standard library's handlers on stdout
and stderr are written here, through a `Writer`.
"""

import logging
import sys
from typing import Any

import prefork.kernel.log_stderr as log_stderr
from prefork.kernel.lossy_writer import StreamName


def deliver(logger: logging.Logger, record: logging.LogRecord, *, in_master: bool) -> None:
    """Give a record to every handler that wants it; to standard error if none takes it.

    With `in_master`, handlers of the standard library on a standard stream do not wait for its reader.
    """
    try:
        kept: Any = logger.filter(record)
    except Exception as error:
        blame(logger, error)
        kept = True
    if not kept:
        return
    if isinstance(kept, logging.LogRecord):  # since 3.12 a filter may give another
        record = kept
    handlers, has_handlers = targets(logger, record)
    taken = False
    if _is_patched(logger):
        try:
            logger.callHandlers(record)
            taken = True
        except Exception as error:
            blame(logger, error)
    else:
        for handler in handlers:
            taken = _give(handler, record, in_master) or taken
    if not taken and (handlers or (not has_handlers and record.levelno >= logging.WARNING)):
        log_stderr.say_record(record)


def targets(logger: logging.Logger, record: logging.LogRecord) -> tuple[list[logging.Handler], bool]:
    """The handlers that want a record, and whether there are any at all."""
    handlers: list[logging.Handler] = []
    has_handlers = False
    ancestor: logging.Logger | None = logger
    while ancestor is not None:
        has_handlers = has_handlers or bool(ancestor.handlers)
        handlers += [handler for handler in ancestor.handlers if record.levelno >= handler.level]
        ancestor = ancestor.parent if ancestor.propagate else None
    return handlers, has_handlers


def _is_patched(logger: logging.Logger) -> bool:
    """Whether other code wants to see every record on its way, as Sentry and New Relic do."""
    return getattr(type(logger).callHandlers, "__globals__", None) is not vars(logging)


def is_harmless(logger: logging.Logger, record: logging.LogRecord) -> bool:
    """Whether the delivery in a master runs no code of the program's, and cannot wait."""
    return not (logger.filters or _is_patched(logger)) and all(
        type(handler) in (log_stderr.Handler, logging.NullHandler)
        or (
            _standard_stream_of(handler) is not None
            and not handler.filters
            and type(handler.formatter) in (type(None), logging.Formatter)
        )
        for handler in targets(logger, record)[0]
    )


def _standard_stream_of(handler: logging.Handler) -> StreamName | None:
    """The standard stream that a handler of the standard library writes to."""
    kind = type(handler)
    if not isinstance(handler, logging.StreamHandler) or handler.stream is None:
        return None
    is_stock = kind.emit is logging.StreamHandler.emit and kind.handle is logging.Handler.handle
    return name_of(handler.stream) if is_stock else None


def name_of(stream: object) -> StreamName | None:
    """The name of a standard stream, None for any other."""
    return "stderr" if stream is sys.__stderr__ else "stdout" if stream is sys.__stdout__ else None


def _give(handler: logging.Handler, record: logging.LogRecord, in_master: bool) -> bool:
    """Have a handler handle a record. False: it failed."""
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
        if in_master and (name := _standard_stream_of(handler)):
            text = handler.format(record) + handler.terminator  # type: ignore[attr-defined]  # it is a StreamHandler
            log_stderr.writer_of(name).write(text.encode("utf-8", "backslashreplace"))
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
        blame(handler, problem)
    return not problems


_blamed: set[tuple[type, type]] = set()


def blame(culprit: object, error: BaseException | None) -> None:
    """Say, once of each kind, that code of the program failed in logging."""
    key = type(culprit), type(error)
    if key not in _blamed:
        _blamed.add(key)
        name = (
            f"the handler {type(culprit).__name__}" if isinstance(culprit, logging.Handler) else "a filter or a class"
        )
        text = f"logging: {name} of the program failed: {error!r}; records that no handler takes are written here"
        log_stderr.say(f"{text} [PF0504]")


def all_handlers() -> list[logging.Handler]:
    """Every handler of every logger, and those to which they hand records on."""
    loggers = [logging.root, *logging.root.manager.loggerDict.values()]
    handlers = [handler for logger in loggers for handler in getattr(logger, "handlers", ())]  # a PlaceHolder has none
    for handler in handlers:
        target = getattr(handler, "target", None)  # of a MemoryHandler
        if isinstance(target, logging.Handler) and target not in handlers:
            handlers.append(target)
    return handlers

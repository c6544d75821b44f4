"""Exceptions. Each that ends a program carries the exit code of the command (see `docs/signals.md`)."""


class PreforkError(Exception):
    """Base of every error that prefork raises itself."""

    exit_code = 1


class OptionError(PreforkError, ValueError):
    """A setting is out of range, of the wrong type, or does not fit the server. The message names it and the mend."""

    exit_code = 2


class BootError(PreforkError):
    """No worker of the first generation became ready. The message ends with the last worker's own traceback."""

    exit_code = 3


class ProgramError(PreforkError):
    """The program cannot be imported, or names nothing that can be served. Carries the program's own traceback."""

    exit_code = 4


class RequestTimeout(PreforkError):
    """Raised inside a handler whose request is past its deadline.

    It is an ordinary exception, so that `finally` blocks and the server's `handle_error()` run and the worker lives.
    It is no `TimeoutError`: that is an `OSError`, which handlers catch around every read and would retry.
    """

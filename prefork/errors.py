"""Exceptions. Each that ends a program carries the exit code of the command (see `docs/reference/exit-codes.md`).

Each also carries the code of its message, such as `PF0102`. `str()` of an exception is without it; the command and the
log print it at the end of the first line. `prefork --explain PF0102` shows the page of a code.
"""


class PreforkError(Exception):
    """Base of every error that prefork raises itself.

    Parameters
    ----------
    code
        The code of the message, where it is not that of the class.
    """

    exit_code = 1
    code = ""

    def __init__(self, *arguments: object, code: str = "") -> None:
        super().__init__(*arguments)
        if code:
            self.code = code


class OptionError(PreforkError, ValueError):
    """A setting is out of range, of the wrong type, or does not fit the server. The message names it and the mend."""

    exit_code = 2
    code = "PF0102"


class BootError(PreforkError):
    """No worker of the first generation became ready. The message ends with the last worker's own traceback."""

    exit_code = 3
    code = "PF0110"


class ProgramError(PreforkError):
    """The program cannot be imported, or names nothing that can be served. Carries the program's own traceback."""

    exit_code = 4
    code = "PF0120"


class RequestTimeout(PreforkError):
    """Raised inside a handler whose request is past its deadline.

    It is an ordinary exception, so that `finally` blocks and the server's `handle_error()` run and the worker lives.
    It is no `TimeoutError`: that is an `OSError`, which handlers catch around every read and would retry.
    """

    code = "PF0601"


class UnixPathError(OSError):
    """The path of a Unix socket cannot be had. It is the system's error, with the code of the message."""

    code = "PF0406"


def with_code(text: str, code: str) -> str:
    """The text with `[PF0102]` at the end of its first line; as it is where there is no code."""
    if not code:
        return text
    first, newline, rest = text.partition("\n")
    return f"{first} [{code}]{newline}{rest}"

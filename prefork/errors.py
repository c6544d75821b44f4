"""Exceptions. Each that ends a program carries the exit code of the command (see `docs/reference/exit-codes.md`).

Each also carries the code of its message, such as `PF0102`. `str()` of an exception is without it; the command and the
log print it at the end of the first line. `prefork --explain PF0102` shows the page of a code.
"""

import errno


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


class CodedOSError(OSError):
    """An error of the system with the code of its message."""

    def __init__(self, number: int | None, text: str, file: object, *, code: str) -> None:
        super().__init__(number, text, file)
        self.code = code


_SYSTEM = {
    errno.EADDRINUSE: "PF0401",
    errno.EACCES: "PF0402",
    errno.EPERM: "PF0402",
    errno.EADDRNOTAVAIL: "PF0403",
}


def code_of(error: PreforkError | OSError) -> str:
    """The code of an error that ends the command, or a reload. What the system says is about a listener there."""
    code = getattr(error, "code", "")
    if isinstance(code, str) and code:
        return code
    if isinstance(error, PreforkError):
        return ""
    if error.errno is not None and error.errno < 0:
        return "PF0403"  # getaddrinfo() knows no such host
    return _SYSTEM.get(error.errno or 0, "PF0406")


def text_of(error: PreforkError | OSError) -> str:
    """What went wrong, without the code. What the system says is about a listener."""
    if not isinstance(error, OSError):
        return str(error)
    where = f" on {error.filename}" if error.filename else ""
    return f"cannot listen{where}: {error.strerror or error}"


def with_code(text: str, code: str) -> str:
    """The text with `[PF0102]` at the end of its first line; as it is where there is no code."""
    if not code:
        return text
    first, newline, rest = text.partition("\n")
    return f"{first} [{code}]{newline}{rest}"

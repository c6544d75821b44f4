"""The file for access lines. It never waits, and no configuration of `logging` reaches it."""

from time import monotonic

import prefork.kernel.logs as logs
import prefork.kernel.lossy_writer as lossy_writer


class AccessFile:
    """Where access lines go: a file, or standard output (`-`).

    The log says, at most once a minute, that lines are dropped.

    Raises
    ------
    OSError
        The file cannot be opened.
    """

    def __init__(self, path: str) -> None:
        what = "access lines"
        self._writer = lossy_writer.standard("stdout", what) if path == "-" else lossy_writer.Writer(path, what)
        self._say_at = 0.0

    def write(self, line: str) -> None:
        if not self._writer.write(line.encode("utf-8", "backslashreplace")) and monotonic() >= self._say_at:
            self._say_at = monotonic() + 60.0
            logs.get("prefork").warning(
                "access lines are dropped: %s: %s [PF0502]", self._writer.where, self._writer.reason
            )

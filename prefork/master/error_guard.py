"""The guard around each step of the master: what fails in one keeps no other from being done.

A failure is logged in full, the same one at most once a second, and the next turn of the loop waits a moment. The guard
itself uses nothing that can fail.
"""

import contextlib
import time
from collections.abc import Iterator

import prefork.kernel.logs as logs

log = logs.get("prefork")

REPORT_GAP = 1.0  # seconds between two reports of the same failure
REPORTS_KEPT = 100  # different failures whose last report is remembered


class Guard:
    """Keeps one master alive.

    To be read: `failed`, whether something of the master's own has failed since `forgive()`.
    """

    def __init__(self) -> None:
        self.failed = False
        self._reported: dict[str, float] = {}  # failures, and when each was reported last

    @contextlib.contextmanager
    def protect(self, text: str, *arguments: object) -> Iterator[None]:
        """A step of the master's own: a failure inside is reported, and ends here."""
        try:
            yield
        except Exception as error:
            self.failed = True
            self.report(error, text, *arguments)

    @contextlib.contextmanager
    def protect_hook(self, text: str) -> Iterator[None]:
        """A hook of the program: each failure is logged, and the loop does not wait for it."""
        try:
            yield
        except Exception as error:
            log.error(text, exc_info=error)

    def report(self, error: Exception, text: str, *arguments: object) -> None:
        """Log a failure in full, but the same one at most once a second."""
        with contextlib.suppress(Exception):
            failure = f"{text % arguments}: {type(error).__name__}: {error}"
            now = time.monotonic()
            if now - self._reported.get(failure, -REPORT_GAP) >= REPORT_GAP:
                if len(self._reported) >= REPORTS_KEPT:
                    self._reported.clear()
                self._reported[failure] = now
                log.error(text, *arguments, exc_info=error)

    def forgive(self) -> bool:
        """Forget the failures up to now. Returns whether there was a failure."""
        failed, self.failed = self.failed, False
        return failed

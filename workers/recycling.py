"""When a worker asks to be replaced: after so many requests, or with so much memory. The caller tells the time."""

import math
from collections.abc import Callable

import prefork.kernel.logs as logs

log = logs.get("prefork")

MEMORY_PERIOD = 0.5  # seconds between two looks at the memory


class RecycleLimits:
    """The limits of one worker.

    Parameters
    ----------
    requests
        After so many the worker asks; 0: whatever their number.
    memory
        With more bytes the worker asks; None: whatever it has.
    own_memory
        Called after a request, at most twice a second, and never when the worker is idle: memory grows only while
        requests are served.

    To be read: `first_check`, the number of the first request after which to ask for a `reason()`. Loops compare only
    this number.
    """

    def __init__(self, slot: int, requests: int, memory: int | None, own_memory: Callable[[], int]) -> None:
        self._slot, self._requests, self._memory, self._own_memory = slot, requests, memory, own_memory
        self._memory_at = 0.0  # when to look at it again
        self.first_check = 1 if memory else requests or 1 << 62

    def reason(self, count: int, now: float) -> str | None:
        """Why the worker asks to be replaced after its request of this number; None where it does not."""
        if self._requests and count >= self._requests:
            return f"max_requests: {count} of {self._requests}"
        if self._memory and now >= self._memory_at:
            self._memory_at = now + MEMORY_PERIOD
            try:
                memory = self._own_memory()
            except Exception as error:  # it is no fault of the request that was just served
                self._memory_at = math.inf
                log.warning("worker %d: max_memory has no effect; its memory cannot be told: %s", self._slot, error)
                return None
            if memory > self._memory:
                return f"max_memory: {memory / 1048576:.1f} MiB of {self._memory / 1048576:.1f} MiB"
        return None

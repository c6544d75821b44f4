"""When a worker asks its master to be replaced: after a number of requests, or with too much memory.

Everything about it is here: the measurement, the decision and the message. The caller tells the time.
"""

import math
import os
import random
from collections.abc import Callable
from typing import Any

import prefork.kernel.logs as logs
import prefork.link.uplink as uplink
import prefork.rules.pacing as pacing
from prefork.link.worker_context import WorkerContext
from prefork.rules.worker_exit import worker_name

log = logs.get("prefork")

MEMORY_PERIOD = 0.5  # seconds between two measurements of the memory


def own_memory() -> int:
    """Bytes that would be freed if this process ended (USS), or its resident set where that is not known."""
    import psutil

    process = psutil.Process()
    try:
        info: Any = process.memory_full_info()
        return int(getattr(info, "uss", info.rss))
    except psutil.Error:
        return int(process.memory_info().rss)


class Recycling:
    """The limits of one worker, and its request to be replaced, which is sent once.

    Parameters
    ----------
    say
        Sends a message to the master.
    memory
        Measures. Called after a request, at most twice a second, and never when the worker is idle: memory grows only
        while requests are served.

    To be read: `first_check`, the number of the first request after which to call `check()`. Loops compare only this
    number.
    """

    def __init__(
        self, context: WorkerContext, say: Callable[[bytes, str], None], memory: Callable[[], int] = own_memory
    ) -> None:
        options, dice = context.options, random.Random(context.seed)
        self._say, self._memory = say, memory
        self._name = worker_name(os.getpid(), context.slot, context.generation)
        self._max_requests = pacing.recycle_after(options.max_requests, options.requests_jitter, dice)
        self._max_memory = options.max_memory
        self._memory_at = 0.0  # when to measure it again
        self._requested = False
        self.first_check = 1 if self._max_memory else self._max_requests or 1 << 62

    def request(self, reason: str) -> None:
        """Ask to be replaced."""
        if not self._requested:
            self._requested = True
            self._say(uplink.RECYCLE, reason)

    def check(self, count: int, now: float) -> None:
        """After the request of this number: ask to be replaced where a limit is reached."""
        if self._requested:
            return
        if self._max_requests and count >= self._max_requests:
            self.request(f"max_requests: {count} of {self._max_requests}")
        elif self._max_memory and now >= self._memory_at:
            self._memory_at = now + MEMORY_PERIOD
            try:
                memory = self._memory()
            except Exception as error:  # it is no fault of the request that was just served
                self._memory_at = math.inf
                log.warning("%s cannot read its memory: %s; max_memory has no effect [PF0414]", self._name, error)
            else:
                if memory > self._max_memory:
                    self.request(f"max_memory: {memory / 1048576:.1f} MiB of {self._max_memory / 1048576:.1f} MiB")

"""Carries out the stop of a pool: closes the listeners, lets handshakes complete, has the workers empty the queue.

`rules.stop_sequence` decides which stage a stop is in and how long it waits; the pool decides what each worker is told.
This module does to the listeners what the stage demands. A stop by TERM:

- `escalate(SETTLING)`: new clients are kept out.
- `settle()`: handshakes that had begun have completed, so the queue is all there is; the pool drains.
- `last_call()`: all workers were killed meanwhile, and there is still a queue; one more worker is started for it.
"""

import time
from collections.abc import Sequence

import prefork.kernel.logs as logs
from prefork.kernel.listener import Listener
from prefork.link.scoreboard import Scoreboard
from prefork.rules.pool import Pool, Spawn
from prefork.rules.stop_sequence import Stage, StopSequence

log = logs.get("prefork")


_TEXTS = {
    Stage.SETTLING: "stopping gracefully: workers finish their requests",
    Stage.DRAINING: "stopping gracefully: workers finish their requests",
    Stage.FAST: "stopping fast: requests in progress are cut off",
    Stage.KILL: "stopping by SIGKILL",
}


class Stop:
    """The stop of one pool, begun or not."""

    def __init__(self, listeners: Sequence[Listener], pool: Pool, board: Scoreboard) -> None:
        self._listeners, self._pool, self._board = listeners, pool, board
        self._sequence = StopSequence()

    @property
    def stage(self) -> Stage:
        return self._sequence.stage

    @property
    def begun(self) -> bool:
        return self._sequence.begun

    @property
    def due(self) -> float | None:
        """When to call `settle()`; None: it waits for nothing."""
        return self._sequence.due

    def escalate(self, stage: Stage) -> None:
        """Go on to a harder stage. To one that is not harder: nothing."""
        now = time.monotonic()
        tcp = [listener for listener in self._listeners if listener.stream and not listener.unix]
        if not self._sequence.rise(stage, now, handshakes=bool(tcp)):
            return
        if stage is Stage.SETTLING:
            self._pool.forget_reload()
            for listener in tcp:
                listener.hold()
        else:
            self._pool.stop(stage, now)
        log.info("%s", _TEXTS[stage])

    def settle(self, now: float) -> None:
        """The second half of a graceful stop, when it is due."""
        due = self._sequence.due
        if due is None or now < due:
            return
        half_open = any(listener.half_open() for listener in self._listeners)
        graceful_timeout = self._pool.options.graceful_timeout
        if not self._sequence.settle(now, half_open=half_open, graceful_timeout=graceful_timeout):
            return
        self._board.drain(True)
        for listener in self._listeners:
            listener.hold()
            listener.empty()
        self._pool.stop(Stage.DRAINING, now)

    def last_call(self, now: float) -> Spawn | None:
        """The order for one more worker, where nobody is left and a client is queued. To be carried out."""
        if not self._sequence.may_have_queue(now) or not any(listener.waiting() for listener in self._listeners):
            return None
        if (order := self._pool.last_call()) is not None:
            self._sequence.called()
        return order

    def found_empty(self) -> None:
        """A worker left because the queue was empty."""
        self._sequence.found_empty()

"""A reload up to its new generation: the program is probed in a child, its settings are read, the pool begins.

After a HUP `begin()` starts the probe, or reads the settings at once where there is nothing to probe. `watch()` takes
the probe's result. `Pool.reload()` then tries the generation with one worker. A failure before that is logged, and
nothing else has happened. A HUP that comes during a probe begins one more reload after it.

Each reload has a ticket, by which whoever asked for it learns of its result (`history`).
"""

import time
from collections.abc import Callable
from typing import Protocol

import prefork.kernel.logs as logs
from prefork.errors import PreforkError, code_of, text_of, with_code
from prefork.kernel.signal_inbox import Inbox
from prefork.master.roster import Roster
from prefork.master.stop import Stop
from prefork.rules.pool import Pool, PoolEvent
from prefork.rules.reload_history import Progress, ReloadHistory
from prefork.settings.settings import Options

log = logs.get("prefork")


class Probe(Protocol):
    """A try of the program before a reload, in a child of its own."""

    fd: int  # readable when there is something new
    deadline: float

    def over(self) -> bool:
        """Whether there is a result. Does not wait."""

    def result(self) -> Options | PreforkError | OSError:
        """The settings of the new generation, or what is wrong. The child is to leave; the maker of the probe collects
        it."""


class Reload:
    """The reloads of one pool, one after the other.

    Parameters
    ----------
    make_probe
        Begins a probe of the program; None where the program is in this process already.
    settings
        Reads the settings anew where there is no probe; it raises PreforkError where they are wrong.
    """

    def __init__(
        self,
        pool: Pool,
        roster: Roster,
        stop: Stop,
        inbox: Inbox,
        make_probe: Callable[[], Probe] | None,
        settings: Callable[[], Options] | None,
    ) -> None:
        self._pool, self._roster, self._stop, self._inbox = pool, roster, stop, inbox
        self._make_probe, self._settings = make_probe, settings
        self.history = ReloadHistory()
        self._probe: Probe | None = None
        self._ticket = 0  # of the reload whose probe runs
        self._next: int | None = None  # the ticket of one that was asked for during the probe

    @property
    def probing(self) -> bool:
        return self._probe is not None

    @property
    def due(self) -> float | None:
        """When the probe has had its time; None: there is none."""
        return None if self._probe is None else self._probe.deadline

    def begin(self) -> int | None:
        """Begin a reload, or have one more follow. Returns its ticket; None: the pool stops."""
        if self._stop.begun:
            self._pool.events.append((PoolEvent.RELOAD_IGNORED, self._pool.generation))
            return None
        self._roster.revive_listeners()  # or it would be refused, as that of a server that does not listen
        now = time.monotonic()
        if self._probe is not None:
            self._pool.events.append((PoolEvent.RELOAD_REMEMBERED, self._pool.generation + 1))
            if self._next is None:
                self._next = self.history.open(Progress.WAITING, now)
            return self._next
        ticket, self._next = self._next or self.history.open(Progress.PROBING, now), None
        self.history.move(ticket, Progress.PROBING, now)
        try:
            if self._make_probe is None:
                self._accept(ticket, self._settings() if self._settings is not None else None)
            else:
                self._probe, self._ticket = self._make_probe(), ticket
                self._inbox.watch(self._probe.fd, lambda: None)
        except PreforkError as error:
            self._refuse(ticket, error)
        except OSError as error:
            reason = f"a process to try the program cannot start: {error.strerror or error}"
            self._refuse(ticket, PreforkError(reason, code="PF0302"))
        return ticket

    def watch(self) -> bool:
        """Take the result of a probe that is over, or has had its time. Returns whether a probe's child now ends."""
        probe = self._probe
        if self._stop.begun:
            self.history.stopped(time.monotonic())
        if probe is None or not probe.over():
            return False
        self._inbox.unwatch(probe.fd)
        self._probe = None
        result = probe.result()
        if self._stop.begun:  # what was probed is not wanted any more
            self._pool.events.append((PoolEvent.RELOAD_GIVEN_UP, self._pool.generation + 1))
            return True
        if isinstance(result, Options):
            self._accept(self._ticket, result)
        else:
            self._refuse(self._ticket, result)
        if self._next is not None:
            self.begin()
        return True

    def happened(self, event: PoolEvent, generation: int, now: float, text: str = "") -> None:
        """The pool tells of a generation. `text` says why one has failed."""
        self.history.happened(event, generation, now, text)

    def _accept(self, ticket: int, options: Options | None) -> None:
        waits = self._pool.reloading
        generation = self._pool.reload(options)
        progress = Progress.WAITING if waits else Progress.ROLLING
        self.history.move(ticket, progress, time.monotonic(), generation=generation)

    def _refuse(self, ticket: int, error: PreforkError | OSError) -> None:
        reason = text_of(error)
        text = f"reload failed: generation {self._pool.generation} serves on: {reason}"
        log.error("%s", with_code(text, code_of(error)))
        self.history.move(ticket, Progress.FAILED, time.monotonic(), with_code(reason, code_of(error)))

    def close(self) -> None:
        """Have the child of a probe leave."""
        if self._probe is not None:
            self._probe.result()
            self._probe = None

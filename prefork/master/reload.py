"""A reload up to its new generation: the program is probed in a child, its settings are read, the pool begins.

After a HUP `begin()` starts the probe, or reads the settings at once where there is nothing to probe. `watch()` takes
the probe's result. `Pool.reload()` then tries the generation with one worker. A failure before that is logged, and
nothing else has happened. A HUP that comes during a probe begins one more reload after it.
"""

from collections.abc import Callable
from typing import Protocol

import prefork.kernel.logs as logs
from prefork.errors import PreforkError
from prefork.kernel.signal_inbox import Inbox
from prefork.master.roster import Roster
from prefork.master.stop import Stop
from prefork.rules.pool import Pool
from prefork.settings.settings import Options

log = logs.get("prefork")


class Probe(Protocol):
    """A try of the program before a reload, in a child of its own."""

    fd: int  # readable when there is something new
    deadline: float

    def over(self) -> bool:
        """Whether there is a result. Does not wait."""

    def result(self) -> Options | str:
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
        self._probe: Probe | None = None
        self._once_more = False  # a reload was asked for during the probe

    @property
    def probing(self) -> bool:
        return self._probe is not None

    @property
    def due(self) -> float | None:
        """When the probe has had its time; None: there is none."""
        return None if self._probe is None else self._probe.deadline

    def begin(self) -> None:
        """Begin a reload; during a stop: nothing."""
        if self._stop.begun:
            return
        self._roster.revive_listeners()  # or it would be refused, as that of a server that does not listen
        generation = self._pool.generation
        if self._make_probe is None:
            try:
                self._pool.reload(self._settings() if self._settings is not None else None)
            except PreforkError as error:
                log.error("reload failed: %s; generation %d serves on", error, generation)
        elif self._probe is not None:
            self._once_more = True
        else:
            self._once_more = False
            try:
                self._probe = self._make_probe()
            except OSError as error:
                log.error("reload failed: the program cannot be tried: %s; generation %d serves on", error, generation)
                return
            self._inbox.watch(self._probe.fd, lambda: None)

    def watch(self) -> bool:
        """Take the result of a probe that is over, or has had its time. Returns whether a probe's child now ends."""
        probe = self._probe
        if probe is None or not probe.over():
            return False
        self._inbox.unwatch(probe.fd)
        self._probe = None
        result = probe.result()
        if self._stop.begun:
            return True  # what was probed is not wanted any more
        if isinstance(result, Options):
            self._pool.reload(result)
        else:
            log.error("reload failed: generation %d serves on: %s", self._pool.generation, result)
        if self._once_more:
            self.begin()
        return True

    def close(self) -> None:
        """Have the child of a probe leave."""
        if self._probe is not None:
            self._probe.result()
            self._probe = None

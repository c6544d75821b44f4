"""What became of each reload that was asked for. Pure: no I/O, no clock.

Whoever asks for a reload gets a ticket, by which the result can be asked for later. Before its program was found good a
reload is known by its ticket alone; from then on by the generation that it brings. Two reloads that wait are one, so
they have the same generation, and both tickets have its result.
"""

import enum
from dataclasses import dataclass

from prefork.rules.pool import PoolEvent

KEPT = 16  # tickets whose result is remembered
TEXT_KEPT = 8192  # characters of what is told of a failure


class Progress(enum.Enum):
    """How far a reload has come."""

    WAITING = "waits for the reload before it"
    PROBING = "tries the program"
    ROLLING = "replaces the workers"
    SERVES = "serves"
    FAILED = "failed"
    DROPPED = "dropped, because the pool stops"


OPEN = frozenset({Progress.WAITING, Progress.PROBING, Progress.ROLLING})


@dataclass(slots=True)
class Ticket:
    """One reload.

    generation
        That it brings; None until its program was found good.
    at
        When it came as far as it is, in the seconds of the caller's clock.
    text
        Of a failure: what was wrong.
    """

    number: int
    progress: Progress
    at: float
    generation: int | None = None
    text: str = ""


class ReloadHistory:
    """The latest reloads of one pool."""

    def __init__(self) -> None:
        self._tickets: dict[int, Ticket] = {}
        self._number = 0
        self.last_failure: Ticket | None = None

    @property
    def latest(self) -> Ticket | None:
        return self._tickets.get(self._number)

    def ticket(self, number: int) -> Ticket | None:
        """None: there is no such ticket, or not any more."""
        return self._tickets.get(number)

    def open(self, progress: Progress, now: float) -> int:
        """A reload was asked for. Returns the number of its ticket."""
        self._number += 1
        self._tickets[self._number] = Ticket(self._number, progress, now)
        self._tickets.pop(self._number - KEPT, None)
        return self._number

    def move(self, number: int, progress: Progress, now: float, text: str = "", generation: int | None = None) -> None:
        """A reload has come further. One that is over, or forgotten, does not."""
        ticket = self._tickets.get(number)
        if ticket is None or ticket.progress not in OPEN:
            return
        ticket.progress, ticket.at, ticket.text = progress, now, excerpt(text, TEXT_KEPT)
        if generation is not None:
            ticket.generation = generation
        if progress is Progress.FAILED:
            self.last_failure = ticket

    def happened(self, event: PoolEvent, generation: int, now: float, text: str = "") -> None:
        """The pool tells of a generation. `text` says why one has failed."""
        reached = {
            PoolEvent.RELOAD_BEGINS: Progress.ROLLING,
            PoolEvent.RELOAD_SERVES: Progress.SERVES,
            PoolEvent.RELOAD_FAILED: Progress.FAILED,
        }.get(event)
        if reached is not None:
            for ticket in self._tickets.values():
                if ticket.generation == generation:
                    self.move(ticket.number, reached, now, text)

    def stopped(self, now: float) -> None:
        """The pool stops: no reload that is under way comes to its end."""
        for ticket in self._tickets.values():
            self.move(ticket.number, Progress.DROPPED, now)


def excerpt(text: str, length: int) -> str:
    """At most so many characters of a text: its beginning and its end, where tracebacks and stacks say the most."""
    if len(text) <= length:
        return text
    gap = "\n[...]\n"
    tail = (length - len(gap)) // 2
    return text[: length - len(gap) - tail] + gap + text[-tail:]

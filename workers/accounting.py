"""The requests that a worker has in hand, and what its slot of the scoreboard says of them: how many there were, which
is the oldest, which deadline is the earliest.

At any moment one of two owns the cells BUSY_SINCE, DEADLINE, REQUESTS and BUSY_TIME:

- The hottest loops, of `sync` and of `wsgi` with one thread, have one request at a time and store what they know of it
  by themselves, through views that are lent to them: `enter_fast_path()`.
- As soon as anything else is in hand, be it within that request or in another thread, `ActiveRequests` owns them, for good.
  The views are released, so that the loop learns of it, whatever it was doing, by the ValueError of its next store, and
  pays nothing for asking; what it had in hand is a request like others by then, `fast_path_request`. So it is in a
  process that the program forks, whose cells nobody reads.

A request within another ends before it, as a rule, and the other goes on as before. Which of them a thread, task or
greenlet works on, and what that is within, is in the context variable `current` and in `outer`.
"""

import contextvars
import threading
from collections.abc import Callable, Iterable, Iterator
from threading import get_ident
from time import monotonic

import prefork.link.scoreboard as scoreboard
from prefork.link.scoreboard import BUSY_SINCE, BUSY_TIME, REQUESTS

Cells = tuple["memoryview[int]", "memoryview[float]"]

NOBODY = -1  # as the thread of what was begun, and which nobody works on


class ActiveRequest:
    """A request in hand, between the two ends of `with worker.serving(peer) as request:`.

    Where it begins in one place and ends in another: `begin()` and `end()`, and `adopt()` in the thread that works on
    it between them. `deadline` is in seconds on the monotonic clock, 0.0 where there is none.
    """

    __slots__ = ("_registry", "deadline", "late", "outer", "peer", "start", "thread", "timeout")

    def __init__(self, registry: "ActiveRequests", peer: object, timeout: float = 0.0) -> None:
        self._registry, self.peer, self.timeout, self.deadline = registry, peer, timeout, 0.0
        self.outer: ActiveRequest | None = None  # what the thread or task had in hand when it entered this
        self.thread = 0  # begins or ends, or is over
        self.late = False  # nobody waits for it any more

    def __enter__(self) -> "ActiveRequest":
        self.begin()
        self.outer = outer = in_hand(current.get())
        current.set(self)
        self.thread = get_ident()  # last: before this nothing is raised for it
        if outer is not None and self._registry.missed:
            try:
                self._registry.catch_up()
            except BaseException:
                self.end()
                raise
        return self

    def begin(self) -> "ActiveRequest":
        """It is in hand from here on, and its deadline runs."""
        registry = self._registry
        if registry.fast_path_cells is not None:
            registry.leave_fast_path()
        self.start = start = monotonic()
        registry.lock.acquire()  # with try and finally, 37 ns less than `with`
        try:
            registry.open[self] = None
            if timeout := self.timeout:
                self.deadline = deadline = start + timeout
                (registry.default_deadlines if timeout == registry.timeout else registry.custom_deadlines)[self] = None
                floats = registry.board.floats
                if not 0.0 < floats[scoreboard.DEADLINE] <= deadline:
                    floats[scoreboard.DEADLINE] = deadline
            if registry.published is None:
                registry.published = self
                board = registry.board
                board.floats[scoreboard.BUSY_SINCE] = start
                board.set_peer(self.peer)
        finally:
            registry.lock.release()
        self.thread = NOBODY
        return self

    def adopt(self) -> None:
        """The calling thread or task goes on with it."""
        current.set(self)
        self.thread = get_ident()

    def part(self) -> None:
        """The calling thread does not go on with it; another will adopt it."""
        current.set(self.outer)

    def end(self, kind: object = None, error: object = None, trace: object = None) -> None:
        """It is over; more than once is harmless."""
        # Before anything is called, in which a signal could be looked at: no RequestTimeout is raised for it any more.
        self.thread = 0
        end = monotonic()
        registry = self._registry
        registry.lock.acquire()
        try:
            open = registry.open
            if self not in open:
                return
            del open[self]
            ints, floats = registry.board.ints, registry.board.floats
            if deadline := self.deadline:
                (registry.default_deadlines if self.timeout == registry.timeout else registry.custom_deadlines).pop(
                    self, None
                )
                if not open:
                    floats[scoreboard.DEADLINE] = 0.0
                elif deadline == floats[scoreboard.DEADLINE]:
                    floats[scoreboard.DEADLINE] = registry.earliest()
            registry.count = count = registry.count + 1
            registry.spent = spent = registry.spent + end - self.start
            ints[scoreboard.REQUESTS] = count
            floats[scoreboard.BUSY_TIME] = spent
            if registry.published is self:
                if open:
                    registry.show_oldest()
                else:
                    registry.published = None
                    floats[scoreboard.BUSY_SINCE] = 0.0
            if registry.finishing:
                registry.changed.notify_all()
        finally:
            registry.lock.release()
        if count >= registry.limit:
            registry.look(count, end)
        if self.outer is not None:
            self.outer = in_hand(self.outer)  # or those of an endless row, each begun in the one before, would stay
            if registry.missed:
                registry.catch_up()

    __exit__ = end

    def extend_deadline(self, seconds: float) -> None:
        """Give it `seconds` from now. Where it has no deadline there is nothing to extend."""
        if self.deadline:
            self._registry.move(self, monotonic() + seconds)


class FreeRequest(ActiveRequest):
    """One without a deadline, of a worker whose requests all begin and end in one thread. Nobody interrupts it or moves
    its deadline: it takes no lock, and nobody has to find it, which is a third less than another costs.

    Made by `ActiveRequests.free()`, for there is nothing to set but two attributes: a call from C to an `__init__` in Python
    would be a sixth of all.
    """

    __slots__ = ()
    thread, late, timeout, deadline = 0, False, 0.0, 0.0
    __init__ = object.__init__

    def begin(self) -> "FreeRequest":
        registry = self._registry
        self.start = start = monotonic()
        registry.open[self] = None
        if registry.published is None:
            registry.published = self
            board = registry.board
            board.floats[BUSY_SINCE] = start
            board.set_peer(self.peer)
        return self

    __enter__ = begin

    def end(self, kind: object = None, error: object = None, trace: object = None) -> None:
        registry, end = self._registry, monotonic()
        open = registry.open
        try:
            del open[self]
        except KeyError:
            return
        registry.count = count = registry.count + 1
        registry.spent = spent = registry.spent + end - self.start
        board = registry.board
        floats = board.floats
        board.ints[REQUESTS] = count
        floats[BUSY_TIME] = spent
        if registry.published is self:
            if open:
                registry.show_oldest()
            else:
                registry.published = None
                floats[BUSY_SINCE] = 0.0
        if count >= registry.limit:
            registry.look(count, end)

    __exit__ = end


# The request that the running thread, or the running task of an event loop, entered or adopted last; no FreeRequest.
# It may be over. A task begins with what its maker had, a thread with nothing.
current: contextvars.ContextVar[ActiveRequest | None] = contextvars.ContextVar("prefork_request", default=None)


def in_hand(one: ActiveRequest | None) -> ActiveRequest | None:
    """The innermost of this and of what it is within that is not over."""
    while one is not None and not one.thread:
        one = one.outer
    return one


class ActiveRequests:
    """All that one worker has in hand.

    Parameters
    ----------
    board
        The worker's slot.
    timeout
        Seconds that a request usually has, 0.0 where it has no deadline.
    limit, look
        From the request of this number on `look(count, now)` is called after each.
    judge
        Called in the main thread where an interrupt came in the middle of an account within another, and found the
        accounts in disorder: interrupt what is late now.
    """

    def __init__(
        self,
        board: scoreboard.Slot,
        timeout: float,
        limit: int,
        look: Callable[[int, float], object],
        judge: Callable[[], object],
    ) -> None:
        self.timeout, self.limit, self.look, self.judge = timeout, limit, look, judge
        self.count, self.spent = 0, 0.0  # requests, and seconds in them
        # Oldest first; of those, which have a deadline in the order in which they came, and which have one out of it;
        # and what the scoreboard shows, which is not in `open` where it needs no object (the class `asgi`).
        self.open: dict[ActiveRequest, None] = {}
        self.default_deadlines: dict[ActiveRequest, None] = {}
        self.custom_deadlines: dict[ActiveRequest, None] = {}
        self.published: object = None
        self.finishing = False
        self.missed = False  # whether there was such an interrupt
        self.fast_path_cells: Cells | None = None
        self.board = board
        self._make_lock()

    def _make_lock(self) -> None:
        # Re-entrant: the handler of an interrupt takes it on top of whatever the main thread is doing.
        self.lock = threading.RLock()
        self.changed = threading.Condition(self.lock)

    def free(self, peer: object) -> FreeRequest:
        """One that takes no lock, still to begin."""
        one: FreeRequest = FreeRequest()
        one._registry, one.peer = self, peer
        return one

    def disown(self, board: scoreboard.Slot) -> None:
        """In the child of a fork: write to this slot. Another thread, which is not there, may have held the lock."""
        self._make_lock()
        self.leave_fast_path()
        self.board = board

    def enter_fast_path(self) -> Cells:
        """The integers and the floats of the slot, for a loop of the calling thread that has one request at a time."""
        self.fast_path_request = ActiveRequest(self, "")
        current.set(self.fast_path_request)
        self.fast_path_cells = self.board.ints[:], self.board.floats[:]
        self._borrower = get_ident()
        return self.fast_path_cells

    def leave_fast_path(self) -> None:
        """Take over from such a loop, at any point of it: what it has counted, and what it has in hand."""
        with self.lock:
            if self.fast_path_cells is None:
                return
            for cells in self.fast_path_cells:
                cells.release()
            self.fast_path_cells = None
            ints, floats, one = self.board.ints, self.board.floats, self.fast_path_request
            self.count, self.spent = ints[REQUESTS], floats[BUSY_TIME]
            one.start, one.deadline = floats[BUSY_SINCE], floats[scoreboard.DEADLINE]
            if one.start:
                self.open[one] = None
                self.published = one
                if one.deadline:
                    self.custom_deadlines[one] = None
                one.thread = self._borrower

    def mine(self) -> Iterator[ActiveRequest]:
        """What the running thread, task or greenlet works on, and what that is within."""
        one = in_hand(current.get())
        while one is not None:
            if one._registry is self:  # or it is of the worker in one of whose handlers this one was forked
                yield one
            one = in_hand(one.outer)

    def extend(self, seconds: float) -> None:
        """Give what the running thread or task works on `seconds` from now."""
        if (one := next(self.mine(), None)) is not None:
            one.extend_deadline(seconds)
            return
        deadline, floats = monotonic() + seconds, self.board.floats
        with self.lock:
            # Between the two nothing is called, so the loop, in another thread, does not end its request there.
            if self.fast_path_cells is not None and floats[scoreboard.DEADLINE]:
                floats[scoreboard.DEADLINE] = deadline

    def earliest(self) -> float:
        """The earliest deadline of what is in hand and not late. Those of equal timeouts are in their order already."""
        first = next(iter(self.default_deadlines), None)
        least = first.deadline if first is not None else 0.0
        for one in self.custom_deadlines:
            if not least or one.deadline < least:
                least = one.deadline
        return least

    def show_oldest(self) -> None:
        """Of what is in hand."""
        self.published = one = next(iter(self.open))
        self.board.floats[scoreboard.BUSY_SINCE] = one.start
        self.board.set_peer(one.peer)

    def show_again(self) -> None:
        with self.lock:
            if self.open:
                self.show_oldest()

    def move(self, one: ActiveRequest, deadline: float) -> None:
        with self.lock:
            if one in self.open and not one.late:
                self.default_deadlines.pop(one, None)
                self.custom_deadlines[one] = None
                one.timeout, one.deadline = -1.0, deadline
                self.board.floats[scoreboard.DEADLINE] = self.earliest()

    def overdue(self) -> list[ActiveRequest]:
        """What is past its deadline, and not at this moment beginning or ending, nor given up."""
        now = monotonic()
        return [one for one in list(self.open) if one.thread and not one.late and 0.0 < one.deadline <= now]

    def give_up(self, some: Iterable[ActiveRequest]) -> None:
        """Wait no more for these, which are past their deadline."""
        with self.lock:
            for one in some:
                one.late = True
                self.default_deadlines.pop(one, None)
                self.custom_deadlines.pop(one, None)
            self.board.floats[scoreboard.DEADLINE] = self.earliest()
            self.changed.notify_all()

    def catch_up(self) -> None:
        """At the end of what an interrupt found in disorder."""
        if get_ident() == threading.main_thread().ident:
            self.missed = False
            self.judge()

    def wait(self) -> None:
        """Until all that is in hand is late."""
        with self.changed:
            self.finishing = True
            while not all(one.late for one in self.open):
                self.changed.wait()

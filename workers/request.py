"""The requests that a worker has in hand, and what its slot of the scoreboard says of them: how many there were, which
is the oldest, which deadline is the earliest.

The hottest loop, which has one request at a time, does the same for itself and without these; while there is a deadline
on the slot and nothing in hand here, that deadline is its own.
"""

import contextvars
import threading
from collections.abc import Callable, Iterable
from threading import get_ident
from time import monotonic

import prefork.scoreboard as scoreboard
from prefork.scoreboard import BUSY_SINCE, BUSY_TIME, REQUESTS


class Request:
    """A request in hand, between the two ends of `with worker.serving(peer) as request:`.

    Where it begins in one place and ends in another: `begin()` and `end()`. `deadline` is in seconds on the monotonic
    clock, 0.0 where there is none.
    """

    __slots__ = ("_among", "deadline", "late", "peer", "start", "thread", "timeout")

    def __init__(self, among: "Requests", peer: object, timeout: float = 0.0) -> None:
        self._among, self.peer, self.timeout, self.deadline = among, peer, timeout, 0.0
        self.thread = 0  # in no thread's hands
        self.late = False  # nobody waits for it any more

    def begin(self) -> "Request":
        """It is in hand from here on, and its deadline runs."""
        among = self._among
        self.start = start = monotonic()
        current.set(self)
        among.lock.acquire()  # with try and finally, 37 ns less than `with`
        try:
            among.open[self] = None
            if timeout := self.timeout:
                self.deadline = deadline = start + timeout
                (among.due if timeout == among.timeout else among.odd)[self] = None
                floats = among.board.floats
                if not 0.0 < floats[scoreboard.DEADLINE] <= deadline:
                    floats[scoreboard.DEADLINE] = deadline
            if among.shown is None:
                among.shown = self
                board = among.board
                board.floats[scoreboard.BUSY_SINCE] = start
                board.set_peer(self.peer)
        finally:
            among.lock.release()
        self.thread = get_ident()  # last: before this nothing is raised for it
        return self

    __enter__ = begin

    def adopt(self) -> None:
        """The calling thread goes on with it."""
        self.thread = get_ident()
        current.set(self)

    def end(self, kind: object = None, error: object = None, trace: object = None) -> None:
        """It is over; more than once is harmless."""
        # Before anything is called, in which a signal could be looked at: no RequestTimeout is raised for it any more.
        self.thread = 0
        end = monotonic()
        among = self._among
        among.lock.acquire()
        try:
            open = among.open
            if self not in open:
                return
            ints, floats = among.board.ints, among.board.floats
            if deadline := self.deadline:
                if len(open) == 1:
                    # First: while there is a deadline and nothing in hand, that deadline is the hot loop's.
                    floats[scoreboard.DEADLINE] = 0.0
                (among.due if self.timeout == among.timeout else among.odd).pop(self, None)
            del open[self]
            if open and deadline and deadline == floats[scoreboard.DEADLINE]:
                floats[scoreboard.DEADLINE] = among.earliest()
            among.count = count = among.count + 1
            among.spent = spent = among.spent + end - self.start
            ints[scoreboard.REQUESTS] = count
            floats[scoreboard.BUSY_TIME] = spent
            if among.shown is self:
                if open:
                    among.show(next(iter(open)))
                else:
                    among.shown = None
                    floats[scoreboard.BUSY_SINCE] = 0.0
            if among.finishing:
                among.changed.notify_all()
        finally:
            among.lock.release()
        if count >= among.limit:
            among.look(count, end)

    __exit__ = end

    def extend_deadline(self, seconds: float) -> None:
        """Give it `seconds` from now. Where it has no deadline there is nothing to extend."""
        if self.deadline:
            self._among.move(self, monotonic() + seconds)


class FreeRequest(Request):
    """One without a deadline, of a worker whose requests all begin and end in one thread. Nobody interrupts it or moves
    its deadline: it takes no lock, and nobody has to find it, which is a third less than another costs.

    Made by `Requests.free()`, for there is nothing to set but two attributes: a call from C to an `__init__` in Python
    would be a sixth of all.
    """

    __slots__ = ()
    thread, late, timeout, deadline = 0, False, 0.0, 0.0
    __init__ = object.__init__

    def begin(self) -> "FreeRequest":
        among = self._among
        self.start = start = monotonic()
        among.open[self] = None
        if among.shown is None:
            among.shown = self
            board = among.board
            board.floats[BUSY_SINCE] = start
            board.set_peer(self.peer)
        return self

    __enter__ = begin

    def end(self, kind: object = None, error: object = None, trace: object = None) -> None:
        among, end = self._among, monotonic()
        open = among.open
        try:
            del open[self]
        except KeyError:
            return
        among.count = count = among.count + 1
        among.spent = spent = among.spent + end - self.start
        board = among.board
        floats = board.floats
        board.ints[REQUESTS] = count
        floats[BUSY_TIME] = spent
        if among.shown is self:
            if open:
                among.show(next(iter(open)))
            else:
                among.shown = None
                floats[BUSY_SINCE] = 0.0
        if count >= among.limit:
            among.look(count, end)

    __exit__ = end


# The request that the running thread, or the running task of an event loop, has in hand; no FreeRequest.
current: contextvars.ContextVar[Request | None] = contextvars.ContextVar("prefork_request", default=None)


class Requests:
    """All that one worker has in hand.

    Parameters
    ----------
    board
        The worker's slot.
    timeout
        Seconds that a request usually has, 0.0 where it has no deadline.
    limit, look
        From the request of this number on `look(count, now)` is called after each.
    """

    def __init__(
        self, board: scoreboard.Slot, timeout: float, limit: int, look: Callable[[int, float], object]
    ) -> None:
        self.timeout, self.limit, self.look = timeout, limit, look
        self.count, self.spent = 0, 0.0  # requests, and seconds in them
        # Oldest first; of those, which have a deadline in the order in which they came, and which have one out of it;
        # and which one the scoreboard shows.
        self.open: dict[Request, None] = {}
        self.due: dict[Request, None] = {}
        self.odd: dict[Request, None] = {}
        self.shown: Request | None = None
        self.finishing = False
        self.write_to(board)

    def write_to(self, board: scoreboard.Slot) -> None:
        """Write to this slot. Also in the child of a fork, where another thread, which is not there, may have held the
        lock."""
        self.board = board
        # Re-entrant: the handler of an interrupt takes it on top of whatever the main thread is doing.
        self.lock = threading.RLock()
        self.changed = threading.Condition(self.lock)

    def free(self, peer: object) -> FreeRequest:
        """One that takes no lock, still to begin."""
        one: FreeRequest = FreeRequest()
        one._among, one.peer = self, peer
        return one

    def adopt(self, count: int, spent: float, thread: int) -> Request:
        """Take over the accounts of a loop that kept them by itself, with the request that it has in hand, if any."""
        with self.lock:
            self.count, self.spent = count, spent
            floats = self.board.floats
            one = Request(self, "", 0.0)
            one.start, one.deadline, one.thread = floats[scoreboard.BUSY_SINCE], floats[scoreboard.DEADLINE], thread
            if one.start:
                self.open[one] = None
                self.shown = one
                if one.deadline:
                    self.odd[one] = None
        if thread == get_ident():
            current.set(one)
        return one

    def earliest(self) -> float:
        """The earliest deadline of what is in hand and not late. Those of equal timeouts are in their order already."""
        first = next(iter(self.due), None)
        least = first.deadline if first is not None else 0.0
        for one in self.odd:
            if not least or one.deadline < least:
                least = one.deadline
        return least

    def show(self, one: Request) -> None:
        """Of what is in hand the scoreboard shows the oldest."""
        self.shown = one
        self.board.floats[scoreboard.BUSY_SINCE] = one.start
        self.board.set_peer(one.peer)

    def move(self, one: Request, deadline: float) -> None:
        with self.lock:
            if one in self.open and not one.late:
                self.due.pop(one, None)
                self.odd[one] = None
                one.timeout, one.deadline = -1.0, deadline
                self.board.floats[scoreboard.DEADLINE] = self.earliest()

    def give_up(self, some: Iterable[Request]) -> bool:
        """Of these, wait no more for those that are past their deadline. Whether any is."""
        now, found = monotonic(), False
        with self.lock:
            for one in some:
                if 0.0 < one.deadline <= now:
                    one.late = True
                    self.due.pop(one, None)
                    self.odd.pop(one, None)
                found = found or one.late
            self.board.floats[scoreboard.DEADLINE] = self.earliest()
            self.changed.notify_all()
        return found

    def wait(self) -> None:
        """Until all that is in hand is late."""
        with self.changed:
            self.finishing = True
            while not all(one.late for one in self.open):
                self.changed.wait()

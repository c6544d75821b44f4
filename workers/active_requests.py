"""The requests that a worker has in progress, and what its slot of the scoreboard says of them: how many there were,
which is the oldest, which deadline is the earliest.

At any moment one of two owns the cells BUSY_SINCE, DEADLINE, REQUESTS and BUSY_TIME:

- The hottest loops, of `sync` and of `wsgi` with one thread, have one request at a time. They store what they know of
  it themselves, through views that `enter_fast_path()` gives them.
- As soon as anything else is in progress, within that request or in another thread, `ActiveRequests` owns the cells,
  for good. It releases the views, so that the next store of the loop raises ValueError: the loop pays nothing for
  asking. The loop's request is then a request like others, `fast_path_request`. The same happens in a process that the
  program forks; nobody reads the cells there.

A request within another ends before it, as a rule, and the other goes on as before. The context variable `current` says
which request a thread, task or greenlet works on, and `outer` which request that one is within.
"""

import contextvars
import threading
from collections.abc import Callable, Iterable, Iterator
from threading import get_ident
from time import monotonic

import prefork.link.scoreboard as scoreboard
from prefork.link.scoreboard import BUSY_SINCE, BUSY_TIME, DEADLINE, PEER_PORT, REQUESTS
from prefork.workers.recycling import Recycling

Cells = tuple["memoryview[int]", "memoryview[float]"]

NOBODY = -1  # as the thread of a request that has begun, and that no thread works on


class ActiveRequest:
    """A request in progress, between the two ends of `with worker.serving(peer) as request:`.

    A request may begin in one place and end in another: `begin()` and `end()`, and between them `adopt()` in the thread
    that works on it. `deadline` is in seconds on the monotonic clock, 0.0 where there is none.
    """

    __slots__ = ("_registry", "deadline", "late", "outer", "peer", "start", "thread", "timeout")

    def __init__(self, registry: "ActiveRequests", peer: object, timeout: float = 0.0) -> None:
        self._registry, self.peer, self.timeout, self.deadline = registry, peer, timeout, 0.0
        self.outer: ActiveRequest | None = None  # what the thread or task had in progress when it entered this
        self.thread = 0  # 0 while the request begins or ends, and when it is over; no RequestTimeout is raised then
        self.late = False  # nobody waits for it any more

    def __enter__(self) -> "ActiveRequest":
        self.begin()
        self.outer = outer = innermost(current.get())
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
        """It is in progress from here on, and its deadline runs."""
        registry = self._registry
        if registry.fast_path_cells is not None:
            registry.leave_fast_path()
        self.start = start = monotonic()
        registry.lock.acquire()  # with try and finally, 37 ns less than `with`
        try:
            registry.open[self] = None
            board = registry.board
            if timeout := self.timeout:
                self.deadline = deadline = start + timeout
                (registry.default_deadlines if timeout == registry.timeout else registry.custom_deadlines)[self] = None
                if not 0.0 < board.floats[DEADLINE] <= deadline:
                    board.floats[DEADLINE] = deadline
            if registry.published is None:
                registry.published = self
                board.floats[BUSY_SINCE] = start
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
        # Before any call, in which the interpreter could handle a signal: no RequestTimeout is raised for it any more.
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
                    floats[DEADLINE] = 0.0
                elif deadline == floats[DEADLINE]:
                    floats[DEADLINE] = registry.earliest()
            registry.count = count = registry.count + 1
            registry.spent = spent = registry.spent + end - self.start
            ints[REQUESTS] = count
            floats[BUSY_TIME] = spent
            if registry.published is self:
                if open:
                    registry.show_oldest()
                else:
                    registry.published = None
                    floats[BUSY_SINCE] = 0.0
            if registry.finishing:
                registry.changed.notify_all()
        finally:
            registry.lock.release()
        if count >= registry.first_check:
            registry.check(count, end)
        if self.outer is not None:
            # An endless row of requests, each begun in the request before, would keep all of them otherwise.
            self.outer = innermost(self.outer)
            if registry.missed:
                registry.catch_up()

    __exit__ = end

    def extend_deadline(self, seconds: float) -> None:
        """Give it `seconds` from now. Where it has no deadline there is nothing to extend."""
        if self.deadline:
            self._registry.move(self, monotonic() + seconds)


class UntimedRequest(ActiveRequest):
    """A request without a deadline, of a worker whose requests all begin and end in one thread.

    Nobody interrupts it or moves its deadline: it needs no lock, and nobody has to find it in `current`. That takes 0.8
    us less than the same accounting by an `ActiveRequest`: 4 to 8 % of a request of the class `asgi`. `untimed()` makes
    it, for a call from C to an `__init__` in Python would take as long as the rest of its making.
    """

    __slots__ = ()
    thread, late, timeout, deadline = 0, False, 0.0, 0.0
    __init__ = object.__init__

    def begin(self) -> "UntimedRequest":
        registry = self._registry
        self.start = start = monotonic()
        registry.open[self] = None
        if registry.published is None:
            registry.published = self
            board, peer = registry.board, self.peer
            board.floats[BUSY_SINCE] = start
            try:  # a client's host seldom changes from one request to the next
                if type(peer) is tuple and peer and peer[0] == board.host:
                    board.ints[PEER_PORT] = peer[1]
                else:
                    board.set_peer(peer)
            except (TypeError, ValueError, IndexError):  # it is no pair of host and port
                board.set_peer(peer)
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
        board = registry.board  # another one in a process that the request has forked
        floats = board.floats
        board.ints[REQUESTS] = count
        floats[BUSY_TIME] = spent
        if registry.published is self:
            if open:
                registry.show_oldest()
            else:
                registry.published = None
                floats[BUSY_SINCE] = 0.0
        if count >= registry.first_check:
            registry.check(count, end)

    __exit__ = end


# The request that the running thread, or the running task of an event loop, entered or adopted last; no UntimedRequest.
# It may be over. A task begins with what its maker had, a thread with nothing.
current: contextvars.ContextVar[ActiveRequest | None] = contextvars.ContextVar("prefork_request", default=None)


def innermost(request: ActiveRequest | None) -> ActiveRequest | None:
    """Of a request and those that it is within, the innermost that is not over."""
    while request is not None and not request.thread:
        request = request.outer
    return request


class ActiveRequests:
    """All requests that one worker has in progress.

    Parameters
    ----------
    board
        The worker's slot.
    timeout
        Seconds that a request usually has, 0.0 where it has no deadline.
    recycling
        Its `check()` is called after each request, from the number `first_check` on.
    judge
        Interrupts what is late. Called in the main thread after an interrupt that came as a request within another
        began or ended, when the accounts were in disorder.
    """

    def __init__(
        self,
        board: scoreboard.Slot,
        timeout: float,
        recycling: Recycling,
        judge: Callable[[], object],
    ) -> None:
        self.timeout, self.judge = timeout, judge
        self.first_check, self.check = recycling.first_check, recycling.check
        self.count, self.spent = 0, 0.0  # requests, and seconds in them
        self.open: dict[ActiveRequest, None] = {}  # oldest first
        # Of these: `default_deadlines` are in the order of their deadlines, for all have the same timeout.
        self.default_deadlines: dict[ActiveRequest, None] = {}
        self.custom_deadlines: dict[ActiveRequest, None] = {}
        # What the scoreboard shows. It is not in `open` where it needs no object (the class `asgi`).
        self.published: object = None
        self.finishing = False
        self.missed = False  # an interrupt came when the accounts were in disorder
        self.fast_path_cells: Cells | None = None
        self.board = board
        self._make_lock()

    def _make_lock(self) -> None:
        # Re-entrant: the handler of an interrupt takes it on top of whatever the main thread is doing.
        self.lock = threading.RLock()
        self.changed = threading.Condition(self.lock)

    def untimed(self, peer: object) -> UntimedRequest:
        """A request that takes no lock, still to begin."""
        request: UntimedRequest = UntimedRequest()
        request._registry, request.peer = self, peer
        return request

    def disown(self, board: scoreboard.Slot) -> None:
        """In the child of a fork: write to this slot. The thread that held the lock may not exist in the child."""
        self._make_lock()
        self.leave_fast_path()
        self.board = board

    def enter_fast_path(self) -> Cells:
        """The integers and the floats of the slot, for a loop of the calling thread that has one request at a time."""
        self.fast_path_request = ActiveRequest(self, "")
        current.set(self.fast_path_request)
        self.fast_path_cells = self.board.ints[:], self.board.floats[:]
        self._fast_path_thread = get_ident()
        return self.fast_path_cells

    def leave_fast_path(self) -> None:
        """Take over from such a loop, at any point of it: what it has counted, and what it has in progress."""
        with self.lock:
            if self.fast_path_cells is None:
                return
            for cells in self.fast_path_cells:
                cells.release()
            self.fast_path_cells = None
            ints, floats, request = self.board.ints, self.board.floats, self.fast_path_request
            self.count, self.spent = ints[REQUESTS], floats[BUSY_TIME]
            request.start, request.deadline = floats[BUSY_SINCE], floats[DEADLINE]
            if request.start:
                self.open[request] = None
                self.published = request
                if request.deadline:
                    self.custom_deadlines[request] = None
                request.thread = self._fast_path_thread

    def mine(self) -> Iterator[ActiveRequest]:
        """What the running thread, task or greenlet works on, and what that is within."""
        request = innermost(current.get())
        while request is not None:
            if request._registry is self:  # not so where a handler of another worker has forked this worker
                yield request
            request = innermost(request.outer)

    def extend(self, seconds: float) -> None:
        """Give what the running thread or task works on `seconds` from now."""
        if (request := next(self.mine(), None)) is not None:
            request.extend_deadline(seconds)
            return
        deadline, floats = monotonic() + seconds, self.board.floats
        with self.lock:
            # Between the check and the store nothing is called: the loop, in another thread, cannot end its request.
            if self.fast_path_cells is not None and floats[DEADLINE]:
                floats[DEADLINE] = deadline

    def earliest(self) -> float:
        """The earliest deadline of what is in progress and not late; 0.0 where there is none."""
        first = next(iter(self.default_deadlines), None)
        least = first.deadline if first is not None else 0.0
        for request in self.custom_deadlines:
            if not least or request.deadline < least:
                least = request.deadline
        return least

    def show_oldest(self) -> None:
        """Show the oldest request in progress."""
        self.published = oldest = next(iter(self.open))
        self.board.floats[BUSY_SINCE] = oldest.start
        self.board.set_peer(oldest.peer)

    def show_again(self) -> None:
        with self.lock:
            if self.open:
                self.show_oldest()

    def move(self, request: ActiveRequest, deadline: float) -> None:
        with self.lock:
            if request in self.open and not request.late:
                self.default_deadlines.pop(request, None)
                self.custom_deadlines[request] = None
                request.timeout, request.deadline = -1.0, deadline
                self.board.floats[DEADLINE] = self.earliest()

    def overdue(self) -> list[ActiveRequest]:
        """The requests past their deadline, without those that begin or end at this moment and those given up."""
        now = monotonic()
        return [
            request
            for request in list(self.open)
            if request.thread and not request.late and 0.0 < request.deadline <= now
        ]

    def give_up(self, requests: Iterable[ActiveRequest]) -> None:
        """Wait no more for these, which are past their deadline."""
        with self.lock:
            for request in requests:
                request.late = True
                self.default_deadlines.pop(request, None)
                self.custom_deadlines.pop(request, None)
            self.board.floats[DEADLINE] = self.earliest()
            self.changed.notify_all()

    def catch_up(self) -> None:
        """After a disorder in which an interrupt came: do what the interrupt would have done."""
        if get_ident() == threading.main_thread().ident:
            self.missed = False
            self.judge()

    def wait(self) -> None:
        """Until all that is in progress is late."""
        with self.changed:
            self.finishing = True
            while not all(request.late for request in self.open):
                self.changed.wait()

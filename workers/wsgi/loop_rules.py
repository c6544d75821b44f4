"""Decisions of the polling loop and of its threads, made from times and counts that they are told.

Pure: no clock, no thread, no descriptor. Each number that decides has its name here, and its reason. They are names of
the module: the interpreter reads these several times faster than a class's.
"""

# Batches
MANY = 64  # events between two looks at the clock
BRIEF = 0.0005  # seconds per event of a turn, its wait included, up to which the next turn may fetch many

# Tries without a poll
TRIES = 8  # connections that are accepted, served and closed before the loop looks at anything else

# The lead
SHORT = 0.002  # seconds; a request that takes less is short
LONG = 300  # short requests that one long request outweighs
ENOUGH = 2 * LONG  # the credit at which the leader keeps the lead
MOST = 10 * LONG  # the most credit that there can be
RETURN = 20  # short requests after which the lead is kept again, when it was given up because nobody asked
LOOKS = 5  # without a request, after which the main thread sleeps: more looks would cost more than they save


class EventBatch:
    """How many events the next wait may fetch.

    A batch saves system calls. But a client that asks again just after one was fetched waits for all of it, and comes
    last in the next one. So where requests are long each event is fetched alone: the kernel keeps their order.
    """

    def __init__(self) -> None:
        self.size = 1
        self._turned_at = 0.0

    def turned(self, now: float, events: int) -> None:
        """A turn of the loop is over, in which so many events were handled."""
        self.size = MANY if now - self._turned_at < events * BRIEF else 1
        self._turned_at = now


class Crowd:
    """Whether to accept once more without a poll.

    Where somebody queues this saves the poll, a twentieth of the cost of a short connection. Where nobody does it costs
    twice as much. So it is done while it succeeds, and tried at each eighth connection.
    """

    def __init__(self) -> None:
        self._is_there = False  # more than one connection was queued the last time
        self._accepted = 0

    def accepted(self, number: int) -> bool:
        """The connection with this number, from 1, was accepted after one event. Returns whether to try once more."""
        self._accepted += 1
        self._is_there = self._is_there or number > 1
        return self._is_there or self._accepted % TRIES == 0

    def nobody(self, number: int) -> None:
        """There was no connection with this number."""
        self._is_there = self._is_there and number == 1


class Lead:
    """Whether a leader keeps the lead while it serves.

    To promote a follower before each request costs two switches of threads. Where nearly all requests are short the
    leader keeps the lead: it is back at once, and the main thread, which looks every `SHORT` seconds then, promotes a
    follower if no request has begun since its last look. A long request that comes while the lead is kept costs other
    clients as much time as many short ones have saved. So short requests earn a credit, and a long one costs `LONG`.
    """

    def __init__(self) -> None:
        self.is_kept = False
        self.begun = 0  # requests, roughly: threads count without a lock
        self._credit = 0
        self._seen = self._vain = 0

    def served(self, seconds: float) -> bool:
        """A request has taken so long. Returns whether the leader keeps the lead from now on: wake the main thread."""
        if seconds >= SHORT:
            self._count(-LONG)
            return False
        self._count(1)
        if self.is_kept or self._credit < ENOUGH:
            return False
        self.is_kept = True
        return True

    def watch(self) -> None:
        """The main thread begins to look."""
        self._seen, self._vain = self.begun, 0

    def look(self, lead_is_free: bool) -> bool:
        """The main thread looks. Returns whether the leader is in a long request: promote a follower."""
        begun, self._seen = self.begun - self._seen, self.begun
        if begun:
            self._vain = 0
            self._count(begun)
        elif lead_is_free:
            self.is_kept = False
            self._count(-LONG)
            return True
        else:
            self._vain += 1
            if self._vain == LOOKS:
                self.is_kept = False
                self._credit = min(self._credit, ENOUGH - RETURN)
        return False

    def _count(self, requests: int) -> None:
        self._credit = min(max(0, self._credit + requests), MOST)
